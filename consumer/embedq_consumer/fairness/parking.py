"""Polled records that wait to be started, in fair order by client and within each client's share. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from embedq_consumer.fairness.rounds import Flow, Rounds
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
_partition_of = attrgetter("ticket.partition")


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
        - Of one client's records in one partition the first starts first; its partitions take turns.
        - A partition has at most `uncommitted` records started and not committed, and at most half of them behind one that
          waits: commits wait for that one, so there is always room for it. In an ordered lane none is: there a record that
          waits may be what started ones wait for until they give back their share.
        - Every record is given out once, by `draw` or by `drop`, and what a started one took is given back by `finish`.
    """

    def __init__(self, limits: Limits, committed: Callable[[TopicPartition], int | None]) -> None:
        results = Share(limits.result_bytes)
        self._partitions = _Partitions(limits.uncommitted, committed)
        self._lanes = {
            lane: _Lane[RecordT](limits, results, self._partitions, ordered=lane in limits.ordered)
            for lane in LANES
        }
        self._costs: dict[Place, Cost] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is started."""
        return not any(lane.started for lane in self._lanes.values())

    def started(self, lane: Lane) -> int:
        """Records that are started."""
        return self._lanes[lane].started

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
        return any(lane.parked for lane in self._lanes.values())

    def parked(self, lane: Lane) -> int:
        """Records that wait."""
        return self._lanes[lane].parked

    def put(self, records: Iterable[RecordT]) -> None:
        """These were polled, those of each partition in order."""
        for partition, group in groupby(records, key=_partition_of):
            found = list(group)
            self._partitions.park(partition, [record.ticket.offset for record in found])
            self._lanes[found[0].lane].put(partition, found)

    def draw(self, most: int, lanes: Iterable[Lane] = LANES) -> Generator[RecordT, None, int]:
        """Start up to `most` records of these lanes that may start, each as it is drawn. `weigh` one before the next. Returns
        how many."""
        drawn = 0
        for name in lanes:
            if (lane := self._lanes[name]).parked:
                drawn += yield from lane.draw(most - drawn)
        return drawn

    def start(self, record: RecordT) -> None:
        """Start a record that was never parked: it costs nothing but its bytes."""
        self._lanes[record.lane].take(record.client, 1, record.size)

    def weigh(self, record: RecordT, cost: Cost) -> None:
        """A started record turned out to take this."""
        self._costs[record.ticket] = cost
        self._lanes[record.lane].weigh(record.client, cost)

    def finish(self, record: RecordT) -> None:
        """A started record is answered."""
        cost = self._costs.pop(record.ticket, _NOTHING)
        self._lanes[record.lane].give_back(record.client, 1, record.size, cost)

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        """Forget these partitions: their records that wait are returned, for another replica to read them."""
        self._partitions.forget(partitions)
        return [record for lane in self._lanes.values() for record in lane.drop(partitions)]


class _Partition:
    """What waits in one partition, and what is started there and not committed."""

    __slots__ = ("order", "parked", "started")

    def __init__(self) -> None:
        self.parked = 0
        self.order: deque[int] = deque()
        """Offsets that wait, in order, among them some that do so no more."""
        self.started: list[int] = []


class _Partitions:
    """How many records of each partition may start."""

    def __init__(self, most: int, committed: Callable[[TopicPartition], int | None]) -> None:
        self._most = most
        self._half = most // 2
        self._committed = committed
        self.withheld: frozenset[TopicPartition] = frozenset()
        self._known: dict[TopicPartition, _Partition] = {}

    @property
    def known(self) -> frozenset[TopicPartition]:
        return frozenset(self._known)

    def park(self, partition: TopicPartition, offsets: Collection[int]) -> None:
        state = self._known.get(partition)
        if state is None:
            state = self._known[partition] = _Partition()
        order = state.order
        if not state.parked:
            order.clear()
        done = self._committed(partition) or 0
        while order and order[0] < done:
            order.popleft()
        order.extend(offsets)
        state.parked += len(offsets)

    def start(self, partition: TopicPartition, offsets: Sequence[int]) -> None:
        """These, in their order, wait no more."""
        state = self._known[partition]
        started = state.started
        if not started or offsets[0] > started[-1]:
            started += offsets
        else:
            for offset in offsets:
                insort(started, offset)
        state.parked -= len(offsets)

    def take_back(self, partition: TopicPartition, offsets: Sequence[int]) -> None:
        """These, which were started last, wait again."""
        state = self._known[partition]
        at = bisect_left(state.started, offsets[0])
        if state.started[at : at + len(offsets)] == offsets:
            del state.started[at : at + len(offsets)]
        else:
            for offset in offsets:
                state.started.remove(offset)
        state.parked += len(offsets)

    def holds_back(self, place: Place) -> bool:
        state = self._known.get(place.partition)
        if state is None:
            return False
        self._forget_committed(place.partition, state)
        return len(state.started) - bisect_right(state.started, place.offset) >= self._half

    def room(self, partition: TopicPartition, waiting: Iterable[int], most: int, *, ordered: bool) -> int:
        """How many of `waiting`, the offsets of one client's records that wait, may start. More than `most` are of no use, and not
        looked at: thousands may wait."""
        if self.withheld and partition in self.withheld:
            return 0
        state = self._known[partition]
        if len(state.started) >= self._half:
            self._forget_committed(partition, state)
        started = len(state.started)
        if not ordered and started < self._half:
            return self._half - started
        if started >= self._most:
            return 0
        looked_at = islice(waiting, min(most, self._most - started))
        first_ones = self._first_ones(partition, state, looked_at)
        if first_ones or ordered:
            return first_ones
        behind = started - bisect_left(state.started, state.order[0])
        return min(self._half - behind, self._most - started)

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        for partition in partitions:
            self._known.pop(partition, None)

    def _forget_committed(self, partition: TopicPartition, state: _Partition) -> None:
        done = self._committed(partition)
        if done is not None and state.started and state.started[0] < done:
            del state.started[: bisect_left(state.started, done)]

    def _first_ones(self, partition: TopicPartition, state: _Partition, waiting: Iterable[int]) -> int:
        """How many of these are the first ones that wait in the partition."""
        order, started = state.order, state.started
        done = self._committed(partition) or 0
        while order[0] < done or (
            (at := bisect_left(started, order[0])) < len(started) and started[at] == order[0]
        ):
            order.popleft()
        found = 0
        for mine, first in zip(waiting, order, strict=False):
            if mine != first:
                break
            found += 1
        return found


class _Lane(Generic[RecordT]):
    """One lane's clients, their records that wait, and what they have under way. `results` is shared by both lanes."""

    def __init__(self, limits: Limits, results: Share, partitions: _Partitions, *, ordered: bool) -> None:
        self._ordered = ordered
        self._partitions = partitions
        self._rounds = Rounds[bytes](_QUANTUM_BYTES)
        self._jobs = Share(limits.jobs)
        self._texts = Share(limits.texts)
        self._bytes = Share(limits.record_bytes)
        self._results = results
        self.parked = 0
        self._clients: dict[bytes, _Client[RecordT]] = {}

    @property
    def started(self) -> int:
        """Records under way."""
        return self._jobs.used

    def allow(self, jobs: int) -> None:
        self._jobs.limit = jobs

    def put(self, partition: TopicPartition, records: Sequence[RecordT]) -> None:
        """These wait from now on."""
        by_client: dict[bytes, list[RecordT]] = {}
        for record in records:
            found = by_client.get(record.client)
            if found is None:
                by_client[record.client] = [record]
            else:
                found.append(record)
        for key, its in by_client.items():
            client = self._client(key)
            if not client.parked:
                self._rounds.enter(key)
            client.put(partition, its)
        self.parked += len(records)

    def draw(self, most: int) -> Generator[RecordT, None, int]:
        """Start up to `most` records that may start, each as it is drawn. Returns how many.

        Jobs, bytes and places in their partition are taken for a run of a client's records at once; what these turn out to
        take of the rest, as each is weighed, may end the run early.
        """
        drawn = 0
        while drawn < most and (chosen := self._choose(most - drawn)) is not None:
            flow, client, partition, run = chosen
            self._begin(flow.key, client, partition, run)
            done = 0
            try:
                for record in run:
                    done += 1
                    flow.credit -= record.size
                    if done == len(run) and not client.parked:
                        self._rounds.leave(flow.key)
                    yield record
                    if (
                        flow.credit <= 0
                        or client.texts + self._texts.used >= self._texts.limit
                        or client.results + self._results.used >= self._results.limit
                    ):
                        break
            finally:
                drawn += done
                if done < len(run):
                    self._take_back(flow.key, client, partition, run[done:])
        return drawn

    def _choose(
        self, most: int
    ) -> tuple[Flow[bytes], _Client[RecordT], TopicPartition, list[RecordT]] | None:
        """Whose turn it is, and which records it may start now as far as is known before they are weighed."""
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
            if not client.full and not (passed and key in passed):
                # Each that starts is one more for the client, and one less that is free.
                most = min(most, (jobs - client.jobs + 1) // 2)
                size = min(flow.credit, (record_bytes - client.bytes + 1) // 2)
                found = client.next(self._partitions, most, size, ordered=self._ordered)
                if found is not None:
                    return flow, client, *found
            if passed is None:
                passed = set()
            passed.add(key)
            if len(passed) == len(self._rounds):
                return None
            self._rounds.skip()
        return None

    def _begin(
        self, key: bytes, client: _Client[RecordT], partition: TopicPartition, run: Sequence[RecordT]
    ) -> None:
        """A run is under way."""
        self._partitions.start(partition, [record.ticket.offset for record in run])
        self.parked -= len(run)
        self.take(key, len(run), sum([record.size for record in run]))

    def _take_back(
        self, key: bytes, client: _Client[RecordT], partition: TopicPartition, rest: Sequence[RecordT]
    ) -> None:
        """These were not drawn: they wait again, where they were."""
        self._partitions.take_back(partition, [record.ticket.offset for record in rest])
        client.put_back(partition, rest)
        self.parked += len(rest)
        self.give_back(key, len(rest), sum([record.size for record in rest]), _NOTHING)

    def take(self, key: bytes, jobs: int, size: int) -> None:
        """A client's records are under way."""
        client = self._client(key)
        client.jobs += jobs
        client.bytes += size
        self._jobs.used += jobs
        self._bytes.used += size

    def weigh(self, key: bytes, cost: Cost) -> None:
        client = self._clients[key]
        client.texts += cost.texts
        client.results += cost.result_bytes
        self._texts.used += cost.texts
        self._results.used += cost.result_bytes
        self._rounds.charge(key, cost.result_bytes)

    def give_back(self, key: bytes, jobs: int, size: int, cost: Cost) -> None:
        """They are under way no more."""
        client = self._clients[key]
        client.jobs -= jobs
        client.bytes -= size
        client.texts -= cost.texts
        client.results -= cost.result_bytes
        if client.jobs < 0 or client.bytes < 0 or client.texts < 0 or client.results < 0:
            raise RuntimeError("a client gave back more than it held. This is a bug.")
        self._jobs.used -= jobs
        self._bytes.used -= size
        self._texts.used -= cost.texts
        self._results.used -= cost.result_bytes
        if not client.jobs and not client.parked:
            del self._clients[key]

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
    """One client's records that wait, in each partition in their order, and what it has under way."""

    __slots__ = ("bytes", "full", "jobs", "parked", "results", "texts", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[TopicPartition, deque[RecordT]] = {}
        """By partition, in the order of their turns."""
        self.parked = 0
        self.full = False
        """Whether it had its share under way, and has not answered a quarter of it since."""
        self.jobs = 0
        self.texts = 0
        self.bytes = 0
        self.results = 0

    def put(self, partition: TopicPartition, records: Sequence[RecordT]) -> None:
        """These wait behind the others."""
        waiting = self.waiting.get(partition)
        if waiting is None:
            self.waiting[partition] = deque(records)
        else:
            waiting.extend(records)
        self.parked += len(records)

    def put_back(self, partition: TopicPartition, records: Sequence[RecordT]) -> None:
        """These wait before the others."""
        self.waiting.setdefault(partition, deque()).extendleft(reversed(records))
        self.parked += len(records)

    def next(
        self, partitions: _Partitions, most: int, size: int, *, ordered: bool
    ) -> tuple[TopicPartition, list[RecordT]] | None:
        """Remove and return the first records of one partition that may start: up to `most`, and of no more than `size` bytes
        but for the last of them. The partition's next turn comes after those of the others."""
        for partition, waiting in self.waiting.items():
            offsets = (record.ticket.offset for record in waiting)
            room = partitions.room(partition, offsets, most, ordered=ordered)
            if room > 0:
                break
        else:
            return None
        run: list[RecordT] = []
        most = min(most, room, len(waiting))
        while len(run) < most and size > 0:
            record = waiting.popleft()
            run.append(record)
            size -= record.size
        del self.waiting[partition]
        if waiting:
            self.waiting[partition] = waiting
        self.parked -= len(run)
        return partition, run

    def drop(self, partitions: Collection[TopicPartition]) -> list[RecordT]:
        dropped: list[RecordT] = []
        for partition in [each for each in self.waiting if each in partitions]:
            dropped += self.waiting.pop(partition)
        self.parked -= len(dropped)
        return dropped
