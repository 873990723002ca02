"""Between the poll and the turns of clients: asks `Suspects` what may run, commits its marks, and lets records through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import structlog

from embedq_consumer.intake.records import Death, Record
from embedq_consumer.quarantine.custody import Custody, decode, has_died, take_over
from embedq_consumer.quarantine.suspects import Polled, Suspects
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import KafkaError, TopicPartition

log = structlog.get_logger()

_LOOK_S: Final = 0.5
"""Longest time until partitions that were given up are noticed, and until one is committed that had no records."""
_CLAIM_S: Final = 10.0
_PAUSE_S: Final = 0.1
"""After the brokers did not answer, or while the group has no assignment."""


class Commits(Protocol):
    """The group's commits, and which partitions are this replica's."""

    def is_current(self, partition: TopicPartition, epoch: int) -> bool:
        """Whether the partition is still assigned as it was in that epoch."""

    async def write(self, partitions: Collection[TopicPartition]) -> bool:
        """Commit these now, with what `Suspects.metadata` says of them. True if the brokers took it."""

    async def read(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, tuple[int | None, str]]:
        """The stored offset of each partition and its metadata; raises KafkaError."""

    async def ends(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions end; raises KafkaError."""


class Queue(Protocol):
    """Where records wait until clients' turns have them started: the intake."""

    def park(self, records: Iterable[Record]) -> None:
        """Start these in their turn."""

    def start(self, record: Record) -> None:
        """This one is started out of turn."""

    def start_more(self) -> None:
        """Start what may be started."""

    @property
    def waits(self) -> bool:
        """Whether records wait for their turn."""

    async def running(self) -> None:
        """Wait while nothing may be started: a model is swapped, or the process stops."""

    def finish(self, *records: Record) -> None:
        """These need no more work here: from then on their offsets may be committed."""


class Work(Protocol):
    """What answers records. The methods return at once."""

    def take(self, records: Iterable[Record]) -> None:
        """Start on these, each when it is drawn."""

    def take_unreadable(self, record: Record, why: str) -> None:
        """Reject a record, or a batch of them, that could not be read."""

    def condemn(self, record: Record, deaths: Sequence[Death]) -> None:
        """Reject a record that killed processes, without looking at its value."""


