"""The consumer of jobs as the poll loop sees it: it reads what is ours, from where the ledger is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from embedq_consumer.group import OffsetLedger, Ownership
from embedq_consumer.intake.jobs_consumer import JobsConsumer, PolledRecords
from embedq_shared.kafka import TopicPartition, position

POLL_MS: Final = 200
"""The usual wait for records. It bounds how late the loop's heartbeat comes; whatever matters interrupts it."""


class Changes:
    """Lets coroutines wait for conditions of what the intake owns, and wakes those whose condition has come true.

    Whoever changes something calls `notify` after it. Conditions are checked again by the coroutine that wakes, which
    may run after the next change.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._ending: tuple[asyncio.Timeout, Callable[[], bool]] | None = None

    def notify(self) -> None:
        """Something has changed."""
        for future, is_true in self._waiting.items():
            if not future.done() and is_true():
                future.set_result(None)
        self._end_if_due()

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Return once the condition holds."""
        while not is_true():
            future = asyncio.get_running_loop().create_future()
            self._waiting[future] = is_true
            try:
                await future
            finally:
                del self._waiting[future]

    @contextmanager
    def ending(self, limit: asyncio.Timeout, is_true: Callable[[], bool]) -> Iterator[None]:
        """End `limit` once the condition holds. One at a time: a task less for each poll than `until` would take."""
        self._ending = limit, is_true
        self._end_if_due()
        try:
            yield
        finally:
            self._ending = None

    def _end_if_due(self) -> None:
        if self._ending is not None and self._ending[1]():
            (limit, _), self._ending = self._ending, None
            limit.reschedule(asyncio.get_running_loop().time())


class Reading:
    """What the client reads now. Only the poll loop calls it, so none of it happens during a poll.

    Partitions come and go at any time, in the task of the group's membership, and a poll may be under way. So what a
    poll gave counts only for partitions that are read still, in the epoch in which the client was told to.

    Invariants:
        - A partition that comes is read from where the ledger is, and so are all others: the client forgets their
          positions with each change.
        - Where the client's position has left the ledger's, since a poll's records were not taken, everything is read
          anew before the next poll.
    """

    def __init__(
        self,
        consumer: JobsConsumer,
        ledger: OffsetLedger,
        ownership: Ownership,
        changes: Changes,
        interrupted: Callable[[], bool],
    ) -> None:
        self._consumer = consumer
        self._ledger = ledger
        self._ownership = ownership
        self._changes = changes
        self._interrupted = interrupted
        self._epochs: dict[TopicPartition, int | None] = {}

    @property
    def partitions(self) -> list[TopicPartition]:
        """Those that may give records."""
        return [partition for partition in self._epochs if self.is_read(partition)]

    def is_read(self, partition: TopicPartition) -> bool:
        """Whether what the client hands out of it is what the ledger expects next."""
        return (
            partition in self._epochs
            and self._ownership.stage(partition) == "reading"
            and self._ledger.epoch(partition) == self._epochs[partition]
        )

    def follow(self) -> None:
        """Read what is ours to read."""
        wanted = {partition: self._ledger.epoch(partition) for partition in self._ownership.reading}
        if wanted == self._epochs:
            return
        self._consumer.assign(sorted(wanted))
        for partition in wanted:
            if (offset := self._ledger.position(partition)) is not None:
                self._consumer.seek(partition, offset)
        self._epochs = wanted

    def start_over(self) -> None:
        """Something that the client handed out was not taken."""
        self._epochs = {}

    async def poll(
        self, partitions: Sequence[TopicPartition], *, limit: int, timeout_ms: int
    ) -> PolledRecords:
        """One poll. An interruption ends it early: nothing is lost, since records leave the client only when it returns."""
        end = asyncio.timeout(None)
        try:
            async with end:
                with self._changes.ending(end, self._interrupted):
                    return await self._consumer.getmany(*partitions, timeout_ms=timeout_ms, max_records=limit)
        except TimeoutError:
            if not end.expired():
                raise
            return {}

    async def rest(self) -> None:
        """Nothing may give records: wait until something may, or for the usual length of a poll."""
        try:
            async with asyncio.timeout(POLL_MS / 1000):
                await self._changes.until(self._interrupted)
        except TimeoutError:
            pass

    async def step_over_gaps(self) -> None:
        """After the last record there may be transaction markers and compacted holes; the position is past them.

        Right after a poll that gave nothing, and at no other time: else the position may be past records that the ledger
        does not know.
        """
        for partition in self.partitions:
            epoch = self._ledger.epoch(partition)
            offset = await position(self._consumer, partition)
            if offset is not None and self.is_read(partition) and epoch == self._ledger.epoch(partition):
                self._ledger.advance(partition, offset)

    def lag(self) -> dict[TopicPartition, int]:
        """Records between the committed offset and the end, of each partition where both are known.

        Where none was ever committed, everything that is not finished counts: so a retry topic's first records show while
        they wait.
        """
        found = {}
        for partition in self.partitions:
            end, done = self._consumer.highwater(partition), self._ledger.committed(partition)
            if done is None:
                done = self._ledger.safe(partition)
            if end is not None and done is not None:
                found[partition] = max(0, end - done)
        return found
