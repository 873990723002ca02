"""A target from what is typed after --to. What a kind needs is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from embedq_batch.content.addresses import place_of
from embedq_batch.errors import MissingPackage
from embedq_batch.sinks.sink import Sink
from embedq_sdk.errors import InvalidArgument

_KNOWN: Final = (
    "a path that ends with .parquet, .jsonl or .npy, lancedb:FOLDER#TABLE, postgresql://…#TABLE or #TABLE:COLUMN, qdrant:ADDRESS#COLLECTION, "
    "milvus:ADDRESS#COLLECTION, or kafka:TOPIC"
)


def opened_sink(
    given: str, *, servers: str | Sequence[str] | None = None, security: Mapping[str, Any] | None = None
) -> Sink:
    """The target that is meant. Nothing is opened yet. `servers` and `security` are for a Kafka topic.

    Raises:
        InvalidArgument: it is none that is known.
        MissingPackage: its client is not installed.
    """
    kind, _, rest = given.partition(":")
    try:
        match kind:
            case "lancedb":
                from embedq_batch.sinks.lancedb import LanceSink

                place = place_of(rest, kind, "table")
                return LanceSink(place.address, place.name)
            case "postgresql" | "postgres":
                from embedq_batch.sinks.postgresql import PostgresSink

                place = place_of(given, kind, "table")
                table, _, column = place.name.partition(":")
                if column:
                    from embedq_batch.sinks.postgresql_column import PostgresColumnSink

                    return PostgresColumnSink(place.address, table, column)
                return PostgresSink(place.address, place.name)
            case "qdrant":
                from embedq_batch.sinks.qdrant import QdrantSink

                place = place_of(rest, kind, "collection")
                return QdrantSink(place.address, place.name)
            case "milvus":
                from embedq_batch.sinks.milvus import MilvusSink

                place = place_of(rest, kind, "collection")
                return MilvusSink(place.address, place.name)
            case "kafka" if servers is not None:
                from embedq_batch.sinks.kafka import KafkaSink

                return KafkaSink(rest, servers, security or {})
    except ModuleNotFoundError as missing:
        extra = "batch-" + ("postgresql" if kind == "postgres" else kind)
        raise MissingPackage(what=f"--to {kind}:", package=str(missing.name), extra=extra) from None
    from embedq_batch.sinks import finals
    from embedq_batch.sinks.parts import PartsSink

    path = Path(given)
    for final in (finals.ParquetFile, finals.JsonLinesFile, finals.NpyFile):
        if path.suffix.lower() == final.suffix:
            return PartsSink(path, final())
    raise InvalidArgument(argument="to", expected=_KNOWN, got=given)
