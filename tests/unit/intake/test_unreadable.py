"""Reading record by record after a failed poll."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from aiokafka import TopicPartition

from embedq_consumer.group import OffsetLedger
from embedq_consumer.intake import unreadable
from embedq_consumer.intake.unreadable import CarefulReader, PolledRecords
from tests.helpers.scripted_consumer import ScriptedConsumer

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


class Reading:
    """A careful reader over partitions that the ledger knows; what it finds is begun there, as the intake does it."""

    def __init__(self, *partitions: TopicPartition) -> None:
        self.consumer = ScriptedConsumer()
        self.consumer.positions = dict.fromkeys(partitions, 0)
        self.ledger = OffsetLedger()
        for partition in partitions:
            self.ledger.add(partition, None)
        self.found: list[tuple[TopicPartition, int]] = []
        self.stepped_over: list[tuple[TopicPartition, int, str]] = []
        self.most = 1000
        self.interrupted = False
        self.beats = 0
        self.reader = CarefulReader(self.consumer, self.ledger, self.poll, self.beat)

    def beat(self) -> None:
        self.beats += 1

    async def poll(
        self, partitions: Sequence[TopicPartition], *, limit: int, timeout_ms: int
    ) -> PolledRecords:
        if self.interrupted:
            return {}
        return await self.consumer.getmany(*partitions, timeout_ms=timeout_ms, max_records=limit)

    def hand_over(self, polled: PolledRecords) -> bool:
        for partition, records in polled.items():
            for record in records:
                self.ledger.begin(partition, record.offset)
                self.found.append((partition, record.offset))
        return len(self.found) < self.most

    def step_over(self, partition: TopicPartition, offset: int, error: Exception) -> None:
        self.ledger.begin(partition, offset)
        self.stepped_over.append((partition, offset, type(error).__name__))

    async def read(self) -> None:
        await self.reader.read(self.ledger.partitions, self.hand_over, self.step_over)


async def test_records_up_to_the_unreadable_one_are_handed_over_and_it_is_stepped_over() -> None:
    reading = Reading(A)
    reading.consumer.write(A, b"1", b"2", None, b"3")
    await reading.read()
    assert reading.found == [(A, 0), (A, 1)]
    assert reading.stepped_over == [(A, 2, "UnicodeDecodeError")]
    assert reading.consumer.positions[A] == 3


async def test_records_that_the_failed_poll_swallowed_are_read_again() -> None:
    """The other partition's records left the client with a poll that raised."""
    reading = Reading(A, B)
    reading.consumer.write(A, b"1", b"2")
    reading.consumer.write(B, None)
    with pytest.raises(UnicodeDecodeError):
        await reading.consumer.getmany(A, B, timeout_ms=0, max_records=10)
    assert reading.consumer.positions[A] == 2
    await reading.read()
    assert reading.found == [(A, 0), (A, 1)]
    assert reading.stepped_over == [(B, 0, "UnicodeDecodeError")]


async def test_every_partition_is_set_back_to_where_the_ledger_is() -> None:
    reading = Reading(A)
    reading.consumer.write(A, b"1", b"2", b"3")
    reading.ledger.begin(A, 0)
    reading.consumer.positions[A] = 3
    await reading.read()
    assert reading.found == [(A, 1), (A, 2)]


async def test_a_partition_of_which_nothing_was_taken_is_set_back_to_its_commit() -> None:
    reading = Reading(A)
    reading.consumer.write(A, b"1", b"2", b"3")
    reading.ledger.add(A, 2)
    reading.consumer.positions[A] = 3
    await reading.read()
    assert reading.found == [(A, 2)]


async def test_an_interrupted_poll_leaves_the_rest_to_the_next_turn() -> None:
    reading = Reading(A)
    reading.consumer.write(A, b"1", None)
    reading.interrupted = True
    await reading.read()
    assert (reading.found, reading.stepped_over) == ([], [])


async def test_a_partition_that_takes_no_more_is_left_to_the_next_turn() -> None:
    reading = Reading(A)
    reading.consumer.write(A, b"1", b"2", None)
    reading.most = 1
    await reading.read()
    assert (reading.found, reading.stepped_over) == ([(A, 0)], [])


async def test_polls_are_whole_again_after_so_many_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreadable, "_CAREFUL_RECORDS", 2)
    reading = Reading(A)
    reading.consumer.write(A, b"1", b"2", b"3", None)
    await reading.read()
    assert (reading.found, reading.stepped_over) == ([(A, 0), (A, 1)], [])


async def test_the_wait_for_a_record_grows_while_nothing_is_found_and_is_short_again_after() -> None:
    reading = Reading(A)
    for _ in range(7):
        await reading.read()
    assert reading.consumer.timeouts_ms == [200, 400, 800, 1600, 3200, 5000, 5000]
    reading.consumer.write(A, None)
    await reading.read()
    assert reading.stepped_over == [(A, 0, "UnicodeDecodeError")]
    await reading.read()
    assert reading.consumer.timeouts_ms[-1] == 200


async def test_a_partition_that_was_lost_during_the_walk_is_another_replicas() -> None:
    reading = Reading(A)
    reading.consumer.write(A, None)

    async def lost(partitions: Sequence[TopicPartition], *, limit: int, timeout_ms: int) -> PolledRecords:
        reading.consumer.positions.clear()
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    await CarefulReader(reading.consumer, reading.ledger, lost, reading.beat).read(
        [A], reading.hand_over, reading.step_over
    )
    assert reading.stepped_over == []


async def test_each_wait_is_preceded_by_a_heartbeat() -> None:
    reading = Reading(A, B)
    await reading.read()
    assert reading.beats == 2
