"""How much of a resource one client may hold: as much as is left free. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

ClientT = TypeVar("ClientT", bound=Hashable)


class Shares(Generic[ClientT]):
    """What each client holds of one resource with a limit.

    The rule is that of shared-memory switches (dynamic thresholds, Choudhury and Hahne 1998): a client may take more while it
    holds less than what is left free. So one client alone gets half of it, n busy ones a share of 1 / (n + 1) each, and
    there is always as much left for one that comes next. What is taken need not be known before: more is refused
    afterwards, so that the limit is passed by one job at most.

    Invariants:
        - A client that holds nothing may take whenever anything is free.
        - What is held passes the limit by what the last one took at most.
        - With nothing held, anything may be taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[ClientT, int] = {}
        self.total = 0
        """What all hold together."""

    @property
    def free(self) -> int:
        """What nobody holds; negative where the last one took more than was left."""
        return self._limit - self.total

    def held(self, client: ClientT) -> int:
        """What this client holds."""
        return self._held.get(client, 0)

    def may_take(self, client: ClientT) -> bool:
        """Whether this client may take more now."""
        return self._held.get(client, 0) < self._limit - self.total

    def take(self, client: ClientT, amount: int) -> None:
        """It holds this much more."""
        self._held[client] = self._held.get(client, 0) + amount
        self.total += amount

    def give_back(self, client: ClientT, amount: int) -> None:
        """It holds this much less."""
        left = self._held.get(client, 0) - amount
        if left < 0:
            raise RuntimeError("a client gave back more than it held. This is a bug.")
        if left:
            self._held[client] = left
        else:
            self._held.pop(client, None)
        self.total -= amount
