"""The one loop that touches the jobs consumer: it polls, begins records in the ledger, and follows rebalances.

What it may do is decided by `PollState` and `PollPlanner`; offsets are committed by `OffsetCommitter`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog

from embedq_consumer.fairness import Cost, Limits, Parking, Starter
from embedq_consumer.intake.flow_control import InFlightLimits, PollPlanner
from embedq_consumer.intake.jobs_consumer import IntakeOptions, JobsConsumer
from embedq_consumer.intake.offset_committer import OffsetCommitter
from embedq_consumer.intake.offsets import OffsetLedger
from embedq_consumer.intake.poll_state import PollState
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.unreadable import POLL_MS, CarefulReader, PolledRecords
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.headers import client_of
from embedq_shared.kafka import UNREADABLE, ConsumerRebalanceListener, TopicPartition, position, stop_client
from embedq_shared.topics import LANES, Lane, Topics

log = structlog.get_logger()

_CLOSE_S: Final = 10.0
"""Leaving the group takes milliseconds, unless the brokers are gone."""
_DRAIN_S: Final = 30.0
"""Longest wait of a revocation for what is in flight. It leaves half of the rebalance timeout for everything else."""

NOWHERE: Final = TopicPartition("", 0)
"""Dummy partition that is polled while no real one may give records: the poll keeps the group membership alive, and the
client keeps what it has fetched."""

Take = Callable[[Iterable[Record]], None]
"""Draws records and starts each before it draws the next: `Intake.weigh` says meanwhile what it takes."""
Unreadable = Callable[[Record, Exception], None]


class Intake(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type information
    """Reads jobs and keeps their offsets.

    Invariants:
        - A record is begun in the ledger in the same step in which it is polled, before anything can fail.
        - No poll runs between a revocation and the next assignment: so every record belongs to the current epoch.
        - Polling never stops for longer than that. A partition that is full or held is not among those polled.
        - What is polled waits in `Parking` until it is started; nothing starts during a hold, a rebalance or a stop.
        - A crash repeats at most `max_uncommitted` records of a partition: what was never started was never answered.
    """

    def __init__(
        self,
        consumer: JobsConsumer,
        options: IntakeOptions,
        *,
        topics: Topics,
        metrics: Metrics,
        beat: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self._topics = topics
        self._metrics = metrics
        self._beat = beat
        self._drain_s = min(_DRAIN_S, options.rebalance_timeout_ms / 1000 / 2)
        self._lane_of: dict[str, Lane] = dict(zip(topics.lanes, LANES, strict=True))
        self._state = PollState()
        self._changes = _Changes()
        self._ledger = OffsetLedger()
        self._limits = InFlightLimits(
            max_jobs=options.max_in_flight_jobs, max_bytes=options.max_in_flight_bytes
        )
        self._planner = PollPlanner(
            self._ledger,
            self._limits,
            self._lane_of,
            max_poll_records=options.max_poll_records,
        )
        self._parking = Parking[Record](
            Limits(
                texts=options.max_started_texts,
                record_bytes=options.max_in_flight_bytes,
                result_bytes=options.max_pending_bytes,
                uncommitted=options.max_uncommitted,
            ),
            self._ledger.committed,
        )
        self._starter = Starter(self._parking, lambda: self._state.phase == "running")
        self._committer = OffsetCommitter(
            consumer,
            self._ledger,
            metrics,
            interval_s=options.commit_interval_s,
            max_uncommitted=options.max_uncommitted,
        )
        self._careful = CarefulReader(consumer, self._ledger, self._poll, beat)
        self._broken: BaseException | None = None
        self.joined = asyncio.Event()
        """Set once the group has given this replica its partitions, even if there are none."""

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and ask to join the group.

        Raises:
            KafkaError: no broker answers.
        """
        await self._consumer.start()
        self._consumer.subscribe(list(self._topics.lanes), listener=self)

    async def run(self, take: Take, unreadable: Unreadable) -> None:
        """Poll until `stop`. `take` gets records to start; `unreadable` a record that the client cannot hand out."""
        self._starter.begin(take)
        while (turn := self._state.next_turn()) != "end":
            self._changes.notify()
            self._beat()
            self._raise_if_broken()
            if turn == "wait":
                await self._changes.until(lambda: self._state.due != "wait")
            else:
                await self._read(unreadable, held=turn == "poll_nothing")
        self._changes.notify()

    async def stop(self, within: float) -> bool:
        """Take nothing more, wait for what is in flight, commit. False if something was left, uncommitted."""
        self._state.stop()
        self._changes.notify()
        try:
            async with asyncio.timeout(within):
                await self._changes.until(lambda: self._state.ended)
                self._drop(self._ledger.partitions)
                await self._idle()
        except TimeoutError:
            return False
        finally:
            if self._state.may_commit:
                await self._committer.commit()
        return True

    async def close(self) -> None:
        """Leave the group."""
        if problem := await stop_client(self._consumer, _CLOSE_S):
            log.warning("group_left_by_timeout", reason=problem)

    @asynccontextmanager
    async def held(self, within: float) -> AsyncIterator[None]:
        """Nothing in flight, and nothing new, inside; the group membership goes on.

        Raises:
            TimeoutError: what is in flight did not finish within `within` seconds; nothing is held then.
        """
        self._state.hold()
        self._changes.notify()
        try:
            async with asyncio.timeout(within):
                await self._changes.until(lambda: self._state.hold_reached)
                await self._idle()
            yield
        finally:
            self._state.release()
            self._changes.notify()
            self._starter.soon()

    def finish(self, record: Record) -> None:
        """A record is answered."""
        self._ledger.finish(record.ticket)
        self._committer.note_finished()
        self._parking.finish(record)
        reopened = self._limits.remove(record.lane, record.size)
        if reopened:
            self._state.interrupt()
        if reopened or self._parking.idle:
            self._changes.notify()
        self._starter.soon()

    def weigh(self, record: Record, cost: Cost) -> None:
        """A started record turned out to be a job that takes this."""
        self._parking.weigh(record, cost)

    async def commit_forever(self) -> None:
        """Commit what is safe, again and again, and measure the lag."""
        await self._committer.run(self._state, self._starter.soon)  # records may have waited for a commit

    def is_full(self, lane: Lane) -> bool:
        """Whether the lane takes no records now, since as much of it is in flight as may be."""
        return self._limits.is_full(lane)

    # -- polling ------------------------------------------------------------------------------------------------------

    async def _read(self, unreadable: Unreadable, *, held: bool) -> None:
        """One turn: a poll of the partitions that are due."""
        plan = self._planner.plan(held=held)
        self._show_limits()
        try:
            polled: PolledRecords = {}
            if plan.urgent:
                polled = await self._poll(plan.urgent, limit=plan.limit, timeout_ms=0)
            only_urgent = bool(polled)
            if not polled:
                timeout_ms = POLL_MS if plan.complete else 0
                polled = await self._poll(
                    plan.partitions or [NOWHERE], limit=plan.limit, timeout_ms=timeout_ms
                )
        except UNREADABLE as error:
            log.warning("poll_failed", reason=type(error).__name__)
            await self._read_carefully(unreadable)
            return
        self._planner.note(plan, polled, only_urgent=only_urgent)
        if self._begin(polled):
            self._starter.now()
        elif plan.complete:
            await self._step_over_gaps()

    async def _poll(
        self, partitions: Sequence[TopicPartition], *, limit: int, timeout_ms: int
    ) -> PolledRecords:
        """One poll. An interruption ends it early: nothing is lost, since records leave the client only when it returns."""
        poll = asyncio.ensure_future(
            self._consumer.getmany(*partitions, timeout_ms=timeout_ms, max_records=limit)
        )
        interrupted = asyncio.ensure_future(self._changes.until(lambda: self._state.interrupted))
        try:
            await asyncio.wait({poll, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            interrupted.cancel()
            if not poll.done():
                poll.cancel()
        await asyncio.wait({poll})
        return {} if poll.cancelled() else poll.result()

    def _begin(self, polled: PolledRecords) -> list[Record]:
        """Begin these records in the ledger, and park them."""
        now = time.monotonic()
        records = []
        for partition, found in polled.items():
            lane = self._lane_of[partition.topic]
            for raw in found:
                record = Record(
                    ticket=self._ledger.begin(partition, raw.offset),
                    lane=lane,
                    key=raw.key,
                    value=raw.value,
                    headers=raw.headers,
                    timestamp_ms=raw.timestamp,
                    timestamp_type=raw.timestamp_type,
                    polled_at=now,
                    client=client_of(raw.headers),
                )
                self._limits.add(lane, record.size)
                records.append(record)
            self._metrics.records.labels(lane).inc(len(found))
        self._parking.put(records)
        return records

    def _drop(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget what waits of these: it is read again, here or by another replica."""
        for record in self._parking.drop(frozenset(partitions)):
            self._limits.remove(record.lane, record.size)

    async def _read_carefully(self, unreadable: Unreadable) -> None:
        """After a failed poll: hand over what can be read, one by one, and step over what cannot."""

        def hand_over(found: PolledRecords) -> bool:
            self._begin(found)
            self._starter.now()
            return self._state.due != "end" and all(map(self._planner.may_read_on, found))

        def stepped_over(partition: TopicPartition, offset: int, error: Exception) -> None:
            record = Record.unread(
                self._ledger.begin(partition, offset), self._lane_of[partition.topic], time.monotonic()
            )
            self._limits.add(record.lane, record.size)
            self._parking.start(record)
            unreadable(record, error)

        await self._careful.read(hand_over, stepped_over)

    async def _step_over_gaps(self) -> None:
        """After the last record there may be transaction markers and compacted holes; the position is past them.

        Only the poll loop may do this, between polls: at any other time the position may be past records that a poll
        is about to return.
        """
        for partition in self._ledger.partitions:
            offset = await position(self._consumer, partition)
            if offset is not None:
                self._ledger.advance(partition, offset)

    def _show_limits(self) -> None:
        for lane in LANES:
            self._metrics.paused.labels(lane).set(self._limits.is_full(lane))
            self._metrics.in_flight_jobs.labels(lane).set(self._limits.jobs(lane))
            self._metrics.in_flight_bytes.labels(lane).set(self._limits.bytes(lane))
            self._metrics.parked_jobs.labels(lane).set(self._parking.parked(lane))

    async def _idle(self) -> None:
        """Wait until nothing that was started is unanswered."""
        await self._changes.until(lambda: self._parking.idle)

    # -- rebalance ----------------------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Before a rebalance: no more polls, finish what is in flight as far as time allows, commit."""
        try:
            self._state.revoke()
            self._changes.notify()
            await self._changes.until(lambda: self._state.parked)
            self._drop(self._ledger.partitions)
            if self._ledger.partitions:
                await self._drain()
                await self._committer.commit()
        except Exception as error:  # noqa: BLE001  # the client would log it and go on; the poll loop raises it
            self._broken = error
        self._state.give_up()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_s):
                await self._idle()
        except TimeoutError:
            pass  # what is unfinished is not committed, so that the partition's next owner repeats it

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """After it: a new epoch, and polls again."""
        before = self._ledger.partitions
        self._ledger.assign(assigned)
        self._committer.forget(before - self._ledger.partitions)
        self._metrics.rebalances.inc()
        self._metrics.assigned.set(len(self._ledger.partitions))
        log.info("partitions_assigned", count=len(self._ledger.partitions), epoch=self._ledger.epoch)
        self._state.assign()
        self._changes.notify()
        self.joined.set()

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken


class _Changes:
    """Lets coroutines wait for conditions of what the intake owns, and wakes those whose condition has come true.

    Whoever changes something calls `notify` after it. Conditions are checked again by the coroutine that wakes, which
    may run after the next change.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    def notify(self) -> None:
        """Something has changed."""
        for future, is_true in self._waiting.items():
            if not future.done() and is_true():
                future.set_result(None)

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Return once the condition holds."""
        while not is_true():
            future = asyncio.get_running_loop().create_future()
            self._waiting[future] = is_true
            try:
                await future
            finally:
                del self._waiting[future]
