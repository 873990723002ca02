"""Answers of one key go out in order, and those of partitions that went go out nowhere."""

from __future__ import annotations

from collections import defaultdict

from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.group import Ticket
from embedq_consumer.intake.key_order import KeyOrder

ONE, OTHER = TopicPartition("rows", 0), TopicPartition("rows", 1)


class Watched:
    """A `KeyOrder`, the epochs of its partitions, and what it said."""

    def __init__(self) -> None:
        self.epochs: dict[TopicPartition, int] = {ONE: 1, OTHER: 2}
        self.order = KeyOrder(self.epochs.get)
        self.heard: dict[Ticket, list[bool]] = defaultdict(list)

    def begin(self, offset: int, key: bytes, partition: TopicPartition = ONE) -> Ticket:
        ticket = Ticket(partition, self.epochs[partition], offset)
        self.order.begin(ticket, key)
        return ticket

    def ready(self, ticket: Ticket) -> None:
        self.order.when_first(ticket, self.heard[ticket].append)


def test_an_answer_waits_for_the_earlier_one_of_its_key() -> None:
    one = Watched()
    first, second, other = one.begin(1, b"k"), one.begin(2, b"k"), one.begin(3, b"x")
    for ticket in (second, other):
        one.ready(ticket)
    assert (one.heard[second], one.heard[other]) == ([], [True])
    one.ready(first)
    assert one.heard[first] == [True]
    assert one.heard[second] == [], "the first one is on its way, and not acknowledged"
    one.order.finish(first)
    assert one.heard[second] == [True]


def test_equal_keys_of_two_partitions_are_two_keys() -> None:
    one = Watched()
    one.begin(1, b"k")
    there = one.begin(1, b"k", OTHER)
    one.ready(there)
    assert one.heard[there] == [True]


def test_answers_of_a_partition_that_went_go_nowhere() -> None:
    one = Watched()
    first, second = one.begin(1, b"k"), one.begin(2, b"k")
    one.ready(second)
    one.epochs[ONE] = 3
    one.order.follow()
    assert one.heard[second] == [False]
    one.ready(first)
    assert one.heard[first] == [False]
    assert len(one.order) == 0
    again = one.begin(1, b"k")
    one.ready(again)
    assert one.heard[again] == [True], "what the former assignment left behind holds up nobody"
    one.order.finish(first)
    one.order.finish(second)
    assert len(one.order) == 1


def test_a_record_that_never_began_waits_for_nobody() -> None:
    one = Watched()
    stranger = Ticket(ONE, 1, 9)
    one.ready(stranger)
    assert one.heard[stranger] == [True]


@given(st.lists(st.sampled_from([b"a", b"b"]), max_size=12), st.data())
def test_whatever_is_ready_when_each_goes_once_and_in_order(keys: list[bytes], data: st.DataObject) -> None:
    one = Watched()
    tickets = [one.begin(offset, key) for offset, key in enumerate(keys)]
    acknowledged: list[Ticket] = []
    left = list(data.draw(st.permutations(tickets)))
    while len(acknowledged) < len(tickets):
        if data.draw(st.booleans()) and left:
            one.ready(left.pop())
        on_their_way = [ticket for ticket in tickets if one.heard[ticket] and ticket not in acknowledged]
        if on_their_way:
            done = data.draw(st.sampled_from(on_their_way))
            one.order.finish(done)
            acknowledged.append(done)
        elif left:
            one.ready(left.pop())
    assert all(said == [True] for said in one.heard.values())
    for key in set(keys):
        its = [ticket.offset for ticket in acknowledged if keys[ticket.offset] == key]
        assert its == sorted(its)
    assert len(one.order) == 0
