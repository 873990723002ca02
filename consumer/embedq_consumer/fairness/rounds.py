"""Deficit round robin: whose turn it is, when turns are as long as a quantum of cost. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ItemT = TypeVar("ItemT")

_MOST_DEBTS: Final = 4096
"""Debts of flows that went away. Each is forgotten once the others have had the turns that it stands for; the bound is for
keys that never come back."""


class Flow(Generic[KeyT]):
    """One who takes turns. `credit` is what it may still use in this turn; below zero it is in debt."""

    __slots__ = ("credit", "key")

    def __init__(self, key: KeyT, credit: int) -> None:
        self.key = key
        self.credit = credit


class Rounds(Generic[KeyT]):
    """Flows that wait, in the order of their turns.

    A flow may use what costs more than its credit; the debt is paid with the turns that it then lets pass. So a turn never
    needs to be longer than a quantum for the sake of something large.

    Invariants:
        - A flow that enters stands behind all that wait, and before the next turn of each of them: it waits for one turn of
          each other flow at most. None waits for more turns than that, however many enter after it.
        - Of two flows that wait all the while, neither uses more than the other by more than a quantum, the largest debt,
          and the largest single cost.
        - A flow that went away in debt and comes back has paid what the turns of the others since then are worth; without
          `remembers`, for flows that do not come back, debts are forgotten.
    """

    def __init__(self, quantum: int, *, remembers: bool = True) -> None:
        self.quantum = quantum
        self._remembers = remembers
        self.waiting: deque[Flow[KeyT]] = deque()
        """Not to be changed while it is iterated; the first is the one whose turn it is, once `turn` was called."""
        self._flows: dict[KeyT, Flow[KeyT]] = {}
        self._turns = 0
        self._debts: dict[
            KeyT, tuple[int, int]
        ] = {}  # (what is owed, the number of the turn when it went away)

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._flows

    def flow(self, key: KeyT) -> Flow[KeyT]:
        """The flow of this key, which waits."""
        return self._flows[key]

    def enter(self, key: KeyT) -> None:
        """This flow waits from now on. It may do so already."""
        if key in self._flows:
            return
        credit = self.quantum
        if debt := self._debts.pop(key, None):
            owed, then = debt
            rounds = (self._turns - then) // max(1, len(self._flows))
            credit = min(self.quantum, self.quantum - owed + rounds * self.quantum)
        flow = self._flows[key] = Flow(key, credit)
        self.waiting.append(flow)

    def leave(self, key: KeyT) -> None:
        """This flow waits no more."""
        flow = self._flows.pop(key)
        if self.waiting[0] is flow:
            self.waiting.popleft()
        else:
            self.waiting.remove(flow)
        if not self._flows:
            self._debts.clear()  # nobody is owed anything: a new busy period begins
        elif self._remembers and flow.credit < self.quantum:
            self._owe(key, self.quantum - flow.credit)

    def charge(self, key: KeyT, cost: int) -> None:
        """This flow used this much, whether it waits for more or not."""
        if flow := self._flows.get(key):
            flow.credit -= cost
        elif self._remembers and self._flows:
            self._owe(key, cost)

    def _owe(self, key: KeyT, cost: int) -> None:
        owed, then = self._debts.get(key, (0, self._turns))
        self._debts[key] = (owed + cost, then)
        if len(self._debts) > _MOST_DEBTS:
            del self._debts[next(iter(self._debts))]

    def turn(self) -> Flow[KeyT] | None:
        """The flow whose turn it is: flows without credit get a quantum and go to the end. None if none waits."""
        waiting = self.waiting
        while waiting:
            if waiting[0].credit > 0:
                return waiting[0]
            waiting[0].credit += self.quantum
            waiting.rotate(-1)
            self._turns += 1
        return None

    def simulate(
        self, items_of: Callable[[KeyT], Iterator[tuple[int, ItemT]]]
    ) -> Iterator[tuple[int, ItemT]]:
        """What would run, in which order, if everything that is given out were charged; nothing is.

        `items_of` gives a flow's items, each with its cost. Flows must not enter or leave meanwhile.
        """
        visits: Iterator[tuple[int, Iterator[tuple[int, ItemT]]]]
        visits = ((flow.credit, items_of(flow.key)) for flow in self.waiting)
        while True:
            later: list[tuple[int, Iterator[tuple[int, ItemT]]]] = []
            for had, items in visits:
                credit = had
                if credit > 0:
                    for cost, item in items:
                        yield cost, item
                        credit -= cost
                        if credit <= 0:
                            break
                    else:
                        continue  # it has no more
                later.append((credit + self.quantum, items))
            if not later:
                return
            visits = iter(later)

    def skip(self) -> None:
        """The one whose turn it is cannot use it now: it goes to the end, with its credit."""
        self.waiting.rotate(-1)
