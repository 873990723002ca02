"""Between the poll loop and the pipeline: asks `Suspects` what may run, commits its marks, and hands records over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


class Work(Protocol):
    """What answers records. The methods return at once."""

    def take(self, records: Sequence[Record]) -> None:
        """Start on these."""

    def take_unreadable(self, record: Record, why: str) -> None:
        """Reject a record, or a batch of them, that could not be read."""

    def condemn(self, record: Record, deaths: Sequence[Death]) -> None:
        """Reject a record that killed processes, without looking at its value."""


class Quarantine:
    """Lets records through to the work as `Suspects` says."""

    def __init__(
        self,
        suspects: Suspects,
        commits: Commits,
        finish: Callable[[Record], None],
        metrics: Metrics,
    ) -> None:
        """`finish` says that a record needs no more work here: from then on its offset may be committed."""
        self._suspects = suspects
        self._commits = commits
        self._finish = finish
        self._metrics = metrics
        self._work: Work | None = None
        self._changed = asyncio.Event()

    # -- the poll loop's and the deliverer's side -----------------------------------------------------------------------

    def take(self, records: Sequence[Record]) -> None:
        """Records of a poll."""
        self._take(map(Polled, records))

    def take_unreadable(self, record: Record, why: str) -> None:
        """A record, or a batch of them, that could not be read."""
        self._take([Polled(record, why)])

    def finish(self, record: Record) -> None:
        """A record that was handed over is answered."""
        self._finish(record)
        if self._suspects.finish(record.ticket):
            self._changed.set()

    def _take(self, polled: Iterable[Polled]) -> None:
        at_once, held = self._suspects.take(polled)
        self._start(at_once)
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
        step = self._suspects.next(now)
        if step is None:
            return False
        await self._mark(step.marks)
        self._hand_over(step.run)
        for record, deaths in step.condemned:
            self._condemn(record, deaths)
        return True

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
            self._finish(polled.record)

    def _hand_over(self, polled: Sequence[Polled]) -> None:
        """Start on records that waited, but for those of partitions that are not ours any more."""
        for each in polled:
            if not self._is_current(each.record):
                self.finish(each.record)
        self._start([each for each in polled if self._is_current(each.record)])

    def _start(self, polled: Sequence[Polled]) -> None:
        if self._work is None:
            raise RuntimeError("records came before there was anybody to take them. This is a bug.")
        for each in polled:
            if each.unread is not None:
                self._work.take_unreadable(each.record, each.unread)
        if records := [each.record for each in polled if each.unread is None]:
            self._work.take(records)

    def _condemn(self, record: Record, deaths: Sequence[Death]) -> None:
        if self._work is None or not self._is_current(record):
            self.finish(record)
            return
        log.error("record_condemned", record=record.name, deaths=len(deaths))
        self._work.condemn(record, deaths)

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
