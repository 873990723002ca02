"""The service as seen from the wire, without a broker: answers jobs as the contract says, or misbehaves on demand.

Vectors come from the text alone, so a test knows what must come back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_shared import topics as names
from embedq_shared.codec import CONTENT_TYPES, Format, decode_job, encode, format_of, null
from embedq_shared.headers import Header, JobHeaders, parse
from embedq_shared.messages import Datum, ErrorBody, Failure, Job, Result, Timings, Usage
from embedq_shared.vectors import cut_and_normalize, quantize

OLD = "sha256:" + "a" * 64
NEW = "sha256:" + "b" * 64
HIDDEN_SIZE = 64


def expected(text: str, dimensions: int = HIDDEN_SIZE, salt: str = OLD) -> npt.NDArray[np.float32]:
    """The vector that model version `salt` gives for a text, float32 (dimensions,)."""
    return cut_and_normalize(_full(salt + text), dimensions)


@lru_cache(20_000)
def _full(seed: str) -> npt.NDArray[np.float32]:
    """Kept: what a service answers a test expects, and runs that are killed ask for the same texts again and again."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    full = np.random.default_rng(number).standard_normal(HIDDEN_SIZE).astype(np.float32)
    full.setflags(write=False)
    return full


def rows(texts: list[str], salt: str = OLD) -> npt.NDArray[np.float32]:
    """The vectors of several texts, float32 (texts, HIDDEN_SIZE)."""
    return np.stack([expected(text, salt=salt) for text in texts])


def changed(result: Result, **changes: Any) -> Result:
    """A result with some fields changed."""
    return msgspec.structs.replace(result, **changes)


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


@dataclass(kw_only=True)
class FakeService:
    """What a service makes of jobs; `Responder` puts it on a real Kafka, `FakeTransport` right behind the client."""

    version: str = OLD
    behave: Callable[[Received], list[Answer] | None] | None = None
    """The answers to a job, instead of one good result; None leaves the job unanswered for ever."""
    received: list[Received] = field(default_factory=list)
    keep: bool = True
    compute: bool = True
    _seen: dict[str, int] = field(default_factory=dict)

    def receive(
        self,
        value: bytes,
        headers: Sequence[tuple[str, bytes | None]],
        topic: str,
        partition: int,
        offset: int,
    ) -> Received:
        """Read a job's record."""
        parsed = parse(headers)
        format = format_of(parsed.content_type)
        assert format is not None
        job = decode_job(value, format)
        id = job.id or f"{topic}-{partition}-{offset}"
        self._seen[id] = self._seen.get(id, 0) + 1 if self.keep else 1
        received = Received(job, id, parsed, format, topic, partition, self._seen[id])
        if self.keep:
            self.received.append(received)
        return received

    def answers(self, received: Received) -> list[Answer]:
        """What the service says to a job."""
        return [self.good(received)] if self.behave is None else self.behave(received) or []

    def good(self, received: Received, *, texts: list[str] | None = None, first: int = 0) -> Result:
        """One result with the vectors of `texts`, by default all of the job's."""
        job = received.job
        texts = received.texts if texts is None else texts
        dimensions = job.dimensions or HIDDEN_SIZE
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
            timings=Timings(queue=0.001, compute=0.002, device=0.0005),
            metadata=job.metadata if bytes(job.metadata) else null(received.format),
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
        return Datum(
            index=index,
            embedding=embedding,
            tokens=len(text.split()),
            truncated=False,
            cached=False,
            scale=msgspec.UNSET if scale is None else scale,
        )

    def parts(self, received: Received, each: int) -> list[Result]:
        """The result in parts of `each` inputs."""
        texts = received.texts
        starts = range(0, len(texts), each)
        whole = [self.good(received, texts=texts[start : start + each], first=start) for start in starts]
        return [changed(part, part=n, parts=len(whole)) for n, part in enumerate(whole)]

    @staticmethod
    def failure(received: Received, error: ErrorBody) -> Failure:
        return Failure(
            id=received.id,
            model=received.job.model,
            model_version=None,
            error=error,
            metadata=null(received.format),
        )


def reply_record(received: Received, answer: Answer) -> tuple[bytes, list[Header]]:
    """An answer's value and headers on the wire."""
    headers = [
        *received.headers.echo,
        (names.CONTENT_TYPE, CONTENT_TYPES[received.format].encode()),
        (names.STATUS, b"error" if isinstance(answer, Failure) else b"ok"),
    ]
    return encode(answer, received.format), headers
