"""Micro-batches by token budget: a pure policy, and the queue around it that waits until one is due."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, Protocol, TypeVar

from embedq_shared.topics import LANES, Lane

OVERDUE_SHARE: Final = 4
"""Overdue bulk texts get a quarter of what runs, so that neither lane can starve the other."""
WINDOW: Final = 256
"""How many texts a micro-batch looks at to fill the last of its budget: fewer than this ever overtake a text."""
_LAST_PART: Final = 8
"""Texts are taken in order until an eighth of the budget is left; that is filled by best fit."""


class Item(Protocol):
    """What a micro-batch is made of: `cost` in tokens, `arrived` in seconds of any monotonic clock."""

    @property
    def cost(self) -> int: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def arrived(self) -> float: ...


ItemT = TypeVar("ItemT", bound=Item)


class _LaneQueue(Generic[ItemT]):
    """What waits in one lane. A text is known by its number in order of arrival.

    Texts over the budget run alone and have a queue of their own, so that shorter ones can run between two of them.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.after_long = False
        """Whether a text over the budget ran, and none of this lane's shorter ones since."""
        self._arrivals = 0
        self._short: deque[tuple[int, ItemT]] = deque()
        self._long: deque[tuple[int, ItemT]] = deque()

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def put(self, item: ItemT, max_tokens: int) -> None:
        """Queue a text, as long or short by this budget."""
        (self._long if item.cost > max_tokens else self._short).append((self._arrivals, item))
        self._arrivals += 1
        self.tokens += item.cost

    def divide(self, max_tokens: int) -> None:
        """Divide what waits into long and short by another budget."""
        everything = sorted((*self._short, *self._long), key=lambda entry: entry[0])
        self._short = deque(entry for entry in everything if entry[1].cost <= max_tokens)
        self._long = deque(entry for entry in everything if entry[1].cost > max_tokens)

    def oldest(self) -> float:
        """When the text that waits longest arrived."""
        return min(queue[0][1].arrived for queue in (self._short, self._long) if queue)

    def has_short(self) -> bool:
        """Whether a text within the budget waits."""
        return bool(self._short)

    def long_is_next(self) -> bool:
        """Whether a text over the budget is to run next: it is the oldest, and shorter ones had their turn."""
        if not self._long or not self._short:
            return bool(self._long)
        return not self.after_long and self._long[0][0] < self._short[0][0]

    def next_cost(self) -> int:
        """Tokens of the text that is to run next."""
        return (self._long if self.long_is_next() else self._short)[0][1].cost

    def take_long(self) -> ItemT:
        """Remove and return the oldest text over the budget."""
        item = self._long.popleft()[1]
        self.tokens -= item.cost
        return item

    def take_short(self, budget: int, most: int, last_part: int) -> list[ItemT]:
        """Remove and return up to `most` texts that fill `budget` tokens.

        In their order while more than `last_part` tokens are left, then the longest that fits of the next `WINDOW`.
        """
        queue, taken = self._short, list[ItemT]()
        left = budget
        while queue and len(taken) < most and left > last_part and queue[0][1].cost <= left:
            taken.append(queue.popleft()[1])
            left -= taken[-1].cost
        if queue and len(taken) < most and left > 0:
            chosen = self._best_fit(left, most - len(taken))
            left -= sum(item.cost for item in chosen)
            taken += chosen
        self.tokens -= budget - left
        if taken:
            self.after_long = False
        return taken

    def _best_fit(self, left: int, most: int) -> list[ItemT]:
        queue = self._short
        # By arrival numbers from the oldest on, not by what is left: else a text could be overtaken without end.
        horizon = queue[0][0] + WINDOW
        near: list[tuple[int, ItemT]] = []
        while queue and queue[0][0] < horizon:
            near.append(queue.popleft())
        chosen: dict[int, ItemT] = {}
        for number, item in sorted(near, key=lambda entry: -entry[1].cost):
            if item.cost <= left and len(chosen) < most:
                chosen[number] = item
                left -= item.cost
        queue.extendleft(entry for entry in reversed(near) if entry[0] not in chosen)
        return list(chosen.values())


class BatchPolicy(Generic[ItemT]):
    """Which texts run next. Pure: time is an argument, in seconds of any monotonic clock.

    Invariants:
        - A micro-batch holds at most `max_tokens` tokens and `max_items` texts; a longer text runs alone.
        - Within a lane texts run in order of arrival, except for those that fill the last eighth of a micro-batch: fewer
          than `WINDOW` texts ever overtake one that is within the budget, and all of them arrived right after it.
        - Between two texts over the budget, shorter ones that wait in the same lane or in the interactive one get a
          micro-batch.
        - Interactive texts go before bulk ones; bulk texts that waited `bulk_max_wait` seconds get their share first. The
          share is saved up while the next of them is longer than the share of one micro-batch.
        - A text waits at most `max_wait` seconds for others to fill its micro-batch.
    """

    def __init__(self, *, max_tokens: int, max_items: int, max_wait: float, bulk_max_wait: float) -> None:
        self._max_tokens = max_tokens
        self.max_items = max_items
        self.max_wait = max_wait
        self.bulk_max_wait = bulk_max_wait
        self._lanes: dict[Lane, _LaneQueue[ItemT]] = {"interactive": _LaneQueue(), "bulk": _LaneQueue()}
        self._owed = 0  # tokens that overdue bulk texts may run before interactive ones

    @property
    def max_tokens(self) -> int:
        """The token budget."""
        return self._max_tokens

    def resize(self, max_tokens: int) -> None:
        """Change the token budget, also for what waits."""
        self._max_tokens = max_tokens
        for queue in self._lanes.values():
            queue.divide(max_tokens)

    def put(self, items: Iterable[ItemT]) -> None:
        """Queue these texts."""
        for item in items:
            self._lanes[item.lane].put(item, self._max_tokens)

    def due_in(self, now: float) -> float:
        """Seconds until a micro-batch should run: 0 for at once, infinity while nothing waits."""
        waiting = sum(len(queue) for queue in self._lanes.values())
        if not waiting:
            return math.inf
        if waiting >= self.max_items or self.waiting_tokens() >= self._max_tokens:
            return 0.0
        oldest = min(queue.oldest() for queue in self._lanes.values() if queue)
        return max(0.0, oldest + self.max_wait - now)

    def take(self, now: float) -> list[ItemT]:
        """Remove and return the next micro-batch; empty if none is due."""
        if self.due_in(now) > 0:
            return []
        batch: list[ItemT] = []
        left = self._max_tokens - self._run_overdue(batch, now)
        for lane in LANES:
            left -= self._fill(batch, lane, left, self.max_items)
            if self._lanes[lane]:
                break  # full: what still waits in this lane goes before the other lane's texts
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

    def _fill(self, batch: list[ItemT], lane: Lane, budget: int, most: int) -> int:
        """Move texts of one lane into the batch, until it has `budget` tokens more or holds `most`; or one long text.

        Returns the tokens moved.
        """
        queue = self._lanes[lane]
        if not batch and queue.long_is_next():
            batch.append(queue.take_long())
            queue.after_long = self._lanes["interactive"].after_long = True
            return batch[0].cost
        taken = queue.take_short(budget, most - len(batch), self._max_tokens // _LAST_PART)
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

    def put(self, items: Iterable[ItemT]) -> None:
        """Queue these texts and wake `next`."""
        self._policy.put(items)
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
