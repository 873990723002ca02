"""Polled records that wait to be started, in fair order by client and within each client's share. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from embedq_consumer.fairness.rounds import Rounds
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import LANES, Lane

_QUANTUM_BYTES: Final = 256 * 1024
"""A turn in bytes of records and results: some hundred short jobs, so that one poll of several clients mixes well."""
_RESUME_AT: Final = 0.75
"""A client that had its share starts more once it has three quarters of it: then many at a time, in one look-up."""


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

    jobs: int
    """Of each lane, until `Parking.allow` says otherwise."""
    texts: int
    """Of each lane."""
    record_bytes: int
    """Of each lane."""
    result_bytes: int
    """Of both lanes together: what the results may take in memory."""
    uncommitted: int
    """Records of a partition that are started and not committed: what a crash answers again."""
    ordered: frozenset[Lane] = frozenset()
    """Lanes in which the records of a partition start in their order, whoever's they are."""


class Cost(msgspec.Struct, frozen=True):
    """What a started record takes, in addition to its own bytes."""

    texts: int
    result_bytes: int


_NOTHING: Final = Cost(0, 0)


class Share:
    """A resource that clients share: each may take more while it holds less than is left free.

    This is how switches share a memory (dynamic thresholds, Choudhury and Hahne 1998): one client alone gets half, n busy
    ones 1 / (n + 1) each, and as much stays free for one that comes. What is taken need not be known before: more is
    refused afterwards, so that the limit is passed by what the last one took at most.
    """

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @property
    def free(self) -> int:
        """What nobody holds; negative where the last one took more than was left."""
        return self.limit - self.used


