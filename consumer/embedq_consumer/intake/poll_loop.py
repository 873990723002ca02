"""The one loop that touches the jobs consumer: it polls, and begins records in the ledger.

What it may do is decided by `PollState` and `PollPlanner`; which partitions are ours, and what is committed, is the room
`group`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog

from embedq_consumer.group import (
    Custodian,
    GroupCommits,
    HandOver,
    OffsetCommitter,
    OffsetLedger,
    Overtaken,
    Ownership,
    Ticket,
    TopicWatch,
    WatermarkWatch,
)
from embedq_consumer.intake.flow_control import InFlightLimits, PollPlanner, ReadAhead
from embedq_consumer.intake.jobs_consumer import IntakeOptions, JobsClients, PolledRecords
from embedq_consumer.intake.poll_state import PollState
from embedq_consumer.intake.reading import POLL_MS, Changes, Reading
from embedq_consumer.intake.records import Record, run_before
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import Unreadable, stop_client
from embedq_shared.topics import LANES, Lane, Topics

log = structlog.get_logger()

_CLOSE_S: Final = 10.0
"""Leaving the group takes milliseconds, unless the brokers are gone."""
_LAST_COMMIT_S: Final = 5.0
"""For a stop's last commit."""
_RETRY_S: Final = 0.05
_DRAIN_S: Final = 30.0
"""The longest that a partition which moves waits for what is in flight of it."""
_LEAST_READ_AHEAD: Final = 64
"""Jobs in flight that are no bound to anything: a first micro-batch."""

Take = Callable[[Sequence[Record]], None]
TakeUnreadable = Callable[[Record, str], None]
GiveUp = Callable[[Record, Overtaken], None]


