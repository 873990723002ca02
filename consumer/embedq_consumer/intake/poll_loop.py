"""The one loop that touches the jobs consumer: it polls, and begins records in the ledger, where they wait for their turn.

What it may do is decided by `PollState` and `PollPlanner`; which partitions are ours, and what is committed, is the room
`group`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

import structlog

from embedq_consumer.fairness import BulkTurns
from embedq_consumer.group import (
    Custodian,
    DeletionWatch,
    GroupCommits,
    HandOver,
    OffsetCommitter,
    OffsetLedger,
    Overtaken,
    Ownership,
    TopicWatch,
    WatermarkWatch,
)
from embedq_consumer.intake.flow_control import PollPlanner
from embedq_consumer.intake.jobs_consumer import IntakeOptions, JobsClients, PolledRecords
from embedq_consumer.intake.poll_state import PollState
from embedq_consumer.intake.reading import POLL_MS, Changes, Reading
from embedq_consumer.intake.records import Record, mapped, run_before
from embedq_consumer.intake.workload import Take, Workload
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import Unreadable, stop_client
from embedq_shared.topics import LANES, Lane, Topics

log = structlog.get_logger()

_CLOSE_S: Final = 10.0
"""Leaving the group takes milliseconds, unless the brokers are gone."""
_DRAIN_S: Final = 30.0
"""The longest that a partition which moves waits for what is in flight of it."""

_EBB_S: Final = 0.5
"""What is left to be waited for when a hold begins, in seconds of work: two micro-batches, so that the device is busy to the last, and a
job that comes in the hold waits for no more. Some seconds of work are started before."""

TakeUnreadable = Callable[[Record, str], None]
GiveUp = Callable[[Record, Overtaken], None]


class Gate(Protocol):
    """What polled records pass before they wait for their turn: those that it lets through come back by `park` or `start`."""

    @property
    def is_open(self) -> bool:
        """Whether records may be started in their turn."""

    def take(self, records: Sequence[Record]) -> None:
        """Records of a poll, in order."""

    def take_unreadable(self, record: Record, why: str) -> None:
        """One that cannot be read."""


class Intake:
    """Reads jobs and keeps their offsets.

    Invariants:
        - A record is begun in the ledger in the same step in which it is polled, before anything can fail; one of a
          partition that is not ours to read any more is not begun, and its place is read again by whoever has it.
        - Where other partitions are to be read than before, each is read on from where the ledger is.
        - A partition that is full or held is not among those polled, and nothing is paused in the client.
        - Each record is answered once: what comes for one that was given up changes nothing.
        - What is polled waits until it is started; nothing is started during a hold or after a stop, nor of a partition that
          is to be given up. Of such a partition, and of one that was lost, what waits is left to the next owner.
        - A crash repeats at most `max_uncommitted` records of a partition: what was never started was never answered.
    """

    # More than six parameters: the service's own, which tests leave out.
    def __init__(
        self,
        clients: JobsClients,
        options: IntakeOptions,
        *,
        topics: Topics,
        metrics: Metrics,
        beat: Callable[[], None],
        custodian: Custodian | None = None,
        bulk_turns: BulkTurns | None = None,
    ) -> None:
        self._consumer = clients.consumer
        self._member = clients.member
        self._metrics = metrics
        self._beat = beat
        self._retry_topics = options.retries.topics
        self._lane_of: dict[str, Lane] = dict(zip(topics.lanes, LANES, strict=True))
        self._lane_of |= dict.fromkeys((*self._retry_topics, *options.mappings.topics), "bulk")
        self._mappings = options.mappings
        self._state = PollState()
        self._changes = Changes()
        self._ledger = OffsetLedger()
        self._ownership = Ownership()
        self._gate: Gate | None = None
        self._work = Workload(options, self._ledger, self._may_start, bulk_turns)
        self._planner = PollPlanner(
            self._work.limits, self._lane_of, max_poll_records=options.max_poll_records
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
        self.deletions = DeletionWatch(
            self._ledger, clients.consumer.beginning_offsets, metrics, self._lane_of
        )
        self._reading = Reading(
            clients.consumer, self._ledger, self._ownership, self._changes, lambda: self._state.interrupted
        )
        self._watch = WatermarkWatch(
            self._ledger,
            self._work.times,
            metrics,
            stuck_after_s=options.stuck_after_s,
            limit_s=options.stuck_limit_s,
        )
        self.joined = self._hand_over.joined
        """Set once the group has given this replica its partitions, even if there are none."""
        self.when_first = self._work.when_first
        self.set_aside = self._work.set_aside
        self.weigh = self._work.weigh

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and ask to join the group. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
        """
        await self._consumer.start()
        await self._member.start()
        self._hand_over.follow(self._lane_of, self._follow)

    async def run(self, take: Take, unreadable: TakeUnreadable, gate: Gate | None = None) -> None:
        """Poll until `stop`. `take` gets records to start; `unreadable` each record that cannot be read, or the last one of a
        batch of which none can be, and why. With a gate, all records pass it first, and it sees to the unreadable ones."""
        self._gate = gate
        self._work.begin(take)
        while (turn := self._state.next_turn()) != "end":
            self._changes.notify()
            self._beat()
            if turn == "rest":
                await self._reading.rest()
            else:
                await self._read(unreadable)
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
        await self._watch.run(lambda ticket, its: give_up(self._work.record(ticket), its), tell)

    async def stop(self, within: float) -> bool:
        """Start nothing more, wait for what is started, commit, leave the group. False if something was left, uncommitted."""
        self._state.stop()
        self._changes.notify()
        try:
            async with asyncio.timeout(within):
                await self._changes.until(lambda: self._state.ended and self._work.idle)
        except TimeoutError:
            return False
        finally:
            await self._committer.commit_last()
            await self._leave()
        return True

    async def close(self) -> None:
        """Leave the group and disconnect."""
        await self._leave()
        await stop_client(self._consumer, _CLOSE_S)

    async def _leave(self) -> None:
        self._ownership.expelled()  # nothing is committed any more
        if problem := await self._member.close(_CLOSE_S):
            log.warning("group_left_by_timeout", reason=problem)

    @asynccontextmanager
    async def held(self, within: float) -> AsyncIterator[None]:
        """Nothing is started, and nothing unanswered, inside; the group membership goes on. What is started runs down first, in no
        more than `within` seconds.

        Raises:
            TimeoutError: what was started then did not finish within as many more; nothing is held then.
        """
        with self._work.ebbing(_EBB_S), suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._changes.until(lambda: self._work.at_ebb)
        self._state.hold()
        self._changes.notify()
        try:
            async with asyncio.timeout(within):
                await self._changes.until(lambda: self._state.hold_reached and self._work.idle)
            yield
        finally:
            self._state.release()
            self._changes.notify()
            self._work.soon()

    # -- records ------------------------------------------------------------------------------------------------------

    def park(self, records: Iterable[Record]) -> None:
        """Start these in their turn."""
        self._work.park(records)

    def start(self, record: Record) -> None:
        """Whoever calls this starts a record out of turn."""
        self._work.start(record)

    def start_more(self) -> None:
        """The gate is open: start what may be started."""
        self._work.start_more()

    @property
    def waits(self) -> bool:
        """Whether records wait for their turn."""
        return self._work.waits

    async def running(self) -> None:
        """Wait while there is a hold or a stop: nothing may be started meanwhile."""
        await self._changes.until(lambda: self._state.phase == "running")

    def holds_back(self, record: Record) -> bool:
        """Whether others of its partition wait soon, for the sake of this one that is not answered."""
        return self._work.holds_back(record)

    def finish(self, *records: Record) -> None:
        """These are answered. A second time changes nothing."""
        finished, reopened = self._work.finish(records)
        if not finished:
            return
        for partition in {record.ticket.partition for record in finished}:
            if self._ownership.stage(partition) == "releasing" and not self._ledger.in_flight(partition):
                self._committer.hurry()
        self._committer.note_finished(len(finished))
        if reopened:
            self._state.interrupt()
        if reopened or self._work.idle or self._work.at_ebb:
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
        return self._work.is_full(lane)

    # -- polling ------------------------------------------------------------------------------------------------------

    async def _read(self, unreadable: TakeUnreadable) -> None:
        """One turn: a poll of the partitions that are due."""
        self._reading.follow()
        plan = self._planner.plan(self._reading.partitions)
        self._work.show(self._metrics)
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
        unreadable = unreadable if self._gate is None else self._gate.take_unreadable
        for record, why in unread:
            if self._gate is None:
                self.start(record)
            unreadable(record, why)
        if records:
            (self._gate.take if self._gate else self.park)(records)
            await asyncio.sleep(0)  # what was started asks the cache before the next poll is prepared
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
                    record = Record.read(ticket, lane, raw, now)
                    if partition.topic in self._retry_topics:
                        record = run_before(record)
                    records.append(record := mapped(record, self._mappings))
                self._work.add(record)
            self._metrics.records.labels(lane).inc(len(found))
        return records, unread

    # -- what goes along ----------------------------------------------------------------------------------------------

    async def _after_commit(self) -> None:
        await self._hand_over.step()
        for partition, records in self._reading.lag().items():
            self._metrics.lag.labels(partition.topic, partition.partition).set(records)
        self._work.soon()  # records may have waited for a commit

    def _follow(self) -> None:
        """Other partitions are ours, or may give records, than those that the turn under way asked."""
        self._work.follow(releasing=self._ownership.releasing)
        self._state.interrupt()
        self._changes.notify()

    def _may_start(self) -> bool:
        return self._state.phase == "running" and (self._gate is None or self._gate.is_open)
