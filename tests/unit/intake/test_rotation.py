"""Whose turn it is at the next poll."""

from __future__ import annotations

from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.intake.rotation import PartitionRotation

A, B, C = (TopicPartition("jobs", number) for number in range(3))


def test_everyone_is_polled_while_polls_are_not_filled() -> None:
    turns = PartitionRotation()
    assert turns.next([A, B]) == [A, B]
    turns.note({A: "123"}, limit=4)
    assert turns.next([A, B]) == [A, B]


def test_who_filled_a_poll_waits_until_the_others_had_their_turn() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    assert turns.next([A, B, C]) == [B, C]
    turns.note({B: "1234"}, limit=4)
    assert turns.next([A, B, C]) == [C]
    turns.note({C: "1234"}, limit=4)
    assert turns.next([A, B, C]) == [A, B, C]


def test_who_filled_a_poll_has_another_turn_once_the_others_have_nothing() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    assert turns.next([A, B]) == [B]
    turns.note({}, limit=4)
    assert turns.next([A, B]) == [A, B]


def test_a_poll_of_some_of_them_that_was_not_filled_ends_no_turn() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    turns.note({B: "1"}, limit=4, drained=False)
    assert turns.next([A, B, C]) == [B, C]


def test_nobody_waits_for_a_partition_that_may_not_be_polled() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    assert turns.next([A]) == [A]
    assert turns.next([]) == []


@given(st.lists(st.integers(0, 60), min_size=3, max_size=3), st.integers(1, 9))
def test_partitions_with_backlogs_stay_within_a_poll_of_each_other(backlogs: list[int], limit: int) -> None:
    left = dict(zip((A, B, C), backlogs, strict=True))
    given_to = dict.fromkeys(left, 0)
    turns = PartitionRotation()
    while any(left.values()):
        polled, room = {}, limit
        for partition in turns.next(list(left)):  # as the client does: all of the first, then the next
            if count := min(room, left[partition]):
                polled[partition] = [None] * count
                left[partition] -= count
                given_to[partition] += count
                room -= count
        turns.note(polled, limit)
        waiting = [given_to[partition] for partition in left if left[partition]]
        assert not waiting or max(given_to.values()) - min(waiting) <= 2 * limit
