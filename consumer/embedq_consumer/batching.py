"""Micro-batches by token budget: a pure policy, and the queue around it that waits."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, Literal, Protocol, TypeVar

Lane = Literal["interactive", "bulk"]
LANES: Final[tuple[Lane, Lane]] = ("interactive", "bulk")

OVERDUE_SHARE: Final = 4
"""Overdue bulk texts get one part in so many of what runs, so that neither lane can starve the other."""


class Waiting(Protocol):
    """What a micro-batch is made of."""

    @property
    def cost(self) -> int: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def arrived(self) -> float: ...


Item = TypeVar("Item", bound=Waiting)


class BatchPolicy(Generic[Item]):
    """Which texts run next. Pure: time is an argument, in seconds of any monotonic clock.

    Invariants:
        - A micro-batch holds at most `max_tokens` tokens and `max_items` texts; a longer text runs alone.
        - Within a lane, texts run in the order in which they came.
        - Interactive texts go before bulk ones; bulk texts that waited `bulk_max_wait` seconds get their share first. It
          is saved up while the next of them is longer than the share of one micro-batch.
        - A text waits at most `max_wait` seconds for others to fill its micro-batch.
    """

    def __init__(self, *, max_tokens: int, max_items: int, max_wait: float, bulk_max_wait: float) -> None:
        self.max_tokens = max_tokens
        self.max_items = max_items
        self.max_wait = max_wait
        self.bulk_max_wait = bulk_max_wait
        self._lanes: dict[Lane, deque[Item]] = {"interactive": deque(), "bulk": deque()}
        self._tokens: dict[Lane, int] = {"interactive": 0, "bulk": 0}
        self._owed = 0  # tokens that overdue bulk texts may run before interactive ones

    def put(self, items: Iterable[Item]) -> None:
        """Queue these texts."""
        for item in items:
            self._lanes[item.lane].append(item)
            self._tokens[item.lane] += item.cost

    def due_in(self, now: float) -> float:
        """Seconds until a micro-batch should run: 0 for at once, infinity while nothing waits."""
        waiting = sum(len(queue) for queue in self._lanes.values())
        if not waiting:
            return math.inf
        if waiting >= self.max_items or self.waiting_tokens() >= self.max_tokens:
            return 0.0
        oldest = min(queue[0].arrived for queue in self._lanes.values() if queue)
        return max(0.0, oldest + self.max_wait - now)

    def take(self, now: float) -> list[Item]:
        """Remove and return the next micro-batch; empty if none is due."""
        if self.due_in(now) > 0:
            return []
        batch: list[Item] = []
        room = self.max_tokens - self._run_overdue(batch, now)
        for lane in LANES:
            room -= self._fill(batch, lane, room, self.max_items)
            if self._lanes[lane]:
                break  # full: what waits in this lane goes before the other lane's texts
        return batch

    def waiting_tokens(self, lane: Lane | None = None) -> int:
        """Tokens that wait, in one lane or in both."""
        return sum(self._tokens.values()) if lane is None else self._tokens[lane]

    def _run_overdue(self, batch: list[Item], now: float) -> int:
        """Move overdue bulk texts into the empty batch, as far as their share goes; the tokens moved."""
        bulk, interactive = self._lanes["bulk"], self._lanes["interactive"]
        if not bulk or not interactive or now - bulk[0].arrived < self.bulk_max_wait:
            self._owed = 0
            return 0
        most = max(self.max_tokens, bulk[0].cost)
        self._owed = min(most, self._owed + max(1, self.max_tokens // OVERDUE_SHARE))
        if bulk[0].cost > self._owed:
            return 0
        places = max(1, self.max_items // OVERDUE_SHARE)
        moved = self._fill(batch, "bulk", min(self._owed, self.max_tokens), places)
        if moved + interactive[0].cost > self.max_tokens or len(batch) >= self.max_items:
            # The next interactive text has no room beside them: then this micro-batch is all bulk, and costs as much.
            moved += self._fill(batch, "bulk", self.max_tokens - moved, self.max_items)
            self._owed -= max(moved, self.max_tokens)
            return moved
        self._owed -= moved
        return moved

    def _fill(self, batch: list[Item], lane: Lane, room: int, items: int) -> int:
        """Move texts of one lane into the batch while they fit, up to so many in the batch; the tokens moved."""
        queue, moved = self._lanes[lane], 0
        while queue and len(batch) < items and (queue[0].cost <= room - moved or not batch):
            item = queue.popleft()
            self._tokens[lane] -= item.cost
            moved += item.cost
            batch.append(item)
        return moved


class Batcher(Generic[Item]):
    """The queue around a `BatchPolicy`: `put` never waits (the intake bounds what is in flight), `next` does."""

    def __init__(self, policy: BatchPolicy[Item]) -> None:
        self._policy = policy
        self._arrived = asyncio.Event()

    def put(self, items: Iterable[Item]) -> None:
        """Queue these texts and wake whoever waits in `next`."""
        self._policy.put(items)
        self._arrived.set()

    async def next(self) -> list[Item]:
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
