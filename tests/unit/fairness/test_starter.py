"""When parked records start: interactive ones by themselves while they come, and bulk ones in bulk's turns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from aiokafka import TopicPartition

from embedq_consumer.fairness import BulkTurns, Cost, InteractiveTraffic, Limits, Parking, Starter
from embedq_consumer.group import Ticket
from embedq_consumer.intake.records import Record
from embedq_shared.topics import Lane
from tests.helpers.in_flight import record


class Lot:
    """A parking lot with room for everything, and what was started of it, a list for each time."""

    def __init__(self) -> None:
        limits = Limits(
            jobs=100_000,
            texts=100_000,
            record_bytes=10**9,
            result_bytes=10**9,
            uncommitted=100_000,
        )
        self.traffic = InteractiveTraffic()
        self.parking = Parking[Record](limits, lambda partition: None)
        self.starter = Starter(self.parking, lambda: True, BulkTurns(self.traffic, clock=lambda: 1.0))
        self.started: list[list[Lane]] = []
        self.starter.begin(self._take)
        self._offset = 0

    def park(self, lane: Lane, count: int) -> None:
        for _ in range(count):
            ticket = Ticket(TopicPartition(lane, 0), epoch=1, offset=self._offset)
            self.parking.put([msgspec.structs.replace(record(), lane=lane, ticket=ticket)])
            self._offset += 1

    def _take(self, records: Iterable[Record]) -> None:
        lanes: list[Lane] = []
        for each in records:
            self.parking.weigh(each, Cost(1, 100))
            lanes.append(each.lane)
        self.started.append(lanes)


async def test_bulk_records_start_many_at_once_where_no_interactive_ones_come() -> None:
    lot = Lot()
    lot.park("bulk", 700)
    lot.starter.now()
    assert lot.started == [["bulk"] * 512]
    await asyncio.sleep(0)
    assert lot.started[1:] == [["bulk"] * 188]


async def test_beside_interactive_records_bulk_ones_start_a_few_at_a_time_and_never_before_them() -> None:
    lot = Lot()
    lot.traffic.note(0.5)
    lot.park("bulk", 200)
    lot.park("interactive", 3)
    lot.starter.now()
    assert lot.started == [["interactive"] * 3]
    for _ in range(20):
        await asyncio.sleep(0)
    few = [len(each) for each in lot.started[1:]]
    assert sum(few) == 200
    assert max(few) <= 64
    lot.park("bulk", 500)
    lot.starter.now()
    await asyncio.sleep(0)
    lot.park("interactive", 1)
    lot.starter.now()
    assert lot.started[-1] == ["interactive"]
