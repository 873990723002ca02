"""Records of retry topics wait for their time: each once, in order, never too early, and never longer than their tier."""

from __future__ import annotations

from typing import Any

from aiokafka import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.retries import RetryTiers, Tier
from embedq_consumer.retries.waiting import WaitingRecords
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import Topics

TOPICS = Topics("t")
DELAY_S = 10.0
TIERS = RetryTiers(
    tiers=(Tier(number=1, topic=TOPICS.retry(1), delay_s=DELAY_S),), left_over=(TOPICS.retry(2),)
)
BULK, ONE, TWO, LEFT = (
    TopicPartition(topic, number)
    for topic, number in ((TOPICS.bulk, 0), (TOPICS.retry(1), 0), (TOPICS.retry(1), 1), (TOPICS.retry(2), 0))
)
EPOCH_MS = 1_700_000_000_000.0


def raw(partition: TopicPartition, offset: int, due_s: float | None = None, **changes: Any) -> ConsumerRecord:
    """A record that is due so many seconds after the beginning."""
    due = () if due_s is None else (("embedq-due", b"%d" % (EPOCH_MS + due_s * 1000)),)
    fields: dict[str, Any] = {
        "topic": partition.topic,
        "partition": partition.partition,
        "offset": offset,
        "timestamp": 0,
        "timestamp_type": 0,
        "key": None,
        "value": b"{}",
        "checksum": None,
        "serialized_key_size": 0,
        "serialized_value_size": 2,
        "headers": due,
    }
    return ConsumerRecord(**fields | changes)


def put(waiting: WaitingRecords, now: float, *records: ConsumerRecord) -> list[int]:
    """The offsets of those that do not wait here at all."""
    polled: dict[TopicPartition, list[ConsumerRecord]] = {}
    for record in records:
        polled.setdefault(TopicPartition(record.topic, record.partition), []).append(record)
    others = waiting.put(polled, now, EPOCH_MS + now * 1000)
    return [record.offset for found in others.values() for record in found]


def take(waiting: WaitingRecords, now: float, limit: int = 100, *of: TopicPartition) -> list[int]:
    return [r.offset for found in waiting.take(of or (ONE, TWO, LEFT), limit, now).values() for r in found]


def test_a_record_waits_until_it_is_due_and_those_behind_it_wait_for_it() -> None:
    waiting = WaitingRecords(TIERS)
    assert put(waiting, 0.0, raw(ONE, 3, due_s=5.0), raw(ONE, 4, due_s=2.0), raw(BULK, 9)) == [9]
    assert (waiting.holds(ONE), waiting.holds(TWO)) == (True, False)
    assert (waiting.next_due([TWO, ONE]), waiting.next_due([TWO])) == (5.0, None)
    assert take(waiting, 4.9) == []
    assert waiting.position(ONE) == 3
    assert take(waiting, 5.0) == [3, 4]
    assert not waiting.holds(ONE)


def test_no_record_waits_longer_than_its_tier_whatever_it_says_of_itself() -> None:
    waiting = WaitingRecords(TIERS)
    put(waiting, 0.0, raw(ONE, 1, due_s=1e9), raw(LEFT, 2, due_s=5.0))
    assert take(waiting, 0.0) == [2]
    assert take(waiting, DELAY_S - 0.1) == []
    assert take(waiting, DELAY_S) == [1]


def test_a_record_that_does_not_say_when_it_is_due_does_not_wait() -> None:
    waiting = WaitingRecords(TIERS)
    put(
        waiting,
        0.0,
        raw(ONE, 1),
        raw(ONE, 2, headers=(("embedq-due", b"soon"),)),
        raw(ONE, 3, headers=(("embedq-due", None),)),
    )
    assert take(waiting, 0.0) == [1, 2, 3]


def test_no_more_are_handed_out_than_are_asked_for_and_only_of_the_partitions_asked() -> None:
    waiting = WaitingRecords(TIERS)
    put(waiting, 0.0, raw(ONE, 1), raw(ONE, 2), raw(TWO, 7))
    assert take(waiting, 0.0, 1, ONE) == [1]
    assert take(waiting, 0.0, 5, ONE) == [2]
    assert take(waiting, 0.0, 0, TWO) == []
    assert take(waiting, 0.0, 5, TWO) == [7]


def test_what_is_read_anew_is_forgotten() -> None:
    waiting = WaitingRecords(TIERS)
    put(waiting, 0.0, raw(ONE, 1), raw(TWO, 2))
    waiting.forget(ONE)
    assert (waiting.position(ONE), waiting.position(TWO)) == (None, 2)
    waiting.forget_all()
    assert not waiting.holds(TWO)


polls = st.lists(
    st.tuples(
        st.floats(0, 5),  # time since the poll before
        st.dictionaries(st.sampled_from([ONE, TWO]), st.lists(st.floats(-20, 40) | st.none(), max_size=4)),
        st.integers(0, 5),  # how many are asked for
    ),
    max_size=30,
)


@given(polls)
def test_each_is_handed_out_once_in_order_and_in_its_time(script: list[Any]) -> None:
    waiting = WaitingRecords(TIERS)
    now = 0.0
    ends = {ONE: 0, TWO: 0}
    release: dict[tuple[TopicPartition, int], float] = {}
    handed: dict[TopicPartition, list[int]] = {ONE: [], TWO: []}

    def check(limit: int) -> None:
        found = waiting.take([ONE, TWO], limit, now)
        assert sum(map(len, found.values())) <= limit
        for partition, records in found.items():
            for record in records:
                assert release[partition, record.offset] <= now + 1e-3
            handed[partition] += [record.offset for record in records]

    for pause, arrived, limit in script:
        now += pause
        for partition, dues in arrived.items():
            if waiting.holds(partition):
                continue  # as the consumer does
            for due_s in dues:
                due_s = None if due_s is None else now + due_s
                put(waiting, now, raw(partition, ends[partition], due_s))
                release[partition, ends[partition]] = min(now if due_s is None else due_s, now + DELAY_S)
                ends[partition] += 1
        check(limit)
    now += DELAY_S
    check(10**6)
    assert handed == {partition: list(range(end)) for partition, end in ends.items()}
