"""A client whose jobs are answered at once with replies that were encoded before, so that what is measured is the client, all of it but Kafka.

A service in the same process would take Python's lock from what is measured. Jobs are those of consecutive rows: the first one asks
for the first rows, and so on; whoever measures looks at what came out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final
from unittest import mock

import numpy as np
import numpy.typing as npt

import embedq_sdk.client
from embedq_batch import RunOptions
from embedq_batch.content.rows import BATCH_ROWS
from embedq_sdk import EmbedClient
from embedq_sdk.transport import PendingJob
from embedq_shared import topics as names
from embedq_shared.codec import encode, null
from embedq_shared.messages import Datum, Result, Timings, Usage
from tests.helpers.fake_service import OLD
from tests.helpers.fake_transport import FakeTransport, Record

_HEADERS: Final = [(names.CONTENT_TYPE, names.MSGPACK.encode()), (names.STATUS, b"ok")]


class Replies:
    """Encoded replies for these vectors, float32 (rows, dimensions), to jobs of `sizes` consecutive rows."""

    def __init__(self, vectors: npt.NDArray[np.float32], sizes: Iterable[int]) -> None:
        self._vectors = vectors
        self._made: dict[tuple[int, int], bytes] = {}
        self.late = 0
        """Rows whose reply had to be encoded when it was asked for, since they came in another job."""
        start = 0
        for size in sizes:
            self._made[start, size] = self._reply(start, size)
            start += size

    def _reply(self, start: int, size: int) -> bytes:
        return encode(
            Result(
                id=f"{start:032x}",
                model="default",
                model_version=OLD,
                dimensions=self._vectors.shape[1],
                dtype="float32",
                data=[
                    Datum(index=n, embedding=vector.tobytes(), tokens=1, truncated=False, cached=True)
                    for n, vector in enumerate(self._vectors[start : start + size])
                ],
                usage=Usage(size, size),
                timings=Timings(),
                metadata=null("msgpack"),
            ),
            "msgpack",
        )

    def of(self, start: int, size: int) -> bytes:
        """The reply to the job of so many rows from this one on."""
        made = self._made.get((start, size))
        if made is None:
            self.late += size
            made = self._reply(start, size)
        return made


class _Ready(FakeTransport):
    replies: Replies
    probes: int
    """Jobs of one row that come before all others: a run asks which model answers."""
    taken = 0

    def send(self, job: PendingJob) -> None:
        job.acknowledged = True
        value = self.replies.of(self.taken, job.count)
        if self.probes:
            self.probes -= 1
        else:
            self.taken += job.count
        assert self.deliver is not None
        record = Record(value, [(names.CORRELATION[0], job.correlation), *_HEADERS])
        asyncio.get_running_loop().call_soon(self.deliver, record)


def job_sizes(rows: int, batch: int = BATCH_ROWS) -> Iterator[int]:
    """Rows of each job of a run over a table: rows of one of its batches come with no others."""
    most = RunOptions().job_texts
    for start in range(0, rows, batch):
        end = min(start + batch, rows)
        yield from (min(most, end - first) for first in range(start, end, most))


@asynccontextmanager
async def ready_client(replies: Replies, *, probes: int) -> AsyncIterator[EmbedClient]:
    """A client that is given these replies."""

    def transport(*arguments: Any, **named: Any) -> _Ready:
        made = _Ready(*arguments, **named)
        made.replies, made.probes = replies, probes
        return made

    with mock.patch.object(embedq_sdk.client, "KafkaTransport", transport):
        client = EmbedClient("ready:9092")
    async with client:
        yield client
