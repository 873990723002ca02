"""Micro-batches by token budget: a pure policy, and the queue around it that waits until one is due."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Final, Generic, Protocol, TypeVar

from embedq_consumer.fairness import InteractiveTraffic, Rounds
from embedq_shared.topics import LANES, Lane

OVERDUE_SHARE: Final = 4
"""Overdue bulk texts get a quarter of what runs, so that neither lane can starve the other."""
WINDOW: Final = 64
"""How many texts a micro-batch looks at to fill the last of its budget: fewer than this are ever picked past a text. More of
them fill it no better (99.9 % of 2,048 tokens and of 16,384), and each look costs time."""
TURNS: Final = 8
"""A turn of a client, and of a job within its client, is an eighth of a micro-batch: one that arrives is in the next
micro-batch even beside several others, and a turn still holds some texts."""
SHORT: Final = 4
"""While interactive texts come, bulk ones run in quarters of a micro-batch. Three may be under way when a text comes
(`PrefetchLimit`), and its own may be filled with them: together it waits for one micro-batch's time at most."""
APART: Final = 4
"""Beside a client whose backlog fills micro-batches, texts of the others run without it in up to a quarter of what runs: whoever comes waits
for the micro-batches that are under way, and not for one of its own that the backlog fills."""
_LAST_PART: Final = 8
"""Texts are taken in order until an eighth of the budget is left; that is filled by best fit."""


class Item(Protocol):
    """What a micro-batch is made of: `cost` in tokens, `arrived` in seconds of any monotonic clock.

    Clients take turns, and so do the jobs of a client; `job` is a number that no two jobs share.
    """

    @property
    def cost(self) -> int: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def client(self) -> bytes: ...
    @property
    def job(self) -> int: ...
    @property
    def arrived(self) -> float: ...


ItemT = TypeVar("ItemT", bound=Item)


class _Entry(Generic[ItemT]):
    """A text that waits. `overtaken`: how many were picked past it to fill the end of a micro-batch."""

    __slots__ = ("client", "cost", "item", "job", "number", "overtaken")

    def __init__(self, item: ItemT, number: int) -> None:
        self.item = item
        self.cost = item.cost
        self.client = item.client
        self.job = item.job
        self.number = number
        self.overtaken = 0


class _Client(Generic[ItemT]):
    """One client's jobs, which take turns, and their texts in order of arrival."""

    def __init__(self, quantum: int) -> None:
        self.jobs = Rounds[int](quantum, remembers=False)
        self.texts: dict[int, list[_Entry[ItemT]]] = {}
        self.tokens = 0

    def put(self, entry: _Entry[ItemT]) -> None:
        self.tokens += entry.cost
        if texts := self.texts.get(entry.job):
            texts.append(entry)
        else:
            self.texts[entry.job] = [entry]
            self.jobs.enter(entry.job)

    def upcoming(self, longest: float) -> Iterator[tuple[int, _Entry[ItemT]]]:
        """What runs in which order, and its cost, without texts above `longest`: `Rounds.simulate`, for lists."""
        quantum = self.jobs.quantum
        visits: Iterable[tuple[int, list[_Entry[ItemT]], int]]
        visits = ((flow.credit, self.texts[flow.key], 0) for flow in self.jobs.waiting)
        while True:
            later: list[tuple[int, list[_Entry[ItemT]], int]] = []
            for had, texts, first in visits:
                credit, at, end = had, first, len(texts)
                while credit > 0 and at < end:
                    entry = texts[at]
                    at += 1
                    if entry.cost <= longest:
                        yield entry.cost, entry
                        credit -= entry.cost
                if at < end:
                    later.append((credit + quantum, texts, at))
            if not later:
                return
            visits = later

    def remove(self, entry: _Entry[ItemT]) -> None:
        """This one runs."""
        self.tokens -= entry.cost
        texts = self.texts[entry.job]
        if len(texts) == 1:
            del self.texts[entry.job]
            self.jobs.leave(entry.job)
        else:
            self.jobs.charge(entry.job, entry.cost)
            texts.remove(entry)  # it is near the front


