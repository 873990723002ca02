"""A target from what is typed after --to. What a kind needs is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from embedq_batch.sinks.sink import Sink
from embedq_sdk.errors import InvalidArgument

_KNOWN: Final = "a path that ends with .parquet, .jsonl or .npy"


def opened_sink(place: str) -> Sink:
    """The target that is meant. Nothing is opened yet.

    Raises:
        InvalidArgument: it is none that is known.
    """
    from embedq_batch.sinks import finals
    from embedq_batch.sinks.parts import PartsSink

    path = Path(place)
    for kind in (finals.ParquetFile, finals.JsonLinesFile, finals.NpyFile):
        if path.suffix.lower() == kind.suffix:
            return PartsSink(path, kind())
    raise InvalidArgument(argument="to", expected=_KNOWN, got=place)
