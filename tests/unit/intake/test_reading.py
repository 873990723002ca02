"""What the client reads, while partitions come and go in another task."""

from __future__ import annotations

import asyncio

from aiokafka import TopicPartition

from embedq_consumer.group import OffsetLedger, Ownership
from embedq_consumer.intake.reading import Changes, Reading
from embedq_shared.kafka import Membership
from tests.helpers.scripted_consumer import ScriptedConsumer

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


class Client:
    """A reading with the ownership and the ledger that it follows."""

    def __init__(self) -> None:
        self.consumer = ScriptedConsumer()
        self.ledger = OffsetLedger()
        self.ownership = Ownership()
        self.interrupted = False
        self.reading = Reading(
            self.consumer, self.ledger, self.ownership, Changes(), lambda: self.interrupted
        )
        self._generation = 0

    def give(self, *partitions: TopicPartition, release: tuple[TopicPartition, ...] = ()) -> None:
        self._generation += 1
        change = self.ownership.assigned(Membership("me", self._generation), partitions, release)
        self.ledger.drop(change.lost)

    def open(self, partition: TopicPartition, start: int | None = None) -> None:
        self.ledger.add(partition, start)
        self.ownership.opened(partition)


def test_it_reads_what_is_open_from_where_the_ledger_is() -> None:
    client = Client()
    client.give(A, B)
    client.open(A, 7)
    client.reading.follow()
    assert client.consumer.positions == {A: 7}
    client.ledger.begin(A, 7)
    client.open(B)
    client.reading.follow()
    assert client.consumer.positions == {A: 8, B: 0}


def test_while_nothing_changes_the_client_keeps_what_it_has_fetched() -> None:
    client = Client()
    client.give(A)
    client.open(A)
    for _ in range(3):
        client.reading.follow()
    assert client.consumer.calls == ["assign"]


def test_a_partition_that_came_again_is_not_what_the_client_reads_until_it_was_told() -> None:
    client = Client()
    client.give(A)
    client.open(A, 7)
    client.reading.follow()
    assert client.reading.is_read(A)
    client.give()
    client.give(A)
    client.open(A, 9)
    assert not client.reading.is_read(A)
    assert client.reading.partitions == []
    client.reading.follow()
    assert client.reading.is_read(A)
    assert client.consumer.positions == {A: 9}


def test_a_partition_that_is_to_be_released_is_not_read() -> None:
    client = Client()
    client.give(A)
    client.open(A)
    client.reading.follow()
    client.give(release=(A,))
    assert not client.reading.is_read(A)
    client.reading.follow()
    assert client.consumer.positions == {}


async def test_a_gap_is_not_stepped_over_for_a_partition_that_came_again_meanwhile() -> None:
    client = Client()
    client.give(A)
    client.open(A, 0)
    client.reading.follow()
    client.consumer.positions[A] = 9  # after a gap
    position = client.consumer.position

    async def slow(partition: TopicPartition) -> int:
        offset = await position(partition)
        client.give()
        client.give(A)
        client.open(A, 2)
        client.reading.follow()
        return offset

    client.consumer.position = slow  # type: ignore[method-assign]
    await client.reading.step_over_gaps()
    assert client.ledger.position(A) == 2


async def test_the_lag_is_of_what_is_read_and_known() -> None:
    client = Client()
    client.give(A, B)
    client.open(A, 2)
    client.open(B)
    client.reading.follow()
    client.consumer.write(A, b"x", at=8)
    assert client.reading.lag() == {A: 7}
    client.give(B)
    assert client.reading.lag() == {}


async def test_a_rest_ends_with_an_interruption() -> None:
    changes = Changes()
    client = Client()
    reading = Reading(client.consumer, client.ledger, client.ownership, changes, lambda: client.interrupted)
    resting = asyncio.create_task(reading.rest())
    await asyncio.sleep(0)
    client.interrupted = True
    changes.notify()
    async with asyncio.timeout(0.1):
        await resting
