"""Which records are sent again, alone or never, with plain errors and plain numbers as time."""

from __future__ import annotations

import pytest
from aiokafka.errors import (
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.send_round import ATTEMPT_S, LEAST_ATTEMPT_S, MAX_BATCH_BYTES, SendRound

TRANSIENT = (KafkaConnectionError, RequestTimedOutError, TimeoutError, OSError, KafkaError)
REFUSED = (TopicAuthorizationFailedError, InvalidTopicError, UnknownTopicOrPartitionError)
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


def record(value: bytes | None = b"v", key: bytes | None = None, topic: str = "results") -> Outgoing:
    return Outgoing(topic=topic, partition=None, key=key, value=value, headers=[])


def sends(count: int = 3, *, timeout_s: float = 10, now: float = 0) -> SendRound:
    return SendRound([record() for _ in range(count)], timeout_s=timeout_s, now=now)


def test_records_that_are_acknowledged_are_done() -> None:
    one = sends(3)
    tried = one.tried({}, 1)
    assert tried.acknowledged == [0, 1, 2]
    assert tried.reason is None
    assert list(one.pending) == []
    assert one.outcomes == [None, None, None]


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_record_that_failed_is_sent_again_and_the_others_are_not(kind: type[BaseException]) -> None:
    one = sends(3)
    error = kind()
    tried = one.tried({1: error}, 1)
    assert tried.acknowledged == [0, 2]
    assert tried.reason is error
    assert list(one.pending) == [1]
    assert one.tried({}, 2).acknowledged == [1]
    assert one.outcomes == [None, None, None]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_record_that_the_broker_will_never_take_is_refused_at_once(kind: type[KafkaError]) -> None:
    one = sends(2)
    error = kind()
    tried = one.tried({0: error}, 1)
    assert one.outcomes == [error, None]
    assert list(one.pending) == []
    assert tried.reason is error  # the producer is replaced all the same
    assert tried.acknowledged == [1]


def test_a_topic_that_the_broker_does_not_have_is_named() -> None:
    one = SendRound([record(topic="a"), record(topic="b"), record(topic="c")], timeout_s=1, now=0)
    tried = one.tried({0: UnknownTopicOrPartitionError(), 2: InvalidTopicError()}, 0)
    assert tried.unknown_topics == {"a"}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_small_record_that_is_too_large_is_sent_once_more_alone(kind: type[KafkaError]) -> None:
    one = sends(2)
    one.tried({0: kind(), 1: kind()}, 1)
    assert list(one.pending) == [0, 1]
    assert one.is_alone(0)
    assert one.is_alone(1)
    error = kind()
    one.tried({1: error}, 2)
    assert list(one.pending) == []
    assert one.outcomes == [None, error]


def test_a_record_stays_alone_whatever_makes_it_fail() -> None:
    one = sends(1)
    one.tried({0: MessageSizeTooLargeError()}, 1)
    one.tried({0: KafkaConnectionError()}, 2)
    assert one.is_alone(0)
    one.tried({0: MessageSizeTooLargeError()}, 3)
    assert list(one.pending) == []


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [
        (None, bytes(MAX_BATCH_BYTES - 1), True),
        (None, bytes(MAX_BATCH_BYTES), False),
        (b"k", bytes(MAX_BATCH_BYTES - 1), False),
        (b"k", None, True),
    ],
)
def test_only_a_record_that_shares_batches_may_be_too_large_because_of_others(
    key: bytes | None, value: bytes | None, again: bool
) -> None:
    one = SendRound([record(value, key)], timeout_s=10, now=0)
    one.tried({0: MessageSizeTooLargeError()}, 1)
    assert bool(one.pending) == again
    assert (one.outcomes[0] is None) == again


def test_it_is_overdue_when_no_record_was_settled_for_the_whole_time_out() -> None:
    one = sends(2, timeout_s=10)
    every = {0: KafkaConnectionError(), 1: KafkaConnectionError()}
    assert not one.tried(every, 10).overdue
    assert one.tried(every, 10.01).overdue


def test_each_record_that_is_settled_starts_the_time_out_again() -> None:
    one = sends(3, timeout_s=10)
    assert not one.tried({1: KafkaConnectionError(), 2: KafkaConnectionError()}, 100).overdue
    assert not one.tried({1: InvalidTopicError(), 2: KafkaConnectionError()}, 200).overdue
    assert not one.tried({2: KafkaConnectionError()}, 210).overdue
    assert one.tried({2: KafkaConnectionError()}, 210.01).overdue


def test_a_record_that_is_to_be_sent_alone_is_not_settled() -> None:
    one = sends(1, timeout_s=10)
    assert one.tried({0: MessageSizeTooLargeError()}, 11).overdue


def test_a_try_takes_no_longer_than_is_left_but_always_some_time() -> None:
    one = sends(timeout_s=60, now=1000)
    assert one.attempt_s(1000) == ATTEMPT_S
    assert one.attempt_s(1055) == 5
    assert one.attempt_s(1060) == one.attempt_s(2000) == LEAST_ATTEMPT_S


errors = st.sampled_from([*TRANSIENT, *REFUSED, *TOO_LARGE]).map(lambda kind: kind())
tries = st.lists(st.dictionaries(st.integers(0, 4), errors), max_size=12)


@given(tries)
def test_every_record_is_settled_once_and_never_sent_after(failures: list[dict[int, BaseException]]) -> None:
    one = sends(5)
    acknowledged: list[int] = []
    for found in [*failures, {}]:
        before = list(one.pending)
        tried = one.tried(found, 0)
        acknowledged += tried.acknowledged
        assert set(one.pending) <= set(before)
        assert list(one.pending) == sorted(one.pending)
        assert (tried.reason is None) == (found.keys().isdisjoint(before))
    refused = [index for index, error in enumerate(one.outcomes) if error is not None]
    assert sorted(acknowledged + refused) == [0, 1, 2, 3, 4]
    assert list(one.pending) == []
