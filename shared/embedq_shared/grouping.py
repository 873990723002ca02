"""Consecutive groups below a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batched_by(
    items: Iterable[T], weight: Callable[[T], int], limit: int, *, most: int | None = None
) -> Iterator[list[T]]:
    """`items` in order, in groups that weigh at most `limit` together and have at most `most` items.

    An item above the limit is a group of its own; no group is empty.
    """
    group: list[T] = []
    total = 0
    for item in items:
        heavy = weight(item)
        if group and (total + heavy > limit or len(group) == most):
            yield group
            group, total = [], 0
        group.append(item)
        total += heavy
    if group:
        yield group