class Parking(Generic[RecordT]):
    """Knows which polled records wait, and which are started.

    A parked record is bytes and nothing else: it is not decoded, and a crash does not answer it twice, since it was never
    answered. `committed` says up to where a partition is committed, None before the first commit.

    Invariants:
        - Within a lane clients take turns (`Rounds`), counted in bytes of records and results; interactive records go first.
        - A client starts more while it has less of each resource under way than is left free of it (`Share`): so one that has
          nothing under way need not wait for what others have started.
        - Of one client's records in one partition the first starts first.
        - A partition has at most `uncommitted` records started and not committed, and at most half of them behind one that
          waits: commits wait for that one, so there is always room for it. In an ordered lane none is: there a record that
          waits may be what started ones wait for until they give back their share.
        - Every record is given out once, by `next` or by `drop`, and what a started one took is given back by `finish`.
    """

    def __init__(self, limits: Limits, committed: Callable[[TopicPartition], int | None]) -> None:
        results = Share(limits.result_bytes)
        self._lanes = {
            lane: _Lane[RecordT](limits, results, ordered=lane in limits.ordered) for lane in LANES
        }
        self._partitions = _Partitions(limits.uncommitted, committed)
        self._costs: dict[Place, Cost] = {}
        self._waiting = 0
        self._started = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is started."""
        return not self._started

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """Those that are not forgotten yet."""
        return self._partitions.known

    def allow(self, lane: Lane, jobs: int) -> None:
        """So many jobs of a lane may be started, from the next one on."""
        self._lanes[lane].allow(jobs)

    def withhold(self, partitions: Collection[TopicPartition]) -> None:
        """Of these, and of no others, nothing starts for now."""
        self._partitions.withheld = frozenset(partitions)

    def holds_back(self, place: Place) -> bool:
        """Whether so much behind a started record is started, and not committed for its sake, that others wait for it soon."""
        return self._partitions.holds_back(place)

    def __bool__(self) -> bool:
        """Whether records wait."""
        return self._waiting > 0

    def parked(self, lane: Lane) -> int:
        """Records that wait."""
        return self._lanes[lane].parked

    def put(self, records: Iterable[RecordT]) -> None:
        """These were polled."""
        for record in records:
            self._partitions.park(record.ticket)
            self._lanes[record.lane].put(record)
            self._waiting += 1

    def next(self) -> RecordT | None:
        """Start the next record that may start; None if none may. `weigh` it before the next one."""
        for lane in self._lanes.values():
            if lane.parked and (record := lane.next(self._partitions)) is not None:
                self._partitions.start(record.ticket)
                self._waiting -= 1
                self._started += 1
                return record
        return None

    def start(self, record: RecordT) -> None:
        """Start a record that was never parked: it costs nothing but its bytes."""
        self._started += 1
        self._lanes[record.lane].take(record)

    def weigh(self, record: RecordT, cost: Cost) -> None:
        """A started record turned out to take this."""
        self._costs[record.ticket] = cost
        self._lanes[record.lane].weigh(record, cost)

    def finish(self, record: RecordT) -> None:
        """A started record is answered."""
        self._started -= 1
        self._lanes[record.lane].give_back(record, self._costs.pop(record.ticket, _NOTHING))

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        """Forget these partitions: their records that wait are returned, for another replica to read them."""
        self._partitions.forget(partitions)
        dropped = [record for lane in self._lanes.values() for record in lane.drop(partitions)]
        self._waiting -= len(dropped)
        return dropped


class _Partitions:
    """What waits in each partition and what is started there and not committed."""

    def __init__(self, most: int, committed: Callable[[TopicPartition], int | None]) -> None:
        self._most = most
        self._committed = committed
        self.withheld: frozenset[TopicPartition] = frozenset()
        self._parked: dict[TopicPartition, OrderedDict[int, None]] = {}
        self._started: dict[TopicPartition, list[int]] = {}

    def park(self, place: Place) -> None:
        parked = self._parked.get(place.partition)
        if parked is None:
            parked = self._parked[place.partition] = OrderedDict()
        parked[place.offset] = None

    def start(self, place: Place) -> None:
        partition, offset = place.partition, place.offset
        del self._parked[partition][offset]
        started = self._started.get(partition)
        if started is None:
            started = self._started[partition] = []
        if not started or offset > started[-1]:
            started.append(offset)
        else:
            insort(started, offset)

    @property
    def known(self) -> frozenset[TopicPartition]:
        return frozenset(self._parked.keys() | self._started.keys())

    def holds_back(self, place: Place) -> bool:
        started = self._uncommitted(place.partition)
        return len(started) - bisect_right(started, place.offset) >= self._most // 2

    def _uncommitted(self, partition: TopicPartition) -> list[int]:
        started = self._started.get(partition, [])
        done = self._committed(partition)
        if done is not None:
            del started[: bisect_left(started, done)]
        return started

    def may_start(self, place: Place, *, ordered: bool) -> bool:
        if self.withheld and place.partition in self.withheld:
            return False
        if ordered and place.offset != next(iter(self._parked[place.partition])):
            return False
        started = self._started.get(place.partition)
        if started is None or len(started) < self._most // 2:
            return True
        started = self._uncommitted(place.partition)
        if len(started) >= self._most:
            return False
        first = next(iter(self._parked[place.partition]))
        return place.offset == first or len(started) - bisect_left(started, first) < self._most // 2

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        for partition in partitions:
            self._parked.pop(partition, None)
            self._started.pop(partition, None)


class _Lane(Generic[RecordT]):
    """One lane's clients, their records that wait, and what they have under way. `results` is shared by both lanes."""

    def __init__(self, limits: Limits, results: Share, *, ordered: bool) -> None:
        self._ordered = ordered
        self._rounds = Rounds[bytes](_QUANTUM_BYTES)
        self._jobs = Share(limits.jobs)
        self._texts = Share(limits.texts)
        self._bytes = Share(limits.record_bytes)
        self._results = results
        self.parked = 0
        self._clients: dict[bytes, _Client[RecordT]] = {}

    def allow(self, jobs: int) -> None:
        self._jobs.limit = jobs

    def put(self, record: RecordT) -> None:
        client = self._client(record.client)
        if not client.parked:
            self._rounds.enter(record.client)
        client.waiting.append(record)
        client.parked += 1
        self.parked += 1

    def next(self, partitions: _Partitions) -> RecordT | None:
        """Remove and return the next record that may start."""
        jobs, texts = self._jobs.free, self._texts.free
        record_bytes, results = self._bytes.free, self._results.free
        if jobs <= 0 or texts <= 0 or record_bytes <= 0 or results <= 0:
            return None
        passed: set[bytes] | None = None
        while (flow := self._rounds.turn()) is not None:
            key = flow.key
            client = self._clients[key]
            part = _RESUME_AT if client.full else 1.0
            client.full = not (
                client.jobs < part * jobs
                and client.texts < part * texts
                and client.bytes < part * record_bytes
                and client.results < part * results
            )
            if (
                not client.full
                and not (passed and key in passed)
                and (record := client.next(partitions, ordered=self._ordered)) is not None
            ):
                self.parked -= 1
                self.take(record)
                flow.credit -= record.size
                if not client.parked:
                    self._rounds.leave(key)
                return record
            if passed is None:
                passed = set()
            passed.add(key)
            if len(passed) == len(self._rounds):
                return None
            self._rounds.skip()
        return None

    def take(self, record: RecordT) -> None:
        """This record is under way."""
        client = self._client(record.client)
        client.jobs += 1
        client.bytes += record.size
        self._jobs.used += 1
        self._bytes.used += record.size

    def weigh(self, record: RecordT, cost: Cost) -> None:
        client = self._clients[record.client]
        client.texts += cost.texts
        client.results += cost.result_bytes
        self._texts.used += cost.texts
        self._results.used += cost.result_bytes
        self._rounds.charge(record.client, cost.result_bytes)

    def give_back(self, record: RecordT, cost: Cost) -> None:
        """It is answered."""
        client = self._clients[record.client]
        client.jobs -= 1
        client.bytes -= record.size
        client.texts -= cost.texts
        client.results -= cost.result_bytes
        if client.jobs < 0 or client.bytes < 0 or client.texts < 0 or client.results < 0:
            raise RuntimeError("a client gave back more than it held. This is a bug.")
        self._jobs.used -= 1
        self._bytes.used -= record.size
        self._texts.used -= cost.texts
        self._results.used -= cost.result_bytes
        if not client.jobs and not client.parked:
            del self._clients[record.client]

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        dropped: list[RecordT] = []
        for key, client in list(self._clients.items()):
            found = client.drop(partitions)
            dropped += found
            if found and not client.parked:
                self._rounds.leave(key)
                if not client.jobs:
                    del self._clients[key]
        self.parked -= len(dropped)
        return dropped

    def _client(self, key: bytes) -> _Client[RecordT]:
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = _Client()
        return client


