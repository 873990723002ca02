"""A source from what is typed after --from. What a kind needs is imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from embedq_batch.content.addresses import place_of, without_password
from embedq_batch.content.columns import Columns
from embedq_batch.errors import MissingPackage
from embedq_batch.sources.source import Since, Source
from embedq_sdk.errors import InvalidArgument
from embedq_shared.topics import Topics

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_KNOWN: Final = (
    "paths or globs that end with .parquet, .csv, .tsv or .jsonl, - for JSON Lines on standard input, postgresql://…#TABLE, "
    "lancedb:FOLDER#TABLE, qdrant:ADDRESS#COLLECTION, milvus:ADDRESS#COLLECTION, kafka:TOPIC or jobs"
)


def opened_source(
    places: Sequence[str],
    columns: Columns,
    *,
    query: str | None = None,
    since: Since | None = None,
    servers: str | Sequence[str] = (),
    security: Mapping[str, Any] | None = None,
    prefix: str = "embed",
) -> Source:
    """The source that is meant. Nothing is read yet.

    `query` is for PostgreSQL, instead of a table; `since` (offsets for kafka:TOPIC alone), `servers` and `security` for Kafka, and
    `prefix` for the topics of jobs.

    Raises:
        InvalidArgument: it is none that is known.
        MissingPackage: its client is not installed.
    """
    first = places[0] if places else ""
    kind = first.partition(":")[0]
    if query is not None and kind not in ("postgresql", "postgres"):
        raise InvalidArgument(argument="sql", expected="no value, but for postgresql://…", got="one")
    if since is not None and kind not in ("kafka", "jobs"):
        raise InvalidArgument(argument="since", expected="no value, but for kafka:TOPIC and jobs", got="one")
    if kind == "jobs" and not isinstance(since, int | None):  # in two topics
        raise InvalidArgument(argument="since", expected="a time for jobs", got="offsets")
    if list(places) == ["-"]:
        from embedq_batch.sources.jsonl import StandardInputSource

        return StandardInputSource(sys.stdin.buffer, columns)
    if kind in ("postgresql", "postgres") and len(places) == 1:
        return _postgresql(first, columns, query)
    if kind in ("lancedb", "qdrant", "milvus") and len(places) == 1:
        return _store(first, kind, columns)
    if kind == "kafka" and len(places) == 1:
        from embedq_batch.sources.kafka import KafkaSource

        return KafkaSource([first.removeprefix("kafka:")], columns, servers, security or {}, since=since)
    if list(places) == ["jobs"]:
        from embedq_batch.sources.kafka import JobsSource

        return JobsSource(Topics(prefix), columns, servers, security or {}, since=since)
    kinds = {PurePath(place).suffix.lower() for place in places}
    if len(kinds) == 1:
        match kinds.pop():
            case ".parquet":
                from embedq_batch.sources.parquet import ParquetSource

                return ParquetSource(places, columns)
            case ".csv" | ".tsv" as suffix:
                from embedq_batch.sources.delimited import DelimitedSource

                return DelimitedSource(places, columns, delimiter=_DELIMITERS[suffix])
            case ".jsonl" | ".ndjson":
                from embedq_batch.sources.jsonl import JsonLinesSource

                return JsonLinesSource(places, columns)
    got = ", ".join(map(without_password, places)) or "none"
    raise InvalidArgument(argument="from", expected=f"{_KNOWN}; all of one kind", got=got)


def _store(given: str, kind: str, columns: Columns) -> Source:
    place = place_of(given.partition(":")[2], kind, "table" if kind == "lancedb" else "collection", "from")
    try:
        match kind:
            case "lancedb":
                from embedq_batch.sources.lancedb import LanceSource

                return LanceSource(place.address, place.name, columns)
            case "qdrant":
                from embedq_batch.sources.qdrant import QdrantSource

                return QdrantSource(place.address, place.name, columns)
            case _:
                from embedq_batch.sources.milvus import MilvusSource

                return MilvusSource(place.address, place.name, columns)
    except ModuleNotFoundError as missing:
        raise MissingPackage(
            what=f"--from {kind}:", package=str(missing.name), extra=f"batch-{kind}"
        ) from None


def _postgresql(address: str, columns: Columns, query: str | None) -> Source:
    try:
        from embedq_batch.sources.postgresql import PostgresSource
    except ModuleNotFoundError as missing:
        raise MissingPackage(
            what="--from postgresql:", package=str(missing.name), extra="batch-postgresql"
        ) from None
    if query is not None:
        return PostgresSource(address, columns, query=query)
    place = place_of(address, "postgresql", "table", "from")
    return PostgresSource(place.address, columns, table=place.name.partition(":")[0])
