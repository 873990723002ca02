"""The one loop that touches the jobs consumer: it polls, begins records in the ledger, commits, rebalances."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    UnsupportedCodecError,
)

from embedq_consumer.ending import ended
from embedq_consumer.intake.flow_control import InFlightLimits
from embedq_consumer.intake.offsets import OffsetLedger
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.rotation import PartitionRotation
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import LANES, Lane, Topics

log = structlog.get_logger()

_POLL_MS: Final = 200
_COMMIT_S: Final = 10.0
_POSITION_S: Final = 1.0
_CLOSE_S: Final = 10.0
_PATIENCE_MS: Final = 5000
"""The longest wait for one partition's record behind a poll that failed."""
_COMMITS_A_SPAN: Final = 4
"""A commit comes early once one part in so many of what may stay uncommitted is finished."""
_CAREFUL_RECORDS: Final = 2000
"""Records read one by one behind a poll that failed, before polls are whole again."""

_NOWHERE: Final = TopicPartition("", 0)
"""Polled while no partition may give records: the group hears of us, and the client keeps what it has fetched."""

UNREADABLE: Final = (UnicodeDecodeError, CorruptRecordException, UnsupportedCodecError)
"""What the client raises for a record that it cannot hand out, poll after poll, until somebody steps over it."""

Take = Callable[[Sequence[Record]], None]
Unreadable = Callable[[Record, Exception], None]


