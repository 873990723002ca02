"""What was polled and is not answered: it waits for its turn, or it is started. One owner (the intake)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from embedq_consumer.fairness import BulkTurns, Cost, InteractiveTraffic, Limits, Parking, Starter
from embedq_consumer.group import OffsetLedger, Ticket
from embedq_consumer.intake.flow_control import InFlightLimits, ReadAhead
from embedq_consumer.intake.jobs_consumer import IntakeOptions
from embedq_consumer.intake.key_order import Go, KeyOrder
from embedq_consumer.intake.records import Record
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import LANES, Lane

_LEAST_READ_AHEAD: Final = 256
"""Started jobs that are no bound to anything: a first micro-batch, of a client that is alone and gets half of them."""
_LEAST_AT_EBB: Final[Mapping[Lane, int]] = {"interactive": 16, "bulk": 1}
"""The same at ebb. The interactive lane answers what comes, which may be little: its rate is no measure of what it could do, and whoever asks
now and then must not wait for the text before. Nobody waits for a bulk one, and of long ones on a CPU each takes a while."""

Take = Callable[[Iterable[Record]], None]
"""Draws records and starts each before it draws the next: `Workload.weigh` says meanwhile what it takes."""


class Workload:
    """Records from the poll to the answer.

    Invariants:
        - A record comes once, by `add`, and goes once: answered, or dropped with its partition.
        - What waits was never worked on. It is started in turn (`park`) or out of turn (`start`), once.
        - A lane has no more jobs started than it answers in some seconds (`ReadAhead`), as clients share them; at ebb, in fewer.
    """

    def __init__(
        self,
        options: IntakeOptions,
        ledger: OffsetLedger,
        may_start: Callable[[], bool],
        bulk_turns: BulkTurns | None = None,
    ) -> None:
        self._ledger = ledger
        self._in_flight: dict[Ticket, Record] = {}
        self.order = KeyOrder(ledger.epoch)
        self._started: dict[Ticket, float] = {}
        self._newest_answered = dict.fromkeys(LANES, float("-inf"))
        self.limits = InFlightLimits(
            max_jobs=options.max_in_flight_jobs, max_bytes=options.max_in_flight_bytes
        )
        most = max(_LEAST_READ_AHEAD, 2 * options.max_in_flight_jobs)
        self._read_ahead = {
            lane: ReadAhead(options.read_ahead_s, least=_LEAST_READ_AHEAD, most=most) for lane in LANES
        }
        self._ebb_s: float | None = None
        self._parking = Parking[Record](
            Limits(
                jobs=_LEAST_READ_AHEAD,
                texts=options.max_started_texts,
                record_bytes=options.max_in_flight_bytes,
                result_bytes=options.max_pending_bytes,
                uncommitted=options.max_uncommitted,
                ordered=frozenset[Lane]({"bulk"} if options.bulk_in_order else ()),
            ),
            ledger.committed,
        )
        bulk_turns = bulk_turns or BulkTurns(InteractiveTraffic())
        self._traffic = bulk_turns.traffic
        self._starter = Starter(self._parking, may_start, bulk_turns)

    # -- records come and go ------------------------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        """It was polled."""
        self._in_flight[record.ticket] = record
        if record.lane == "interactive":
            self._traffic.note(record.polled_at)
        if record.ordered and record.key is not None:
            self.order.begin(record.ticket, record.key)
        self.limits.add(record.lane, record.size)

    def finish(self, records: Iterable[Record]) -> tuple[list[Record], bool]:
        """They are answered. Returned are those that were not answered or dropped before, and whether a lane has just stopped
        being full."""
        answered: dict[Lane, list[Record]] = {}
        for record in records:
            if record.ordered:
                self.order.finish(record.ticket)
            if self._in_flight.pop(record.ticket, None) is not None:
                answered.setdefault(record.lane, []).append(record)
        reopened = False
        for lane, its in answered.items():
            reopened |= self.limits.remove(lane, sum([record.size for record in its]), len(its))
            self._note_answered(lane, its)
        if answered:
            self._starter.soon()
        return [record for its in answered.values() for record in its], reopened

    def _note_answered(self, lane: Lane, records: Iterable[Record]) -> None:
        newest, count = self._newest_answered[lane], 0
        for record in records:
            ticket = record.ticket
            self._ledger.finish(ticket)
            if (started := self._started.pop(ticket, None)) is not None:
                self._parking.finish(record)
                count += 1
                newest = max(newest, started)
        self._newest_answered[lane] = newest
        if count and self._read_ahead[lane].note_answered(time.monotonic(), count):
            self._parking.allow(lane, self._allowed(lane))

    def follow(self, *, releasing: Collection[TopicPartition]) -> None:
        """Other partitions are ours. Of those that are to be given up nothing more starts; what waits of those that went is
        dropped, since their next owner reads it."""
        self._parking.withhold(releasing)
        for record in self._parking.drop(self._parking.partitions - self._ledger.partitions):
            del self._in_flight[record.ticket]
            self.limits.remove(record.lane, record.size)
        self.order.follow()
        self._starter.soon()

    # -- and are started ----------------------------------------------------------------------------------------------

    def begin(self, take: Take) -> None:
        """From now on what is started in turn goes to `take`."""
        self._starter.begin(lambda records: take(self._begun(records)))

    def park(self, records: Iterable[Record]) -> None:
        """Start these in their turn."""
        self._parking.put(records)
        self._starter.now()

    def start(self, record: Record) -> None:
        """One that never waited for its turn is started."""
        self._parking.start(record)
        self._note_started(record, time.monotonic())

    def start_more(self) -> None:
        """Start what may be started now."""
        self._starter.now()

    def soon(self) -> None:
        """Something that waiting records wait for may have come true."""
        self._starter.soon()

    @contextmanager
    def ebbing(self, seconds: float) -> Iterator[None]:
        """Start no more of a lane than it answers in so many seconds, inside: what is started runs down to that, and jobs that
        come meanwhile have their turns as ever."""
        self._ebb(seconds)
        try:
            yield
        finally:
            self._ebb(None)

    def _ebb(self, seconds: float | None) -> None:
        self._ebb_s = seconds
        for lane in LANES:
            self._parking.allow(lane, self._allowed(lane))

    def _allowed(self, lane: Lane) -> int:
        read_ahead = self._read_ahead[lane]
        return (
            read_ahead.jobs
            if self._ebb_s is None
            else read_ahead.answered_in(self._ebb_s, _LEAST_AT_EBB[lane])
        )

    def weigh(self, record: Record, cost: Cost) -> None:
        """A started record turned out to be a job that takes this. Nothing if it was given up meanwhile."""
        if record.ticket in self._started:
            self._parking.weigh(record, cost)

    def set_aside(self, records: Iterable[Record], *, waits: bool) -> None:
        """Started records that wait for something outside of the service, or do no more: so long nothing overtakes them."""
        for record in records:
            if record.ticket in self._started:
                self._started[record.ticket] = float("inf") if waits else time.monotonic()

    def when_first(self, record: Record, go: Go) -> None:
        """Call `go` once the record's answer may go out, after those of earlier records of its key."""
        self.order.when_first(record.ticket, go)

    def _begun(self, records: Iterable[Record]) -> Iterator[Record]:
        now = time.monotonic()
        for record in records:
            self._note_started(record, now)
            yield record

    def _note_started(self, record: Record, now: float) -> None:
        self._ledger.start(record.ticket)
        self._started[record.ticket] = now

    # -- what follows from it -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is started."""
        return self._parking.idle

    @property
    def at_ebb(self) -> bool:
        """Whether what is started has run down as far as it shall; never but while it is `ebbing`."""
        low = (self._parking.started(lane) <= self._allowed(lane) for lane in LANES)
        return self._ebb_s is not None and all(low)

    @property
    def waits(self) -> bool:
        """Whether something waits for its turn."""
        return bool(self._parking)

    def holds_back(self, record: Record) -> bool:
        """Whether so much behind this record is started and cannot be committed that others of its partition wait soon."""
        ticket = record.ticket
        return self._ledger.epoch(ticket.partition) == ticket.epoch and self._parking.holds_back(ticket)

    def record(self, ticket: Ticket) -> Record:
        """One in flight."""
        return self._in_flight[ticket]

    def times(self, ticket: Ticket) -> tuple[float, float]:
        """When a started record was started, and when the newest answered one of its lane was."""
        return self._started[ticket], self._newest_answered[self._in_flight[ticket].lane]

    def is_full(self, lane: Lane) -> bool:
        """Whether the lane takes no records now."""
        return self.limits.is_full(lane)

    def show(self, metrics: Metrics) -> None:
        """Set the gauges."""
        for lane in LANES:
            metrics.paused.labels(lane).set(self.limits.is_full(lane))
            metrics.in_flight_jobs.labels(lane).set(self.limits.jobs(lane))
            metrics.in_flight_bytes.labels(lane).set(self.limits.bytes(lane))
            metrics.parked_jobs.labels(lane).set(self._parking.parked(lane))
