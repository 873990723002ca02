"""A queue whose clients take turns. Pure."""

from __future__ import annotations

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
        self._items.setdefault(client, deque()).append((item, cost))
        self._rounds.enter(client)

    def next_cost(self) -> int | None:
        """What the next item costs; None if none waits."""
        flow = self._rounds.turn()
        return None if flow is None else self._items[flow.key][0][1]

    def pop(self) -> ItemT:
        """Remove and return the next item.

        Raises:
            IndexError: none waits.
        """
        flow = self._rounds.turn()
        if flow is None:
            raise IndexError("nothing waits")
        items = self._items[flow.key]
        item, cost = items.popleft()
        self._rounds.charge(flow.key, cost)
        if not items:
            del self._items[flow.key]
            self._rounds.leave(flow.key)
        return item