class Intake(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type information
    """Reads jobs and keeps their offsets.

    Invariants:
        - A record is begun in the ledger in the same step in which it is polled, before anything can fail.
        - No poll runs between a revocation and the assignment behind it: so every record belongs to the current epoch.
        - Polling never stops for longer than that. A partition that is full or held is not among those polled.
        - Commits come from the ledger alone, so none passes an unfinished record.
        - A crash repeats at most `max_uncommitted` records of a partition, and one poll.
    """

    def __init__(
        self,
        options: dict[str, Any],
        *,
        topics: Topics,
        group: str,
        flow: InFlightLimits,
        metrics: Metrics,
        beat: Callable[[], None],
        max_poll_records: int,
        session_timeout_ms: int,
        rebalance_timeout_ms: int,
        commit_interval_s: float,
        max_uncommitted: int,
    ) -> None:
        self._topics = topics
        self._flow = flow
        self._metrics = metrics
        self._beat = beat
        self._max_poll_records = max_poll_records
        self._drain_s = min(30.0, rebalance_timeout_ms / 1000 / 2)
        self._commit_interval_s = commit_interval_s
        self._max_uncommitted = max_uncommitted
        self._await_commit = False  # a partition takes no more records before a commit
        self._finished = 0  # since the last commit
        self._commit_soon = asyncio.Event()
        self._ledger = OffsetLedger()
        self._turns = PartitionRotation()
        self._lane_of: dict[str, Lane] = dict(zip(topics.lanes, LANES, strict=True))
        self._held = 0
        self._stopping = False
        self._patience_ms = _POLL_MS
        self._wake = asyncio.Event()
        self._open = asyncio.Event()  # polls may run
        self._open.set()
        self._parked = asyncio.Event()  # no poll runs
        self._parked.set()
        self._ended = asyncio.Event()  # the poll loop is over
        self._holding = asyncio.Event()  # no partition gives records, and it stays so
        self._progress = asyncio.Event()  # something finished
        self._committing = asyncio.Lock()  # one commit at a time, so that none is overtaken by a newer one
        self._broken: BaseException | None = None
        self.joined = asyncio.Event()
        """Set once the group has given this replica its partitions, be they none."""
        # Every setting whose default is a trap is written out.
        self._consumer = AIOKafkaConsumer(
            **options,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            # Not the sticky one: it may give one replica a whole lane, and nothing is kept over a rebalance anyway.
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
            session_timeout_ms=session_timeout_ms,
            heartbeat_interval_ms=min(3000, session_timeout_ms // 3),
            rebalance_timeout_ms=rebalance_timeout_ms,
            request_timeout_ms=rebalance_timeout_ms + 15_000,
            max_poll_interval_ms=600_000,
            fetch_max_wait_ms=50,
            fetch_max_bytes=32 * 1024 * 1024,
            max_partition_fetch_bytes=4 * 1024 * 1024,
            metadata_max_age_ms=60_000,
        )

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and ask to join the group.

        Raises:
            KafkaError: no broker answers.
        """
        await self._consumer.start()
        self._consumer.subscribe(list(self._topics.lanes), listener=self)

    async def run(self, take: Take, unreadable: Unreadable) -> None:
        """Poll until `stop`. `take` gets each poll's records; `unreadable` a record that the client cannot hand out."""
        while not self._stopping:
            self._beat()
            self._raise_if_broken()
            self._wake.clear()
            if not self._open.is_set():
                self._parked.set()
                await self._open.wait()
                self._parked.clear()
                continue  # `stop` may have come meanwhile
            self._parked.clear()
            partitions = self._to_poll()
            turn = self._turns.next(partitions)
            everyone = len(turn) == len(partitions)
            limit = max(1, min(self._max_poll_records, self._flow.room()))
            try:
                # Bulk records that are there already must not stand before interactive ones that came since.
                urgent = [] if everyone else [p for p in turn if self._lane_of[p.topic] == "interactive"]
                polled = await self._poll(*urgent, limit=limit, timeout_ms=0) if urgent else {}
                if not polled:
                    urgent = []
                    polled = await self._poll(
                        *(turn or [_NOWHERE]), limit=limit, timeout_ms=_POLL_MS if everyone else 0
                    )
            except UNREADABLE as error:
                log.warning("poll_failed", reason=type(error).__name__)
                await self._read_carefully(take, unreadable)
                continue
            self._turns.note(polled, limit, drained=not urgent)
            if records := self._begin(polled):
                take(records)
            elif everyone:
                await self._step_over_gaps()
        self._parked.set()
        self._ended.set()

    async def stop(self, within: float) -> bool:
        """Take nothing more, wait for what is in flight, commit. False if something was left, uncommitted."""
        self._stopping = True
        self._wake.set()
        self._open.set()  # the poll loop need not wait for the end of a rebalance to end itself
        try:
            async with asyncio.timeout(within):
                await self._ended.wait()  # a poll that was under way has handed over its records
                await self._idle()
        except TimeoutError:
            return False
        finally:
            await self._commit()
        return True

    async def close(self) -> None:
        """Leave the group."""
        if problem := await ended(self._consumer.stop(), _CLOSE_S):
            log.warning("group_left_by_timeout", reason=problem)

    @asynccontextmanager
    async def held(self, within: float) -> AsyncIterator[None]:
        """Nothing in flight, and nothing new, inside; the group membership goes on.

        Raises:
            TimeoutError: what is in flight did not finish within so many seconds; nothing is held then.
        """
        self._held += 1
        self._wake.set()
        try:
            async with asyncio.timeout(within):
                await self._holding.wait()  # a poll that was under way has handed over its records
                await self._idle()
            yield
        finally:
            self._held -= 1
            self._wake.set()

    def finish(self, record: Record) -> None:
        """A record is answered."""
        self._ledger.finish(record.ticket)
        self._finished += 1
        if self._finished >= max(1, self._max_uncommitted // _COMMITS_A_SPAN):
            self._commit_soon.set()
        if self._flow.release(record.lane, record.size):
            self._wake.set()
        self._progress.set()

    async def commit_forever(self) -> None:
        """Commit what is safe, again and again, and measure the lag.

        Not during a rebalance: a commit that is sent behind it would set back partitions that are somebody else's by
        then, since the broker checks the member's generation and not whose partition it is.
        """
        while True:
            self._commit_soon.clear()
            try:
                async with asyncio.timeout(self._commit_interval_s):
                    await self._commit_soon.wait()
            except TimeoutError:
                pass
            if self._open.is_set():
                await self._commit()
                if self._await_commit:
                    self._wake.set()
            if self._open.is_set():
                self._measure()

    # -- polling --------------------------------------------------------------------------------------------------------

    async def _poll(
        self, *partitions: TopicPartition, limit: int, timeout_ms: int = _POLL_MS
    ) -> Mapping[TopicPartition, list[ConsumerRecord]]:
        """One poll. A wake-up ends it early: nothing is lost, since records leave the client only when it returns.

        It must end early for a rebalance: the client lets no poll return until the new assignment is there, and our
        listener lets none come before the poll has returned.
        """
        poll = asyncio.ensure_future(
            self._consumer.getmany(*partitions, timeout_ms=timeout_ms, max_records=limit)
        )
        wake = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({poll, wake}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wake.cancel()
            if not poll.done():
                poll.cancel()
        await asyncio.wait({poll})
        if poll.cancelled():
            return {}
        found: Mapping[TopicPartition, list[ConsumerRecord]] = poll.result()
        return found

    def _begin(self, polled: Mapping[TopicPartition, list[ConsumerRecord]]) -> list[Record]:
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
                )
                self._flow.take(lane, record.size)
                records.append(record)
            self._metrics.records.labels(lane).inc(len(found))
        return records

    async def _read_carefully(self, take: Take, unreadable: Unreadable) -> None:
        """Find the record that the client cannot hand out, and step over it.

        A failed poll may have swallowed records of other partitions, and their positions have moved: so first back to
        where the ledger is. Then record by record, since what raises stands at the position.
        """
        assigned = sorted(self._ledger.partitions)
        stepped_over = False
        for partition in assigned:
            await self._rewind(partition)
        for partition in assigned:
            for _ in range(_CAREFUL_RECORDS):
                self._beat()
                try:
                    found = await self._poll(partition, limit=1, timeout_ms=self._patience_ms)
                except UNREADABLE as error:
                    offset = await self._position(partition)
                    if offset is not None:
                        self._consumer.seek(partition, offset + 1)
                        unreadable(self._unread(partition, offset), error)
                        stepped_over = True
                    break
                if not found:
                    break  # nothing more, or a wake-up: if the record is still there, the next poll fails again
                take(self._begin(found))
                if self._stopping or self._flow.is_full(self._lane_of[partition.topic]):
                    break  # likewise
        # Found nothing? Then the broker may be too slow for so short a wait.
        self._patience_ms = _POLL_MS if stepped_over else min(2 * self._patience_ms, _PATIENCE_MS)

    def _unread(self, partition: TopicPartition, offset: int) -> Record:
        """A record of which nothing is known but where it is."""
        lane = self._lane_of[partition.topic]
        ticket = self._ledger.begin(partition, offset)
        record = Record(ticket, lane, None, None, (), -1, 0, time.monotonic())
        self._flow.take(lane, record.size)
        return record

    async def _rewind(self, partition: TopicPartition) -> None:
        position = self._ledger.position(partition)
        if position is None:
            position = await self._consumer.committed(partition)
        if position is None:
            await self._consumer.seek_to_beginning(partition)
        else:
            self._consumer.seek(partition, position)

    async def _position(self, partition: TopicPartition) -> int | None:
        """The client's position; None while it has none."""
        try:
            async with asyncio.timeout(_POSITION_S):
                position: int = await self._consumer.position(partition)
        except (TimeoutError, IllegalStateError):
            return None
        return position

    def _to_poll(self) -> list[TopicPartition]:
        """The partitions that may give records.

        The others are left out and not paused: the client throws away what it has fetched of a paused partition, and a
        lane that is full many times a second would fetch its records as often.
        """
        assigned = self._ledger.partitions
        self._await_commit = any(self._repeats_too_much(p) for p in assigned)
        if self._held:
            self._holding.set()
        else:
            self._holding.clear()
        for lane in LANES:
            self._metrics.paused.labels(lane).set(self._flow.is_full(lane))
            self._metrics.in_flight_jobs.labels(lane).set(self._flow.jobs(lane))
            self._metrics.in_flight_bytes.labels(lane).set(self._flow.bytes(lane))
        return [] if self._held else [p for p in assigned if not self._is_full(p)]

    def _is_full(self, partition: TopicPartition) -> bool:
        """Whether no more records of this partition should be taken: its lane is full, or a crash would repeat too many."""
        return self._flow.is_full(self._lane_of[partition.topic]) or self._repeats_too_much(partition)

    def _repeats_too_much(self, partition: TopicPartition) -> bool:
        return self._ledger.repeatable(partition) >= self._max_uncommitted

    # -- offsets --------------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Commit what is safe. A failed commit costs repeated work at most, so it never ends the process."""
        async with self._committing:
            self._finished = 0
            offsets, epoch = self._ledger.committable(), self._ledger.epoch
            if not offsets:
                return
            try:
                async with asyncio.timeout(_COMMIT_S):
                    await self._consumer.commit(offsets)
            except (CommitFailedError, IllegalStateError):
                # The partitions are somebody else's: they repeat the work.
                self._metrics.commits.labels("fenced").inc()
            except (KafkaError, TimeoutError) as error:
                self._metrics.commits.labels("error").inc()
                log.warning("commit_failed", reason=type(error).__name__)
            else:
                self._metrics.commits.labels("ok").inc()
                if epoch == self._ledger.epoch:
                    self._ledger.note_committed(offsets)

    async def _step_over_gaps(self) -> None:
        """Behind the last record there may be transaction markers and compacted holes; the position is past them.

        Only the poll loop may do this, between polls: at any other time the position may be past records that a poll
        is about to return.
        """
        for partition in self._ledger.partitions:
            position = await self._position(partition)
            if position is not None:
                self._ledger.advance(partition, position)

    def _measure(self) -> None:
        for partition in self._ledger.partitions:
            end = self._consumer.highwater(partition)
            done = self._ledger.committed(partition)
            if end is not None and done is not None:
                self._metrics.lag.labels(partition.topic, partition.partition).set(max(0, end - done))

    async def _drain(self, within: float) -> bool:
        """Wait until nothing is in flight; False if that took longer."""
        try:
            async with asyncio.timeout(within):
                await self._idle()
        except TimeoutError:
            return False
        return True

    async def _idle(self) -> None:
        while not self._flow.idle:
            self._progress.clear()
            await self._progress.wait()

    # -- rebalance --------------------------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Before a rebalance: no more polls, finish what is in flight as far as time allows, commit."""
        try:
            self._open.clear()
            self._wake.set()
            await self._parked.wait()
            if self._ledger.partitions:
                await self._drain(self._drain_s)
                await self._commit()
        except Exception as error:  # noqa: BLE001  # the client would log it and go on; the poll loop raises it
            self._broken = error

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Behind it: a new epoch, and polls again."""
        before = self._ledger.partitions
        self._ledger.assign(assigned)
        for partition in before - self._ledger.partitions:
            self._metrics.lag.labels(partition.topic, partition.partition).set(0)
        self._metrics.rebalances.inc()
        self._metrics.assigned.set(len(self._ledger.partitions))
        log.info("partitions_assigned", count=len(self._ledger.partitions), epoch=self._ledger.epoch)
        self._open.set()
        self.joined.set()

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken
