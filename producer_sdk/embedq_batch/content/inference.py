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


def following(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], there: pa.Schema | None
) -> pa.Schema:
    """The types of these columns where records never end: those that the store has (`there`), else those of the first values.

    A store's column of type null takes lists and objects of any kind. A value of another type is its record's problem.
    """
    fields = []
    for name in names:
        place = -1 if there is None else there.get_field_index(name)
        known = None if there is None or place < 0 else there.field(place).type
        values = [value for record in records if (value := record.get(name)) is not None]
        if known is None:
            fields.append((name, _kind(values) or pa.string()))
        elif pa.types.is_null(known):
            fields.append((name, _kind([each for each in values if isinstance(each, (list, dict))]) or known))
        else:
            fields.append((name, known))
    return pa.schema(fields)


def _kind(values: Sequence[Any]) -> pa.DataType | None:
    """The type of all values, or else of the first one; None where there are none, or it has none."""
    for some in (values, values[:1]):
        try:
            kind = pa.array(some).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            continue
        return None if pa.types.is_null(kind) else kind
    return None


def in_json(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Those of these columns whose values JSON has: a text is no moment."""
    kinds = (pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.null())
    found = [schema.field(name) for name in names if name in schema.names]
    return pa.schema([field for field in found if field.type in kinds or pa.types.is_nested(field.type)])
