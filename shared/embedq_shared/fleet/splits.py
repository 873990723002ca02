"""Aliases that are shares of others, for an A/B test: whose job is whose, and which splits there are. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Final

from embedq_shared.codec import UNDECODABLE, read_split
from embedq_shared.messages import Split

__all__ = ["Splits", "share_of"]

_BYTES: Final = 7
"""Of the hash that count: 56 bits are a number that a double holds exactly, which every language has."""


def share_of(alias: str, weights: Mapping[str, int], id: str) -> str:
    """Which of the weighted aliases the job `id` of `alias` belongs to; there must be one.

    The same for every process that knows the weights. Each alias has its part of all ids; where one's weight rises, jobs move to
    that one alone, and where one goes, its jobs alone move (rendezvous hashing with weights).
    """
    return min(weights, key=lambda one: (_distance(alias, one, id) / weights[one], one))


def _distance(alias: str, one: str, id: str) -> float:
    """Exponentially distributed over ids, so that the least of several over its weight is each one's as often as it weighs."""
    digest = hashlib.sha256(f"{alias}\0{one}\0{id}".encode("utf-8", "surrogatepass")).digest()
    number = int.from_bytes(digest[:_BYTES], "big")
    return -math.log((number + 1) / (1 << 8 * _BYTES))


class Splits:
    """The splits on the control topic. Records come in its order.

    Invariants: the highest version of an alias counts, of equal ones the first; a tombstone removes it; what is no split changes
    nothing, as commands of aliases and other programs' records are on the topic too.
    """

    def __init__(self) -> None:
        self._newest: dict[str, Split] = {}

    def see(self, key: bytes | None, value: bytes | None) -> None:
        """Take a record of the control topic."""
        if key is None:
            return
        if value is None:
            self._newest.pop(key.decode(errors="replace"), None)
            return
        try:
            split = read_split(key, value)
        except UNDECODABLE:
            return
        before = self._newest.get(split.alias)
        if before is None or split.version > before.version:
            self._newest[split.alias] = split

    def newest(self, alias: str) -> Split | None:
        """The last word about an alias; one without weights has ended."""
        return self._newest.get(alias)

    def target(self, alias: str, id: str, among: Collection[str] | None = None) -> str | None:
        """The alias that the job `id` of `alias` belongs to; None if that is no split. `among`: of these alone, if it has any."""
        split = self._newest.get(alias)
        if split is None or not split.split:
            return None
        weights = {one: weight for one, weight in split.split.items() if among is None or one in among}
        return share_of(alias, weights or split.split, id)

    def weights(self) -> dict[str, dict[str, int]]:
        """The weights of every split that has not ended."""
        return {alias: split.split for alias, split in sorted(self._newest.items()) if split.split}
