"""A Kafka topic of flat records: the key is the id, so that a compacted topic keeps the latest vector of each row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType
from embedq_batch.errors import BadTarget, RowsRefused, TargetAway
from embedq_batch.manifest.place import MANIFEST, in_working_folder
from embedq_batch.sinks.arrow import arrow_batch, arrow_schema
from embedq_batch.sinks.finals import flat_vector, json_lines
from embedq_batch.sinks.sink import PartsRecord
from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.kafka import KafkaConnection, close, require_topics
from embedq_shared.kafka import (
    TOO_LARGE,
    AIOKafkaProducer,
    KafkaError,
    TopicPartition,
    UnreadableRecord,
    poll,
    position,
)

_T = TypeVar("_T")
_CONNECT_S: Final = 10.0
_WRITE_S: Final = 120.0
"""For the acknowledgement of one write: longer than a broker needs for a new leader."""
_POLL_MS: Final = 500


class KafkaSink:
    """A topic of JSON objects: `id`, `vector`, `model_version`, `tokens`, and what is kept, as in a file of JSON Lines. A row that is
    deleted becomes a tombstone.

    Its client runs in an event loop of its own, which turns while a call is under way: a target is used in one thread.
    """

    dtypes = frozenset[VectorType]({"float32", "float16", "int8", "binary"})

    def __init__(self, topic: str, servers: str | Sequence[str], security: Mapping[str, Any]) -> None:
        self._topic = topic
        self._connection = KafkaConnection.of(
            list(servers) if not isinstance(servers, str) else servers, security
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._producer: AIOKafkaProducer | None = None
        self._shape: Shape | None = None
        self._schema: pa.Schema | None = None

    @property
    def name(self) -> str:
        return f"kafka:{self._topic}"

    @property
    def manifest(self) -> Path:
        return in_working_folder(self.name) / MANIFEST

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        self._shape, self._schema = shape, arrow_schema(shape)
        self._loop = self._loop or asyncio.new_event_loop()
        self._run(self._checked())

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None or self._schema is None:
            raise RuntimeError("a topic is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:
            raise BadTarget(
                target=self.name,
                reason=f"expected vectors of {self._shape.width}, got {batch.vectors.shape[1]} from another model",
            )
        lines = json_lines(arrow_batch(batch, self._shape, self._schema))
        self._run(self._sent([(_key(id), line) for id, line in zip(batch.ids, lines, strict=True)]))
        return 0

    def flush(self) -> int:
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        self._run(self._sent([(_key(id), None) for id in ids]))

    def finish(self, record: PartsRecord) -> None:
        pass

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        """Reads the whole topic: it has no index."""
        found = self._run(self._read({_key(id): id for id in ids}))
        dtype = "float32" if self._shape is None else self._shape.dtype
        return {id: flat_vector(msgspec.json.decode(value), dtype) for id, value in found.items()}

    def close(self) -> None:
        if self._loop is None:
            return
        if self._producer is not None:
            self._loop.run_until_complete(close(self._producer))
            self._producer = None
        self._loop.close()
        self._loop = None

    def _run(self, work: Awaitable[_T]) -> _T:
        if self._loop is None:
            raise RuntimeError("a topic is used before it is opened. This is a bug.")
        try:
            return self._loop.run_until_complete(work)
        except (KafkaRefused, TopicMissing) as error:
            raise BadTarget(target=self.name, reason=str(error)) from None
        except KafkaUnavailable as error:
            if self._producer is not None:  # aiokafka's does not recover from every error by itself
                producer, self._producer = self._producer, None
                self._loop.run_until_complete(close(producer))
            raise TargetAway(target=self.name, reason=error.reason) from None

    async def _checked(self) -> None:
        async with self._connection.client(self._connection.consumer, _CONNECT_S) as consumer:
            await require_topics(self._connection, consumer, [self._topic], _CONNECT_S)

    async def _sent(self, records: Sequence[tuple[bytes, bytes | None]]) -> None:
        """All records, acknowledged."""
        if self._producer is None:
            self._producer = await self._connection.connect(self._connection.producer, _CONNECT_S)
        producer = self._producer
        try:
            async with asyncio.timeout(_WRITE_S):
                sent = [await producer.send(self._topic, value=value, key=key) for key, value in records]
                outcomes = await asyncio.gather(*sent, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        except TOO_LARGE as error:
            raise RowsRefused(target=self.name, reason=str(error)) from None
        except TimeoutError:
            raise self._connection.unavailable(f"writing took more than {_WRITE_S:g} s") from None
        except (KafkaError, OSError) as error:
            raise self._connection.failed(error, "writing") from error

    async def _read(self, wanted: Mapping[bytes, RowId]) -> dict[RowId, bytes]:
        """The latest value of each of these keys, up to where the topic ends now."""
        found: dict[RowId, bytes] = {}
        async with self._connection.client(
            lambda: self._connection.consumer(isolation_level="read_committed"), _CONNECT_S
        ) as consumer:
            first = TopicPartition(self._topic, 0)
            consumer.assign([first])
            await self._connection.call(_CONNECT_S, "finding the records", consumer.position(first))
            everything = [
                TopicPartition(self._topic, n)
                for n in sorted(consumer.partitions_for_topic(self._topic) or {0})
            ]
            consumer.assign(everything)
            await consumer.seek_to_beginning(*everything)
            left = await consumer.end_offsets(everything)
            while left := {tp: end for tp, end in left.items() if (await position(consumer, tp) or 0) < end}:
                for record in await poll(consumer, timeout_ms=_POLL_MS):
                    if isinstance(record, UnreadableRecord) or record.key not in wanted:
                        continue
                    id = wanted[record.key]
                    if record.value is None:
                        found.pop(id, None)
                    else:
                        found[id] = record.value
        return found


def _key(id: RowId) -> bytes:
    return str(id).encode()