class Intake:
    """Reads jobs and keeps their offsets.

    Invariants:
        - A record is begun in the ledger in the same step in which it is polled, before anything can fail; one of a
          partition that is not ours to read any more is not begun, and its place is read again by whoever has it.
        - Where other partitions are to be read than before, each is read on from where the ledger is.
        - A partition that is full or held is not among those polled, and nothing is paused in the client.
        - Each record is answered once: what comes for one that was given up changes nothing.
        - A crash repeats at most `max_uncommitted` records of a partition, and one poll.
    """

    def __init__(
        self,
        clients: JobsClients,
        options: IntakeOptions,
        *,
        topics: Topics,
        metrics: Metrics,
        beat: Callable[[], None],
        custodian: Custodian | None = None,
    ) -> None:
        self._consumer = clients.consumer
        self._member = clients.member
        self._metrics = metrics
        self._beat = beat
        self._retry_topics = options.retries.topics
        self._lane_of: dict[str, Lane] = dict(zip(topics.lanes, LANES, strict=True))
        self._lane_of |= dict.fromkeys(self._retry_topics, "bulk")
        self._state = PollState()
        self._changes = Changes()
        self._ledger = OffsetLedger()
        self._ownership = Ownership()
        self._in_flight: dict[Ticket, Record] = {}
        self._limits = InFlightLimits(
            max_jobs=options.max_in_flight_jobs, max_bytes=options.max_in_flight_bytes
        )
        self._read_ahead = {
            lane: ReadAhead(options.read_ahead_s, least=_LEAST_READ_AHEAD, most=options.max_in_flight_jobs)
            for lane in LANES
        }
        for lane, ahead in self._read_ahead.items():
            self._limits.allow(lane, ahead.jobs)
        self._planner = PollPlanner(
            self._ledger,
            self._limits,
            self._lane_of,
            max_poll_records=options.max_poll_records,
            max_uncommitted=options.max_uncommitted,
        )
        topic_watch = TopicWatch(clients.member, self._ledger, metrics)
        self._committer = OffsetCommitter(
            clients.member,
            self._ledger,
            self._ownership,
            topic_watch,
            metrics,
            custodian,
            interval_s=options.commit_interval_s,
            max_uncommitted=options.max_uncommitted,
        )
        ends = clients.consumer.end_offsets
        self.commits = GroupCommits(clients.member, self._ledger, self._committer, ends)
        self._hand_over = HandOver(
            clients.member,
            self._ledger,
            self._ownership,
            self._committer,
            topic_watch,
            metrics,
            drain_s=min(_DRAIN_S, options.rebalance_timeout_ms / 1000 / 2),
        )
        self._reading = Reading(
            clients.consumer, self._ledger, self._ownership, self._changes, lambda: self._state.interrupted
        )
        self._newest_answered = dict.fromkeys(LANES, float("-inf"))
        self._watch = WatermarkWatch(
            self._ledger,
            self._times,
            metrics,
            stuck_after_s=options.stuck_after_s,
            limit_s=options.stuck_limit_s,
        )
        self.joined = self._hand_over.joined
        """Set once the group has given this replica its partitions, even if there are none."""

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and ask to join the group. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
        """
        await self._consumer.start()
        await self._member.start()
        self._hand_over.follow(self._lane_of, self._interrupt)

    async def run(self, take: Take, unreadable: TakeUnreadable) -> None:
        """Poll until `stop`. `take` gets each poll's records; `unreadable` each record that cannot be read,
        or the last one of a batch of which none can be, and why."""
        while (turn := self._state.next_turn()) != "end":
            self._changes.notify()
            self._beat()
            if turn == "rest":
                await self._reading.rest()
            else:
                await self._read(take, unreadable)
        self._changes.notify()

    async def commit_forever(self) -> None:
        """Commit what is safe, again and again, hand over partitions, and measure the lag.

        Raises:
            KafkaError: the membership of the group cannot go on.
        """
        await self._committer.run(self._after_commit)

    async def watch(self, give_up: GiveUp, tell: Callable[[str | None], None]) -> None:
        """Look for watermarks that stand still while others pass. `tell` hears why the service is not ready, or None;
        `give_up` gets a record that nobody should wait for any longer, and answers it."""
        await self._watch.run(lambda ticket, its: give_up(self._in_flight[ticket], its), tell)

    async def stop(self, within: float) -> bool:
        """Take nothing more, wait for what is in flight, commit, leave the group. False if something was left, uncommitted."""
        self._state.stop()
        self._changes.notify()
        try:
            async with asyncio.timeout(within):
                await self._changes.until(lambda: self._state.ended)
                await self._idle()
        except TimeoutError:
            return False
        finally:
            await self._commit_all()
            await self._leave()
        return True

    async def close(self) -> None:
        """Leave the group and disconnect."""
        await self._leave()
        await stop_client(self._consumer, _CLOSE_S)

    async def _commit_all(self) -> None:
        """The last commit. In the middle of a rebalance the group takes none, so it is sent again for a while."""
        end = time.monotonic() + _LAST_COMMIT_S
        while not await self._committer.commit(release=self._ledger.partitions):
            if self._ownership.membership is None or time.monotonic() > end:
                log.warning("last_commit_failed")
                return
            await asyncio.sleep(_RETRY_S)

    async def _leave(self) -> None:
        self._ownership.expelled()  # nothing is committed any more
        if problem := await self._member.close(_CLOSE_S):
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

    def finish(self, record: Record) -> None:
        """A record is answered. A second time changes nothing."""
        if self._in_flight.pop(record.ticket, None) is None:
            return
        partition, lane = record.ticket.partition, record.lane
        self._ledger.finish(record.ticket)
        self._newest_answered[lane] = max(self._newest_answered[lane], record.polled_at)
        if self._read_ahead[lane].note_answered(time.monotonic()):
            self._limits.allow(lane, self._read_ahead[lane].jobs)
        if self._ownership.stage(partition) == "releasing" and not self._ledger.in_flight(partition):
            self._committer.hurry()
        self._committer.note_finished()
        reopened = self._limits.remove(lane, record.size)
        if reopened:
            self._state.interrupt()
        if reopened or self._limits.idle:
            self._changes.notify()

    @property
    def positions(self) -> OffsetLedger:
        """Every record taken and not finished."""
        return self._ledger

    @property
    def committing(self) -> OffsetCommitter:
        """What brings offsets to the group, for those that are committed in a transaction instead."""
        return self._committer

    def is_full(self, lane: Lane) -> bool:
        """Whether the lane takes no records now, since as much of it is in flight as may be."""
        return self._limits.is_full(lane)

    # -- polling ------------------------------------------------------------------------------------------------------

    async def _read(self, take: Take, unreadable: TakeUnreadable) -> None:
        """One turn: a poll of the partitions that are due."""
        self._reading.follow()
        plan = self._planner.plan(self._reading.partitions)
        self._show_limits()
        if not plan.partitions:
            await self._reading.rest()
            return
        polled: PolledRecords = {}
        if plan.urgent:
            polled = await self._reading.poll(plan.urgent, limit=plan.limit, timeout_ms=0)
        only_urgent = bool(polled)
        if not polled:
            timeout_ms = POLL_MS if plan.complete else 0
            polled = await self._reading.poll(plan.partitions, limit=plan.limit, timeout_ms=timeout_ms)
        self._planner.note(plan, polled, only_urgent=only_urgent)
        records, unread = self._begin(polled)
        for record, why in unread:
            unreadable(record, why)
        if records:
            take(records)
        if plan.complete and not polled:
            await self._reading.step_over_gaps()

    def _begin(self, polled: PolledRecords) -> tuple[list[Record], list[tuple[Record, str]]]:
        """The records, and those that cannot be read with the reason. All of them are in flight from here on."""
        now = time.monotonic()
        records: list[Record] = []
        unread: list[tuple[Record, str]] = []
        for partition, found in polled.items():
            if not self._reading.is_read(partition):
                self._reading.start_over()
                continue
            if found and self._ledger.goes_back(partition, found[0].offset):
                self._hand_over.went_back(partition)
                self._reading.start_over()
                continue
            lane = self._lane_of[partition.topic]
            for raw in found:
                ticket = self._ledger.begin(partition, raw.offset)
                if isinstance(raw.value, Unreadable):
                    record = Record.unread(ticket, lane, now)
                    unread.append((record, raw.value.reason))
                else:
                    record = Record(
                        ticket=ticket,
                        lane=lane,
                        key=raw.key,
                        value=raw.value,
                        headers=raw.headers,
                        timestamp_ms=raw.timestamp,
                        timestamp_type=raw.timestamp_type,
                        polled_at=now,
                    )
                    if partition.topic in self._retry_topics:
                        record = run_before(record)
                    records.append(record)
                self._in_flight[ticket] = record
                self._limits.add(lane, record.size)
            self._metrics.records.labels(lane).inc(len(found))
        return records, unread

    # -- what goes along ----------------------------------------------------------------------------------------------

    async def _after_commit(self) -> None:
        await self._hand_over.step()
        for partition, records in self._reading.lag().items():
            self._metrics.lag.labels(partition.topic, partition.partition).set(records)
        if self._planner.awaits_commit:
            self._interrupt()

    def _interrupt(self) -> None:
        """Other partitions may give records than those that the turn under way asked."""
        self._state.interrupt()
        self._changes.notify()

    def _times(self, ticket: Ticket) -> tuple[float, float]:
        """When a record in flight was polled, and when the newest answered one of its lane was."""
        record = self._in_flight[ticket]
        return record.polled_at, self._newest_answered[record.lane]

    def _show_limits(self) -> None:
        for lane in LANES:
            self._metrics.paused.labels(lane).set(self._limits.is_full(lane))
            self._metrics.in_flight_jobs.labels(lane).set(self._limits.jobs(lane))
            self._metrics.in_flight_bytes.labels(lane).set(self._limits.bytes(lane))

    async def _idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._changes.until(lambda: self._limits.idle)
