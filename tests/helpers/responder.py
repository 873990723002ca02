"""The other side of the wire for SDK tests: reads jobs and answers them as the contract says, or misbehaves on demand.

Vectors come from the text alone, so a test knows what must come back. As a program it answers until it is killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from embedq_shared import topics as names
from embedq_shared.codec import CONTENT_TYPES, Format, decode_job, encode, format_of
from embedq_shared.headers import JobHeaders, parse
from embedq_shared.messages import Datum, ErrorBody, Failure, Job, Result, Timings, Usage
from embedq_shared.vectors import cut_and_normalize, quantize

OLD = "sha256:" + "a" * 64
NEW = "sha256:" + "b" * 64


def expected(text: str, dimensions: int = 64, salt: str = OLD) -> np.ndarray:
    """The vector that a responder of model version `salt` gives for a text, float32 (dimensions,)."""
    seed = int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big")
    full = np.random.default_rng(seed).standard_normal(64).astype(np.float32)
    return cut_and_normalize(full, dimensions)


@dataclass
class Received:
    """One job as it arrived."""

    job: Job
    id: str
    headers: JobHeaders
    format: Format
    topic: str
    partition: int
    seen: int
    """How many times a job of this id has arrived, this one included."""

    @property
    def texts(self) -> list[str]:
        return [self.job.input] if isinstance(self.job.input, str) else list(self.job.input)


Answer = Result | Failure


@dataclass
class Responder:
    """Answers every job that arrives after it was entered."""

    servers: str
    prefix: str = "embed"
    version: str = OLD
    behave: Callable[[Received], list[Answer] | None] | None = None
    """The answers to a job, instead of one good result; None leaves the job unanswered for ever."""
    received: list[Received] = field(default_factory=list)
    keep: bool = True
    compute: bool = True
    _seen: dict[str, int] = field(default_factory=dict)
    _cached: dict[tuple[str, int], bytes] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        topics = names.Topics(self.prefix)
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self.servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=100,
        )
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self.servers, max_batch_size=1_000_000, max_request_size=1_100_000
        )
        await self._consumer.start()
        await self._producer.start()
        everything = [
            TopicPartition(lane, n)
            for lane in topics.lanes
            for n in await self._producer.partitions_for(lane)
        ]
        self._consumer.assign(everything)
        await self._consumer.seek_to_end(*everything)
        for tp in everything:
            await self._consumer.position(tp)
        self._topics = topics
        self._task = asyncio.create_task(self._run(), name="responder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await asyncio.gather(self._consumer.stop(), self._producer.stop())
        if not self._task.cancelled():
            self._task.result()

    async def _run(self) -> None:
        while True:
            fetched = await self._consumer.getmany(timeout_ms=500)
            batches: dict[tuple[str, int], Any] = {}
            for records in fetched.values():
                for record in records:
                    received = self._decode(record)
                    answers = [self.good(received)] if self.behave is None else self.behave(received)
                    for answer in answers or ():
                        await self._reply(received, answer, batches)
            for (topic, partition), batch in batches.items():
                await self._producer.send_batch(batch, topic, partition=partition)

    def _decode(self, record: Any) -> Received:
        headers = parse(record.headers)
        format = format_of(headers.content_type)
        assert format is not None
        job = decode_job(record.value, format)
        id = job.id or f"{record.topic}-{record.partition}-{record.offset}"
        self._seen[id] = self._seen.get(id, 0) + 1 if self.keep else 1
        received = Received(job, id, headers, format, record.topic, record.partition, self._seen[id])
        if self.keep:
            self.received.append(received)
        return received

    def good(self, received: Received, *, texts: list[str] | None = None, first: int = 0) -> Result:
        """One result with the vectors of `texts`, by default all of the job's."""
        job = received.job
        texts = received.texts if texts is None else texts
        dimensions = job.dimensions or 64
        ran = sum(len(text.split()) for text in received.texts)
        return Result(
            id=received.id,
            model=job.model or "default",
            model_version=self.version,
            dimensions=dimensions,
            dtype=job.dtype or "float32",
            data=[
                datum
                for n, text in enumerate(texts)
                for datum in self.data(received, first + n, text, dimensions)
            ],
            usage=Usage(ran, ran),
            timings=Timings(queue=0.001, compute=0.002),
            metadata=job.metadata if bytes(job.metadata) else _null(received.format),
        )

    def data(self, received: Received, index: int, text: str, dimensions: int) -> list[Datum]:
        """The one datum of a text, or those of its late chunks, each of `tokens` characters."""
        chunk = received.job.chunk
        if chunk is None or chunk.mode == "mean":
            return [self.datum(received, index, text, dimensions)]
        step = chunk.tokens or 256
        spans = [(start, min(start + step, len(text))) for start in range(0, max(1, len(text)), step)]
        return [
            msgspec.structs.replace(
                self.datum(received, index, text[start:end], dimensions), span=(start, end)
            )
            for start, end in spans
        ]

    def datum(self, received: Received, index: int, text: str, dimensions: int) -> Datum:
        dtype = received.job.dtype or "float32"
        if not self.compute:  # for measuring the client alone
            return Datum(
                index=index, embedding=bytes(4 * dimensions), tokens=1, truncated=False, cached=False
            )
        raw, scale = quantize(expected(text, dimensions, self.version), dtype)
        embedding: Any = raw if received.format == "msgpack" else np.frombuffer(raw, "<f4").tolist()
        more = {} if scale is None else {"scale": scale}
        return Datum(
            index=index, embedding=embedding, tokens=len(text.split()), truncated=False, cached=False, **more
        )

    def parts(self, received: Received, each: int) -> list[Result]:
        """The result in parts of `each` inputs."""
        texts = received.texts
        starts = range(0, len(texts), each)
        whole = [self.good(received, texts=texts[start : start + each], first=start) for start in starts]
        return [
            Result(**{f: getattr(part, f) for f in part.__struct_fields__} | {"part": n, "parts": len(whole)})
            for n, part in enumerate(whole)
        ]

    @staticmethod
    def failure(received: Received, error: ErrorBody) -> Failure:
        return Failure(
            id=received.id,
            model=received.job.model,
            model_version=None,
            error=error,
            metadata=_null(received.format),
        )

    async def send(self, received: Received, answer: Answer) -> None:
        """One more answer, at a time of the test's choosing."""
        batches: dict[tuple[str, int], Any] = {}
        await self._reply(received, answer, batches)
        for (topic, partition), batch in batches.items():
            await (await self._producer.send_batch(batch, topic, partition=partition))

    async def _reply(self, received: Received, answer: Answer, batches: dict[tuple[str, int], Any]) -> None:
        topic = received.headers.reply_topic or self._topics.results
        partition = received.headers.reply_partition
        if partition is None:
            partition = hash(received.id) % len(await self._producer.partitions_for(topic))
        headers = [
            *received.headers.echo,
            (names.CONTENT_TYPE, CONTENT_TYPES[received.format].encode()),
            (names.STATUS, b"error" if isinstance(answer, Failure) else b"ok"),
        ]
        value = encode(answer, received.format)
        key = (topic, partition)
        batch = batches.setdefault(key, self._producer.create_batch())
        if batch.append(timestamp=None, key=received.id.encode(), value=value, headers=headers) is None:
            await self._producer.send_batch(batch, topic, partition=partition)
            batches[key] = self._producer.create_batch()
            batches[key].append(timestamp=None, key=received.id.encode(), value=value, headers=headers)


def _null(format: Format) -> Any:
    from embedq_shared.codec import null

    return null(format)


async def _serve(servers: str) -> None:
    async with Responder(servers, keep=False, compute=False):
        print("ready", flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
