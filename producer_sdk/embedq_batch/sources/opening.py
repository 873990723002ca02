"""A source from what is typed after --from. What a kind needs is imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from embedq_batch.columns import Columns
from embedq_batch.sources.source import Source
from embedq_sdk.errors import InvalidArgument

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_KNOWN: Final = (
    "paths or globs that end with .parquet, .csv, .tsv or .jsonl, or - for JSON Lines on standard input"
)


def opened_source(places: Sequence[str], columns: Columns) -> Source:
    """The source that is meant. Nothing is read yet.

    Raises:
        InvalidArgument: it is none that is known.
    """
    if list(places) == ["-"]:
        from embedq_batch.sources.jsonl import StandardInputSource

        return StandardInputSource(sys.stdin.buffer, columns)
    kinds = {PurePath(place).suffix.lower() for place in places}
    if len(kinds) != 1:
        raise InvalidArgument(
            argument="from", expected=f"{_KNOWN}; all of one kind", got=", ".join(places) or "none"
        )
    match kinds.pop():
        case ".parquet":
            from embedq_batch.sources.parquet import ParquetSource

            return ParquetSource(places, columns)
        case ".csv" | ".tsv" as kind:
            from embedq_batch.sources.delimited import DelimitedSource

            return DelimitedSource(places, columns, delimiter=_DELIMITERS[kind])
        case ".jsonl" | ".ndjson":
            from embedq_batch.sources.jsonl import JsonLinesSource

            return JsonLinesSource(places, columns)
    raise InvalidArgument(argument="from", expected=_KNOWN, got=", ".join(places))