class _Client(Generic[RecordT]):
    """One client's records that wait, in their order, and what it has under way.

    Records of a partition that takes no more starts step aside.
    """

    __slots__ = ("aside", "bytes", "full", "jobs", "parked", "results", "texts", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[RecordT] = deque()
        self.aside: dict[TopicPartition, deque[RecordT]] = {}
        self.parked = 0
        self.full = False
        """Whether it had its share under way, and has not answered a quarter of it since."""
        self.jobs = 0
        self.texts = 0
        self.bytes = 0
        self.results = 0

    def next(self, partitions: _Partitions, *, ordered: bool) -> RecordT | None:
        """Remove and return the first record that may start."""
        for partition, records in self.aside.items():
            if partitions.may_start(records[0].ticket, ordered=ordered):
                record = records.popleft()
                if not records:
                    del self.aside[partition]
                self.parked -= 1
                return record
        while self.waiting:
            record = self.waiting.popleft()
            partition = record.ticket.partition
            if partition not in self.aside and partitions.may_start(record.ticket, ordered=ordered):
                self.parked -= 1
                return record
            self.aside.setdefault(partition, deque()).append(record)
        return None

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        dropped = [record for record in self.waiting if record.ticket.partition in partitions]
        self.waiting = deque(record for record in self.waiting if record.ticket.partition not in partitions)
        for partition in [each for each in self.aside if each in partitions]:
            dropped += self.aside.pop(partition)
        self.parked -= len(dropped)
        return dropped