class _LaneQueue(Generic[ItemT]):
    """What waits in one lane: clients take turns, and within a client its jobs do. A turn is an eighth of the budget.

    Texts over the budget run alone, and shorter ones run between two of them.
    """

    def __init__(self, max_tokens: int) -> None:
        self.tokens = 0
        self.after_long = False
        """Whether a text over the budget ran, and none of this lane's shorter ones since."""
        self._arrivals = 0
        self._waiting: OrderedDict[int, float] = OrderedDict()  # when each arrived, in order
        self._clients: dict[bytes, _Client[ItemT]] = {}
        self._backlogs: set[bytes] = set()  # clients of which more waits than a micro-batch holds
        self._rounds = Rounds[bytes](1)
        self._long = 0
        self.resize(max_tokens)

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: ItemT) -> None:
        """Queue a text."""
        client = self._clients.get(item.client)
        if client is None:
            client = self._clients[item.client] = _Client(self._rounds.quantum)
            self._rounds.enter(item.client)
        entry = _Entry(item, self._arrivals)
        client.put(entry)
        if client.tokens > self._max_tokens:
            self._backlogs.add(item.client)
        self._waiting[self._arrivals] = item.arrived
        self._arrivals += 1
        self.tokens += entry.cost
        self._long += entry.cost > self._max_tokens

    def resize(self, max_tokens: int) -> None:
        """Another budget: which texts are over it changes, and how long a turn is."""
        self._max_tokens = max_tokens
        self._rounds.quantum = max(1, max_tokens // TURNS)
        self._long = 0
        for client in self._clients.values():
            client.jobs.quantum = self._rounds.quantum
            self._long += sum(entry.cost > max_tokens for texts in client.texts.values() for entry in texts)
        self._backlogs = {key for key, client in self._clients.items() if client.tokens > max_tokens}

    def beside_backlogs(self) -> int:
        """Tokens of those clients of which no more waits than a micro-batch holds, while more of another one does; else 0."""
        if not self._backlogs:
            return 0
        return self.tokens - sum(self._clients[key].tokens for key in self._backlogs)

    def oldest(self) -> float:
        """When the text that waits longest arrived."""
        return next(iter(self._waiting.values()))

    def has_short(self) -> bool:
        """Whether a text within the budget waits."""
        return self._long < len(self._waiting)

    def long_is_next(self) -> bool:
        """Whether a text over the budget is to run next: it is its turn, and shorter ones had theirs."""
        if not self._long or not self.has_short():
            return bool(self._long)
        return not self.after_long and self._first(math.inf).cost > self._max_tokens

    def next_cost(self) -> int:
        """Tokens of the text that is to run next."""
        return self._first(math.inf if self.long_is_next() else self._max_tokens).cost

    def take_long(self) -> ItemT:
        """Remove and return the next text over the budget, which `long_is_next`."""
        entry = self._first(math.inf)
        self._remove([entry])
        return entry.item

    def take_short(self, budget: int, most: int, *, apart: bool = False) -> list[ItemT]:
        """Remove and return up to `most` texts that fill `budget` tokens; `apart`: without those of a backlog.

        In fair order while more than `_LAST_PART` of a micro-batch is left, then the longest that fits of the next `WINDOW`.
        """
        taken: list[_Entry[ItemT]] = []
        near: list[_Entry[ItemT]] = []
        left, last_part = budget, self._max_tokens // _LAST_PART
        for cost, entry in self._upcoming(self._max_tokens, apart=apart):
            if not near and len(taken) < most and left > last_part and cost <= left:
                taken.append(entry)
                left -= cost
                continue
            near.append(entry)
            if left <= 0 or len(taken) >= most or len(near) == WINDOW or entry.overtaken >= WINDOW - 1:
                break  # full, far enough, or a text that none may overtake any more
            if cost == left:
                break  # nothing fits better
        self._remove(taken)
        if near and len(taken) < most and left > 0:
            chosen = self._best_fit(near, left, most - len(taken))
            self._remove(chosen)
            taken += chosen
        if taken:
            self.after_long = False
        return [entry.item for entry in taken]

    def _best_fit(self, near: list[_Entry[ItemT]], left: int, most: int) -> list[_Entry[ItemT]]:
        """The longest that fit, of these in fair order; those that stay behind note how many overtook them."""
        most = min(most, WINDOW - 1 - max(entry.overtaken for entry in near))
        chosen: dict[int, _Entry[ItemT]] = {}
        used: Counter[bytes | int] = Counter()
        for entry in sorted(near, key=attrgetter("cost"), reverse=True):
            if len(chosen) >= most or not left:
                break
            if entry.cost <= left and self._may_run_early(entry, used):
                chosen[entry.number] = entry
                left -= entry.cost
                used[entry.client] += entry.cost
                used[entry.job] += entry.cost
        passed_by = 0
        for entry in reversed(near):
            if entry.number in chosen:
                passed_by += 1
            else:
                entry.overtaken += passed_by
        return list(chosen.values())

    def _may_run_early(self, entry: _Entry[ItemT], used: Mapping[bytes | int, int]) -> bool:
        """Whether neither its client nor its job would be in debt by more than a micro-batch."""
        client = self._rounds.flow(entry.client).credit - used.get(entry.client, 0)
        job = self._clients[entry.client].jobs.flow(entry.job).credit - used.get(entry.job, 0)
        return min(client, job) - entry.cost >= -self._max_tokens

    def _upcoming(self, longest: float, *, apart: bool = False) -> Iterator[tuple[int, _Entry[ItemT]]]:
        """All that waits, in fair order, without texts above `longest`, and `apart` from backlogs."""
        self._rounds.turn()
        if len(self._clients) == 1:
            return next(iter(self._clients.values())).upcoming(longest)
        left_out = self._backlogs if apart else ()
        return self._rounds.simulate(
            lambda client: iter(()) if client in left_out else self._clients[client].upcoming(longest)
        )

    def _first(self, longest: float) -> _Entry[ItemT]:
        return next(self._upcoming(longest))[1]

    def _remove(self, entries: Iterable[_Entry[ItemT]]) -> None:
        """These run."""
        used: Counter[bytes] = Counter()
        for entry in entries:
            self._clients[entry.client].remove(entry)
            del self._waiting[entry.number]
            used[entry.client] += entry.cost
            self._long -= entry.cost > self._max_tokens
        for key, cost in used.items():
            self.tokens -= cost
            self._rounds.charge(key, cost)
            if self._clients[key].tokens <= self._max_tokens:
                self._backlogs.discard(key)
            if self._clients[key].texts:
                self._clients[key].jobs.turn()
            else:
                del self._clients[key]
                self._rounds.leave(key)


class BatchPolicy(Generic[ItemT]):
    """Which texts run next. Pure: time is an argument, in seconds of any monotonic clock.

    Invariants:
        - A micro-batch holds at most `max_tokens` tokens and `max_items` texts; a longer text runs alone.
        - Within a lane clients take turns, and within a client its jobs do (`Rounds`): a turn is an eighth of the budget in
          tokens, and a text. So a client, or a job, that arrives waits for one turn of each other one that waits, however
          much they have queued; and while two wait, neither runs more than 1.25 micro-batches and two texts more than the
          other.
        - Texts of one job run in order of arrival, except for those that fill the last eighth of a micro-batch: fewer than
          `WINDOW` texts are ever picked so past one that is within the budget.
        - Beside a client of which more waits than a micro-batch holds, interactive texts of the others run apart from it, up to
          a quarter of what runs, so that their own micro-batch takes no longer than they do.
        - Between two texts over the budget, shorter ones that wait in the same lane or in the interactive one get a
          micro-batch.
        - Interactive texts go before bulk ones; bulk texts that waited `bulk_max_wait` seconds get their share first. The
          share is saved up while the next of them is longer than the share of one micro-batch.
        - While interactive texts come (`InteractiveTraffic`), bulk texts fill a micro-batch to a quarter of its tokens and
          texts; one that is longer than a quarter runs without others.
        - A text waits at most `max_wait` seconds for others to fill its micro-batch; not at all while the device is `idle` and
          no others are known to come.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_items: int,
        max_wait: float,
        bulk_max_wait: float,
        traffic: InteractiveTraffic | None = None,
    ) -> None:
        self._traffic = traffic or InteractiveTraffic()
        self._max_tokens = max_tokens
        self.max_items = max_items
        self.max_wait = max_wait
        self.bulk_max_wait = bulk_max_wait
        self._lanes: dict[Lane, _LaneQueue[ItemT]] = {lane: _LaneQueue(max_tokens) for lane in LANES}
        self.idle = False
        """Whether the device has nothing to do."""
        self._followed = False
        self._owed = 0  # tokens that overdue bulk texts may run before interactive ones
        self._saved = max_tokens // APART  # tokens that may run apart from backlogs

    @property
    def max_tokens(self) -> int:
        """The token budget."""
        return self._max_tokens

    def resize(self, max_tokens: int) -> None:
        """Change the token budget, also for what waits."""
        self._max_tokens = max_tokens
        for queue in self._lanes.values():
            queue.resize(max_tokens)

    def put(self, items: Iterable[ItemT], *, followed: bool = False) -> None:
        """Queue these texts; `followed`: others are on their way, which will be put soon."""
        self._followed = followed
        for item in items:
            self._lanes[item.lane].put(item)

    def due_in(self, now: float) -> float:
        """Seconds until a micro-batch should run: 0 for at once, infinity while nothing waits."""
        waiting = sum(len(queue) for queue in self._lanes.values())
        if not waiting:
            return math.inf
        if waiting >= self.max_items or self.waiting_tokens() >= self._max_tokens:
            return 0.0
        if self.idle and not self._followed:
            return 0.0
        oldest = min(queue.oldest() for queue in self._lanes.values() if queue)
        return max(0.0, oldest + self.max_wait - now)

    def take(self, now: float) -> list[ItemT]:
        """Remove and return the next micro-batch; empty if none is due."""
        if self.due_in(now) > 0:
            return []
        batch: list[ItemT] = []
        left = self._max_tokens - self._run_overdue(batch, now)
        left -= self._fill_interactive(batch, left)
        if not self._lanes["interactive"]:  # else it is full
            self._fill(batch, "bulk", *self._room_for_bulk(left, now))
        return batch

    def waiting_tokens(self, lane: Lane | None = None) -> int:
        """Tokens that wait, in one lane or in both."""
        if lane is None:
            return sum(queue.tokens for queue in self._lanes.values())
        return self._lanes[lane].tokens

    def _run_overdue(self, batch: list[ItemT], now: float) -> int:
        """Move overdue bulk texts into the empty batch, as far as their share goes. Returns the tokens moved."""
        bulk, interactive = self._lanes["bulk"], self._lanes["interactive"]
        if not bulk or not interactive or now - bulk.oldest() < self.bulk_max_wait:
            self._owed = 0
            return 0
        cost = bulk.next_cost()
        self._owed = min(max(self._max_tokens, cost), self._owed + max(1, self._max_tokens // OVERDUE_SHARE))
        if cost > self._owed:
            return 0
        if bulk.long_is_next() and interactive.after_long and interactive.has_short():
            return 0  # the share is kept: two long texts in a row would hold up the short ones for both
        most = max(1, self.max_items // OVERDUE_SHARE)
        moved = self._fill(batch, "bulk", min(self._owed, self._max_tokens), most)
        if moved + interactive.next_cost() > self._max_tokens or len(batch) >= self.max_items:
            # The next interactive text does not fit with them: then this micro-batch is all bulk, and costs as much.
            moved += self._fill(batch, "bulk", self._max_tokens - moved, self.max_items)
            self._owed -= max(moved, self._max_tokens)
            return moved
        self._owed -= moved
        return moved

    def _fill_interactive(self, batch: list[ItemT], left: int) -> int:
        """Move interactive texts into the batch, apart from backlogs while that keeps to its share. Returns the tokens moved."""
        queue = self._lanes["interactive"]
        # However short they are, a micro-batch takes some time.
        least, waits = self._max_tokens // TURNS, queue.beside_backlogs()
        apart = waits > 0 and max(waits, least) <= self._saved and not queue.long_is_next()
        moved = self._fill(batch, "interactive", left, self.max_items, apart=apart)
        earned = -max(moved, least) if apart else moved // APART
        self._saved = min(self._saved + earned, self._max_tokens // APART)
        return moved

    def _room_for_bulk(self, left: int, now: float) -> tuple[int, int]:
        """Tokens of bulk texts that a micro-batch takes which has `left` of its budget, and the texts it may have with them."""
        if not self._traffic.lately(now):
            return left, self.max_items
        taken = self._max_tokens - left
        room = self._max_tokens // SHORT - taken
        if not taken and (bulk := self._lanes["bulk"]):
            room = max(room, min(bulk.next_cost(), left))
        return max(0, min(left, room)), max(1, self.max_items // SHORT)

    def _fill(self, batch: list[ItemT], lane: Lane, budget: int, most: int, *, apart: bool = False) -> int:
        """Move texts of one lane into the batch, until it has `budget` tokens more or holds `most`; or one long text.

        Returns the tokens moved.
        """
        queue = self._lanes[lane]
        if not batch and queue.long_is_next():
            batch.append(queue.take_long())
            queue.after_long = self._lanes["interactive"].after_long = True
            return batch[0].cost
        taken = queue.take_short(budget, most - len(batch), apart=apart)
        batch += taken
        return sum(item.cost for item in taken)


class Batcher(Generic[ItemT]):
    """The queue around a `BatchPolicy`: `put` never waits (the intake bounds what is in flight), `next` does."""

    def __init__(self, policy: BatchPolicy[ItemT]) -> None:
        self._policy = policy
        self._arrived = asyncio.Event()

    @property
    def max_tokens(self) -> int:
        """The token budget."""
        return self._policy.max_tokens

    def resize(self, max_tokens: int) -> None:
        """Change the token budget, also for what waits."""
        self._policy.resize(max_tokens)
        self._arrived.set()  # what waits may be a full micro-batch now

    def put(self, items: Iterable[ItemT], *, followed: bool = False) -> None:
        """Queue these texts and wake `next`; `followed`: others are on their way, which will be put soon."""
        self._policy.put(items, followed=followed)
        self._arrived.set()

    @property
    def idle(self) -> bool:
        """Whether the device has nothing to do, and nothing waits for it."""
        return self._policy.idle and not self._policy.waiting_tokens()

    def note_idle(self, idle: bool) -> None:
        """Whether the device has nothing to do: then what waits need not wait for company."""
        self._policy.idle = idle
        if idle:
            self._arrived.set()

    async def next(self) -> list[ItemT]:
        """The next micro-batch, once one is due."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if batch := self._policy.take(loop.time()):
                return batch
            delay = self._policy.due_in(loop.time())
            try:
                async with asyncio.timeout(None if math.isinf(delay) else delay):
                    await self._arrived.wait()
            except TimeoutError:
                continue

    def waiting_tokens(self, lane: Lane) -> int:
        """Tokens that wait in one lane."""
        return self._policy.waiting_tokens(lane)
