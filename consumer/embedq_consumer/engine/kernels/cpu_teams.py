"""How the threads of a CPU share a micro-batch: in teams (OpenMP's word), each of which computes texts of its own.

By itself PyTorch divides each step of a forward among its threads, and every thread waits for all others before the next step, a hundred
times in a forward. Beside a service that is dear: whoever needs a core for a moment, be it the event loop, a tokenizer or a broker on
the same machine, holds up all of them. Teams wait for each other once, at the end. So MiniLM on two cores gives up to 18 % more texts a
second through Kafka (short ones, one a request: level), and on sixteen 12 to 33 % more where rows have 1,000 tokens and more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Final, TypeVar

import torch

__all__ = ["LEAST_TOKENS", "ONE", "Teams", "dealt", "teams_for", "teams_of"]

LEAST_TOKENS: Final = 128
"""For each team; fewer run faster as one row on all threads. Eight texts of 332 tokens together were 10 % slower in four teams of four
threads, and 8 % faster in two of one."""
_MOST: Final = 4
"""Between the steps each team needs Python, where one can run at a time: sixteen teams of one thread took up to twice as long as four of
four."""
_UNEVEN: Final = 1.25
"""How much longer than the average the longest share may be: the other teams wait for it."""

_START_S: Final = 10.0
"""For the threads to be there: a system that lets a process have no more of them is an error of the load."""

Item = TypeVar("Item")
Found = TypeVar("Found")


class Teams:
    """`count` threads that compute at once, each with `threads` of PyTorch's. They live as long as the process, as PyTorch's own do.

    With a `count` of 1 there is no such thread, and the caller computes.
    """

    def __init__(self, count: int, threads: int) -> None:
        self._count = count
        if count == 1:
            return
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="team")
        ours = torch.get_num_threads()
        there = threading.Barrier(count, timeout=_START_S)

        def begin() -> None:
            torch.get_num_threads()  # takes the process's number, once for each thread
            torch.set_num_threads(threads)
            there.wait()  # so that each of the threads begins once

        for begun in [self._pool.submit(begin) for _ in range(count)]:
            begun.result()
        torch.set_num_threads(ours)  # it is also what threads that are still to come take

    def each(
        self,
        compute: Callable[[list[Item]], Iterable[Found]],
        texts: Sequence[Item],
        part: Sequence[int],
        tokens: Callable[[Item], int],
    ) -> list[tuple[int, Found]]:
        """What `compute` gives for each of `part`, some of `texts` by their numbers, sorted by `tokens`; each with its number.

        It is called at once with a share of them in each team, or with all of them. What it raises is raised when every team has
        ended.
        """
        shares = dealt(part, lambda i: tokens(texts[i]), self._count)
        if len(shares) == 1:
            return [*zip(part, compute([texts[i] for i in part]), strict=True)]
        futures: list[Future[Iterable[Found]]] = [
            self._pool.submit(compute, [texts[i] for i in share]) for share in shares
        ]
        wait(futures)
        return [
            pair
            for share, future in zip(shares, futures, strict=True)
            for pair in zip(share, future.result(), strict=True)
        ]


ONE: Final = Teams(1, 1)
"""For what cannot run in teams."""


@cache
def teams_for(threads: int) -> Teams:
    """The process's teams for so many threads of PyTorch."""
    return Teams(*teams_of(threads))


def teams_of(threads: int) -> tuple[int, int]:
    """How many teams, and of how many threads each: up to four, with as few threads left over as can be."""
    if threads == 1:
        return 1, 1
    count = max(range(2, _MOST + 1), key=lambda count: (threads // count * count, count))
    return count, threads // count


def dealt(items: Sequence[int], tokens: Callable[[int], int], teams: int) -> list[list[int]]:
    """`items`, which are sorted by their `tokens`, in shares of about as many tokens, each sorted likewise.

    All of them in one share where `LEAST_TOKENS` or an even division cannot be had.
    """
    total = sum(map(tokens, items))
    whole = [[*items]]
    if teams == 1 or total < teams * LEAST_TOKENS:
        return whole
    shares: list[list[int]] = [[] for _ in range(teams)]
    loads = [0] * teams
    for item in reversed(items):  # the longest first, each to the team with the least
        team = loads.index(min(loads))
        shares[team].append(item)
        loads[team] += tokens(item)
    if max(loads) * teams > _UNEVEN * total:
        return whole
    return [share[::-1] for share in shares]
