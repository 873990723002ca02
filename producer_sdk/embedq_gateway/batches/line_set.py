"""A set of line numbers that is small when lines finish roughly in order, as they do."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Self

import msgspec


class LineSet(msgspec.Struct, frozen=True, array_like=True):
    """Numbers from 0, as ranges `[start, end)` that are in order and do not touch."""

    ranges: tuple[tuple[int, int], ...] = ()

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self.ranges, number, key=lambda each: each[0]) - 1
        return at >= 0 and number < self.ranges[at][1]

    def __len__(self) -> int:
        return sum(end - start for start, end in self.ranges)

    def __iter__(self) -> Iterator[int]:
        for start, end in self.ranges:
            yield from range(start, end)

    def with_(self, numbers: Iterable[int]) -> Self:
        """These and others."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted([*self.ranges, *((number, number + 1) for number in numbers)]):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return type(self)(tuple(joined))
