"""The types of columns where nothing but the values says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from embedq_batch.errors import BadSource

LOOKED_AT: Final = 1000
"""Records from which types are taken."""


def inferred(records: Sequence[Mapping[str, Any]], names: Sequence[str], source: str) -> pa.Schema:
    """The types of these columns in some records.

    Raises:
        BadSource: a column has values of several.
    """
    fields = []
    for name in names:
        try:
            kind = pa.array([record.get(name) for record in records]).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise BadSource(source=source, reason=f"{name}: expected values of one type: {error}") from None
        fields.append((name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)