class Quarantine:
    """Lets records through as `Suspects` says: suspects to the work, out of turn, and all others to the queue.

    It stands before the turns, since it needs the records of a partition in the order of their offsets.
    """

    def __init__(self, suspects: Suspects, commits: Commits, queue: Queue, metrics: Metrics) -> None:
        self._suspects = suspects
        self._commits = commits
        self._queue = queue
        self._metrics = metrics
        self._lent = False
        self._work: Work | None = None
        self._changed = asyncio.Event()

    # -- the intake's and the deliverer's side --------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether records may be started in their turn."""
        return self._lent or self._suspects.may_start

    def take(self, records: Sequence[Record]) -> None:
        """Records of a poll."""
        if self._suspects.all_free(records):
            self._queue.park(records)
        else:
            self._take(map(Polled, records))

    def take_unreadable(self, record: Record, why: str) -> None:
        """A record, or a batch of them, that could not be read."""
        self._take([Polled(record, why)])

    def start(self, records: Iterable[Record]) -> None:
        """Records whose turn it is, each started when it is drawn."""
        self._work_on(records)

    def finish(self, *records: Record) -> None:
        """Records that were started are answered."""
        self._queue.finish(*records)
        for record in records:
            if self._suspects.finish(record.ticket):
                self._changed.set()

    def _take(self, polled: Iterable[Polled]) -> None:
        at_once, held = self._suspects.take(polled)
        self._let_through(at_once)
        if held:
            self._changed.set()

    # -- the loop -------------------------------------------------------------------------------------------------------

    def hand_to(self, work: Work) -> None:
        """Where records go. Before the first poll."""
        self._work = work

    async def run(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Claim partitions and run suspects, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            while await self._step(clock()):
                pass
            self._metrics.suspected_partitions.set(self._suspects.suspected)

    async def _step(self, now: float) -> bool:
        """Take over what is new, and do what is next. False if there is nothing to do but to wait."""
        self._drop_stale()
        await self._claim()
        await self._queue.running()
        step = self._suspects.next(now, waiting=self._queue.waits)
        if step is None:
            self._start_more()
            return False
        await self._mark(step.marks)
        await self._queue.running()  # from here on nothing waits
        self._let_through(self._current(step.run[: step.free]))
        self._run(self._current(step.run[step.free :]))
        for record, deaths in step.condemned:
            self._condemn(record, deaths)
        self._lent = step.others
        self._start_more()
        self._lent = False
        return True

    def _start_more(self) -> None:
        if self.is_open:
            self._queue.start_more()

    async def _claim(self) -> None:
        """Read what the commits say of partitions that are new here, and take them over."""
        epochs = self._suspects.unclaimed()
        if not epochs:
            return
        try:
            async with asyncio.timeout(_CLAIM_S):
                stored = await self._commits.read(epochs)
                before = {partition: decode(metadata) for partition, (_, metadata) in stored.items()}
                dead = [
                    partition for partition in before if has_died(before[partition], self._suspects.claimant)
                ]
                ends = await self._commits.ends(dead) if dead else {}
        except (KafkaError, TimeoutError) as error:
            log.warning("claim_failed", reason=type(error).__name__)
            await asyncio.sleep(_PAUSE_S)
            self._changed.set()
            return
        for partition, epoch in epochs.items():
            committed = stored[partition][0] or 0
            custody = take_over(
                before[partition],
                committed,
                ends.get(partition, 0),
                claimant=self._suspects.claimant,
                now_ms=int(time.time() * 1000),
            )
            if partition in dead:
                self._metrics.deaths.inc()
                _log_death(partition, committed, before[partition], custody)
            self._suspects.claim(partition, epoch, custody)

    async def _mark(self, marks: Mapping[TopicPartition, Custody]) -> None:
        """Commit them, as often as it takes; those of partitions that were given up meanwhile do not matter any more."""
        while pending := self._suspects.pending(marks):
            if await self._commits.write(pending):
                self._suspects.committed(marks)
                return
            await asyncio.sleep(_PAUSE_S)
            self._drop_stale()

    def _drop_stale(self) -> None:
        for polled in self._suspects.drop_stale(self._commits.is_current):
            self._queue.finish(polled.record)

    def _current(self, polled: Sequence[Polled]) -> list[Polled]:
        """Of records that waited here, those of partitions that are still ours; the others are let go."""
        for each in polled:
            if not self._is_current(each.record):
                self.finish(each.record)
        return [each for each in polled if self._is_current(each.record)]

    def _let_through(self, polled: Sequence[Polled]) -> None:
        """They wait for their turn; those that cannot be read need none."""
        self._reject([each for each in polled if each.unread is not None])
        if records := [each.record for each in polled if each.unread is None]:
            self._queue.park(records)

    def _run(self, polled: Sequence[Polled]) -> None:
        """Suspects, out of turn."""
        self._reject([each for each in polled if each.unread is not None])
        if records := [each.record for each in polled if each.unread is None]:
            for record in records:
                self._queue.start(record)
            self._work_on(records)

    def _work_on(self, records: Iterable[Record]) -> None:
        self._worker.take(self._noted(records))

    def _noted(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            self._suspects.started(record.ticket)
            yield record

    def _reject(self, polled: Sequence[Polled]) -> None:
        for each in polled:
            self._queue.start(each.record)
            self._suspects.started(each.record.ticket)
            self._worker.take_unreadable(each.record, each.unread or "")

    def _condemn(self, record: Record, deaths: Sequence[Death]) -> None:
        if not self._is_current(record):
            self.finish(record)
            return
        log.error("record_condemned", record=record.name, deaths=len(deaths))
        self._queue.start(record)
        self._suspects.started(record.ticket)
        self._worker.condemn(record, deaths)

    @property
    def _worker(self) -> Work:
        if self._work is None:
            raise RuntimeError("records came before there was anybody to take them. This is a bug.")
        return self._work

    def _is_current(self, record: Record) -> bool:
        return self._commits.is_current(record.ticket.partition, record.ticket.epoch)


def _log_death(partition: TopicPartition, committed: int, before: Custody, after: Custody) -> None:
    log.warning(
        "process_died",
        topic=partition.topic,
        partition=partition.partition,
        replica=before.replica,
        offset=committed,
        deaths=len(after.deaths),
        suspects="none" if not after.has_suspects(committed) else _treatment(after, committed),
    )


def _treatment(custody: Custody, committed: int) -> str:
    """How the suspects will run."""
    if custody.condemned_until > committed:
        return "condemned"
    return "alone" if custody.alone_until > committed else "in groups"
