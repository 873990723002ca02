"""What was polled and is not answered."""

from __future__ import annotations

import msgspec

from embedq_consumer.group import OffsetLedger
from embedq_consumer.intake.jobs_consumer import IntakeOptions
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.workload import Workload
from tests.helpers.in_flight import record

OPTIONS = IntakeOptions(
    group="g",
    replica="r",
    static_membership=False,
    max_in_flight_jobs=100,
    max_in_flight_bytes=1_000_000,
    read_ahead_s=1.0,
    max_started_texts=100,
    max_pending_bytes=1_000_000,
    max_poll_records=10,
    max_uncommitted=100,
    commit_interval_s=0.1,
    session_timeout_ms=1000,
    rebalance_timeout_ms=1000,
    stuck_after_s=1.0,
    stuck_limit_s=2.0,
)


def test_a_record_that_waits_for_something_outside_is_overtaken_by_nobody() -> None:
    ledger = OffsetLedger()
    work = Workload(OPTIONS, ledger, lambda: True)
    first = record(b"{}")
    ledger.add(first.ticket.partition, 0)
    first, later = (
        msgspec.structs.replace(record(b"{}"), ticket=ledger.begin(first.ticket.partition, offset))
        for offset in (1, 2)
    )
    for each in (first, later):
        work.add(each)
        work.start(each)
    work.set_aside([first], waits=True)
    work.finish([later])
    started, newest_answered = work.times(first.ticket)
    assert newest_answered < started, "whoever passes does not count"
    work.set_aside([first, later], waits=False)
    started, newest_answered = work.times(first.ticket)
    assert newest_answered <= started, "its time begins now"
    work.finish([first])
    assert work.idle


async def test_at_ebb_a_lane_starts_less_and_what_comes_meanwhile_has_its_turn() -> None:
    ledger = OffsetLedger()
    work = Workload(OPTIONS, ledger, lambda: True)
    started: list[Record] = []
    work.begin(started.extend)
    one = record(b"{}")
    ledger.add(one.ticket.partition, 0)
    records = [
        msgspec.structs.replace(one, ticket=ledger.begin(one.ticket.partition, offset), client=b"%d" % offset)
        for offset in range(30)
    ]
    for each in records:
        work.add(each)
    work.park(records[:20])
    assert started == records[:20]
    assert not work.at_ebb, "only while it is ebbing"
    with work.ebbing(0.5):
        work.park(records[20:])
        work.finish(started[:3])
        work.start_more()
        assert (len(started), work.at_ebb) == (20, False)
        work.finish(started[3:4])
        assert work.at_ebb, "nothing was answered before: sixteen are as little as there can be"
        work.finish(started[4:6])
        work.start_more()
        assert started == records[:22], "two had their turns"
    work.start_more()
    assert started == records, "afterwards as before"
