"""A queue whose clients take turns. Pure."""

from __future__ import annotations

import math
from collections import deque
from typing import Generic, TypeVar

from embedq_consumer.fairness.rounds import KeyT, Rounds

ItemT = TypeVar("ItemT")


class FairQueue(Generic[KeyT, ItemT]):
    """Items of several clients, each with a cost; those of one client stay in their order.

    Invariants: those of `Rounds`; every item that was put is given out once; none is held back while nothing else is there.
    """

    def __init__(self, quantum: int) -> None:
        self._rounds = Rounds[KeyT](quantum)
        self._items: dict[KeyT, deque[tuple[ItemT, int]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, client: KeyT, item: ItemT, cost: int) -> None:
        """Queue an item."""
        items = self._items.get(client)
        if items is None:
            items = self._items[client] = deque()
            self._rounds.enter(client)
        items.append((item, cost))

    def pop(self) -> ItemT:
        """Remove and return the next item.

        Raises:
            IndexError: none waits.
        """
        found = self.pop_within(math.inf)
        if found is None:
            raise IndexError("nothing waits")
        return found

    def pop_within(self, most: float) -> ItemT | None:
        """Remove and return the next item; None if none waits, or if it costs more than this."""
        flow = self._rounds.turn()
        if flow is None:
            return None
        items = self._items[flow.key]
        item, cost = items[0]
        if cost > most:
            return None
        items.popleft()
        flow.credit -= cost
        if not items:
            del self._items[flow.key]
            self._rounds.leave(flow.key)
        return item
