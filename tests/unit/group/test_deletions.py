"""Jobs that Kafka deleted before anybody read them are told, and gaps that mean nothing are not."""

from __future__ import annotations

from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from embedq_consumer.group import DeletionWatch, OffsetLedger
from embedq_consumer.telemetry.metrics import Metrics
from tests.helpers.metric_values import sample_value
from tests.helpers.scripted_consumer import ScriptedConsumer

A = TopicPartition("jobs", 0)


class Reading:
    """A ledger that was read up to offset 10, and what is found out about what it stepped over."""

    def __init__(self) -> None:
        self.ledger = OffsetLedger()
        self.ledger.add(A, 10)
        self.consumer = ScriptedConsumer()
        self.metrics = Metrics()
        self.watch = DeletionWatch(self.ledger, self.consumer.beginning_offsets, self.metrics, ["jobs"])

    async def look(self) -> list[tuple[int, int]]:
        """The first offset and the number of records of each loss that is logged."""
        with capture_logs() as logs:
            await self.watch.look()
        return [
            (line["first_offset"], line["records"])
            for line in logs
            if line["event"] == "records_deleted_unread"
        ]

    def value(self, name: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", {"topic": "jobs"})


async def test_records_below_the_beginning_that_nobody_read_are_counted_once() -> None:
    reading = Reading()
    reading.consumer.beginnings[A] = 14
    reading.ledger.begin(A, 14)
    assert await reading.look() == [(10, 4)]
    assert await reading.look() == []
    assert reading.value("deleted_unread_records_total") == 4


async def test_where_everything_was_deleted_it_is_told_without_a_record_that_follows() -> None:
    reading = Reading()
    reading.consumer.beginnings[A] = 14
    reading.ledger.advance(A, 14)
    assert await reading.look() == [(10, 4)]


async def test_a_transactions_marker_and_a_compacted_hole_are_no_loss() -> None:
    reading = Reading()
    reading.consumer.beginnings[A] = 3
    reading.ledger.begin(A, 11)
    reading.ledger.begin(A, 15)
    assert await reading.look() == []
    assert reading.value("deleted_unread_records_total") == 0


async def test_what_was_read_before_it_was_deleted_is_no_loss() -> None:
    reading = Reading()
    for offset in (10, 11, 12, 14):
        reading.ledger.begin(A, offset)
    reading.consumer.beginnings[A] = 1_000
    assert await reading.look() == [(13, 1)], "the hole may have held a record"


async def test_brokers_that_do_not_say_are_asked_again() -> None:
    reading = Reading()
    reading.consumer.beginnings[A] = 14
    reading.consumer.beginning_errors.append(KafkaConnectionError())
    reading.ledger.begin(A, 14)
    assert await reading.look() == []
    reading.ledger.begin(A, 17)
    assert await reading.look() == [(10, 4)]


async def test_of_a_partition_that_is_not_ours_any_more_nothing_is_told() -> None:
    reading = Reading()
    reading.ledger.begin(A, 14)
    reading.ledger.drop([A])
    reading.consumer.beginnings[A] = 14
    assert await reading.look() == []


@given(
    st.lists(st.integers(10, 60), unique=True, max_size=20).map(sorted),
    st.integers(0, 80),
)
def test_the_range_that_was_stepped_over_holds_each_offset_without_a_record(
    offsets: list[int], position: int
) -> None:
    ledger = OffsetLedger()
    ledger.add(A, 10)
    for offset in offsets:
        ledger.begin(A, offset)
    ledger.advance(A, position)
    end = max([10, position, *(offset + 1 for offset in offsets)])
    missing = set(range(10, end)) - set(offsets)
    found = ledger.take_skipped().get(A, range(0))
    assert missing <= set(found)
    assert not found or {found[0], found[-1]} <= missing
