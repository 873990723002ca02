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
    """Encoded replies for these vectors, float32 (rows, dimensions), as the jobs of `sizes` rows one after the other ask for them."""

    def __init__(self, vectors: npt.NDArray[np.float32], sizes: Iterable[int]) -> None:
        self._vectors = vectors
        self._made: list[bytes] = []
        self._sizes: list[int] = []
        start = 0
        for size in sizes:
            self._made.append(self._reply(start, size))
            self._sizes.append(size)
            start += size
        self.probe = self._reply(0, 1)

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

    def of(self, number: int, size: int) -> bytes:
        """The reply to job `number`, of so many rows.

        Raises:
            RuntimeError: its rows are others than were made ready.
        """
        if self._sizes[number] != size:
            raise RuntimeError(f"job {number} has {size} rows, {self._sizes[number]} were made ready")
        return self._made[number]


class _Ready(FakeTransport):
    replies: Replies
    probes: int
    """Jobs of one row that come before all others: a run asks which model answers."""
    taken = 0

    def send(self, job: PendingJob) -> None:
        job.acknowledged = True
        if self.probes:
            self.probes -= 1
            value = self.replies.probe
        else:
            value = self.replies.of(self.taken, job.count)
            self.taken += 1
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
