"""Polled records that wait to be started, in fair order by client and within each client's share. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from embedq_consumer.fairness.rounds import Rounds
from embedq_consumer.fairness.shares import Shares
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import LANES, Lane

_QUANTUM_BYTES: Final = 256 * 1024
"""A turn in bytes of records and results: some hundred short jobs, so that one poll of several clients mixes well."""


class Place(Protocol):
    """Where a record lies."""

    @property
    def partition(self) -> TopicPartition: ...
    @property
    def offset(self) -> int: ...


class Parkable(Protocol):
    """A record that can wait: `client` says who is charged, `size` is its own bytes."""

    @property
    def ticket(self) -> Place: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def client(self) -> bytes: ...
    @property
    def size(self) -> int: ...


RecordT = TypeVar("RecordT", bound=Parkable)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What may be under way at once."""

    texts: int
    """Of each lane."""
    record_bytes: int
    """Of each lane."""
    result_bytes: int
    """Of both lanes together: what the results may take in memory."""
    uncommitted: int
    """Records of a partition that are started and not committed: what a crash answers again."""


class Cost(msgspec.Struct, frozen=True):
    """What a started record takes, in addition to its own bytes."""

    texts: int
    result_bytes: int


class Parking(Generic[RecordT]):
    """Knows which polled records wait, and which are started.

    A parked record is bytes and nothing else: it is not decoded, and a crash does not answer it twice, since it was never
    answered. `committed` says up to where a partition is committed, None before the first commit.

    Invariants:
        - Within a lane clients take turns (`Rounds`), counted in bytes of records and results; interactive records go first.
        - A client starts more while it has less under way than is left free (`Shares`): so one that has nothing under way
          need not wait for what others have started.
        - Of one client's records in one partition the first starts first.
        - A partition has at most `uncommitted` records started and not committed, and at most half of them behind one that
          waits: commits wait for that one, so there is always room for it.
        - Every record is given out once, by `next` or by `drop`, and what a started one took is given back by `finish`.
    """

    def __init__(self, limits: Limits, committed: Callable[[TopicPartition], int | None]) -> None:
        self._lanes = {lane: _Lane[RecordT](lane, limits) for lane in LANES}
        self._results = Shares[tuple[Lane, bytes]](limits.result_bytes)
        self._partitions = _Partitions(limits.uncommitted, committed)
        self._costs: dict[Place, Cost] = {}
        self._started = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is started."""
        return not self._started

    def __bool__(self) -> bool:
        """Whether records wait."""
        return any(lane.parked for lane in self._lanes.values())

    def parked(self, lane: Lane) -> int:
        """Records that wait."""
        return self._lanes[lane].parked

    def put(self, records: Iterable[RecordT]) -> None:
        """These were polled."""
        for record in records:
            self._partitions.park(record.ticket)
            self._lanes[record.lane].put(record)

    def next(self) -> RecordT | None:
        """Start the next record that may start; None if none may. `weigh` it before the next one."""
        if self._results.free <= 0:
            return None
        for lane in self._lanes.values():
            if lane.parked and (record := lane.next(self._partitions, self._results)) is not None:
                self._partitions.start(record.ticket)
                self._started += 1
                return record
        return None

    def start(self, record: RecordT) -> None:
        """Start a record that was never parked: it costs nothing but its bytes."""
        self._started += 1
        self._lanes[record.lane].bytes.take(record.client, record.size)

    def weigh(self, record: RecordT, cost: Cost) -> None:
        """A started record turned out to take this."""
        lane = self._lanes[record.lane]
        self._costs[record.ticket] = cost
        lane.texts.take(record.client, cost.texts)
        self._results.take((record.lane, record.client), cost.result_bytes)
        lane.rounds.charge(record.client, cost.result_bytes)

    def finish(self, record: RecordT) -> None:
        """A started record is answered."""
        lane = self._lanes[record.lane]
        self._started -= 1
        lane.bytes.give_back(record.client, record.size)
        cost = self._costs.pop(record.ticket, None)
        if cost is not None:
            lane.texts.give_back(record.client, cost.texts)
            self._results.give_back((record.lane, record.client), cost.result_bytes)

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        """Forget these partitions: their records that wait are returned, for another replica to read them."""
        self._partitions.forget(partitions)
        return [record for lane in self._lanes.values() for record in lane.drop(partitions)]


class _Partitions:
    """What waits in each partition and what is started there and not committed."""

    def __init__(self, most: int, committed: Callable[[TopicPartition], int | None]) -> None:
        self._most = most
        self._committed = committed
        self._parked: dict[TopicPartition, OrderedDict[int, None]] = {}
        self._started: dict[TopicPartition, list[int]] = {}

    def park(self, place: Place) -> None:
        self._parked.setdefault(place.partition, OrderedDict())[place.offset] = None

    def start(self, place: Place) -> None:
        del self._parked[place.partition][place.offset]
        insort(self._started.setdefault(place.partition, []), place.offset)

    def may_start(self, place: Place) -> bool:
        started = self._started.get(place.partition)
        if started is None or len(started) < self._most // 2:
            return True
        done = self._committed(place.partition)
        if done is not None:
            del started[: bisect_left(started, done)]
        if len(started) >= self._most:
            return False
        first = next(iter(self._parked[place.partition]))
        return place.offset == first or len(started) - bisect_left(started, first) < self._most // 2

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        for partition in partitions:
            self._parked.pop(partition, None)
            self._started.pop(partition, None)


class _Lane(Generic[RecordT]):
    """One lane's clients, their records that wait, and what they have under way."""

    def __init__(self, name: Lane, limits: Limits) -> None:
        self._name = name
        self.rounds = Rounds[bytes](_QUANTUM_BYTES)
        self.texts = Shares[bytes](limits.texts)
        self.bytes = Shares[bytes](limits.record_bytes)
        self.parked = 0
        self._clients: dict[bytes, _Client[RecordT]] = {}

    def put(self, record: RecordT) -> None:
        client = self._clients.get(record.client)
        if client is None:
            client = self._clients[record.client] = _Client()
            self.rounds.enter(record.client)
        client.waiting.append(record)
        self.parked += 1

    def next(self, partitions: _Partitions, results: Shares[tuple[Lane, bytes]]) -> RecordT | None:
        """Remove and return the next record that may start."""
        if self.texts.free <= 0 or self.bytes.free <= 0:
            return None
        passed: set[bytes] = set()
        while len(passed) < len(self.rounds) and (flow := self.rounds.turn()) is not None:
            key = flow.key
            if (
                key not in passed
                and self.texts.may_take(key)
                and self.bytes.may_take(key)
                and results.may_take((self._name, key))
                and (record := self._clients[key].next(partitions)) is not None
            ):
                self._take(record)
                return record
            passed.add(key)
            self.rounds.skip()
        return None

    def _take(self, record: RecordT) -> None:
        key = record.client
        self.parked -= 1
        self.bytes.take(key, record.size)
        self.rounds.charge(key, record.size)
        if not self._clients[key]:
            del self._clients[key]
            self.rounds.leave(key)

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        dropped: list[RecordT] = []
        for key, client in list(self._clients.items()):
            dropped += client.drop(partitions)
            if not client:
                del self._clients[key]
                self.rounds.leave(key)
        self.parked -= len(dropped)
        return dropped


class _Client(Generic[RecordT]):
    """One client's records that wait, in their order. Those of a partition that takes no more starts step aside."""

    __slots__ = ("aside", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[RecordT] = deque()
        self.aside: dict[TopicPartition, deque[RecordT]] = {}

    def __bool__(self) -> bool:
        return bool(self.waiting or self.aside)

    def next(self, partitions: _Partitions) -> RecordT | None:
        """Remove and return the first record that may start."""
        for partition, records in self.aside.items():
            if partitions.may_start(records[0].ticket):
                record = records.popleft()
                if not records:
                    del self.aside[partition]
                return record
        while self.waiting:
            record = self.waiting.popleft()
            partition = record.ticket.partition
            if partition not in self.aside and partitions.may_start(record.ticket):
                return record
            self.aside.setdefault(partition, deque()).append(record)
        return None

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        dropped = [record for record in self.waiting if record.ticket.partition in partitions]
        self.waiting = deque(record for record in self.waiting if record.ticket.partition not in partitions)
        for partition in [each for each in self.aside if each in partitions]:
            dropped += self.aside.pop(partition)
        return dropped
