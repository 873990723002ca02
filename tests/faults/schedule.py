"""Which fault comes when: drawn from a seed, so that a run can be told again. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from tests.faults.points import POINTS, RARE_POINTS, RELOAD_POINTS, TRANSACTION_POINTS


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of fault: whom it may meet, and how long it lasts at least and at most, in seconds."""

    track: str
    least_s: float = 0.0
    most_s: float = 0.0


KINDS: Final[dict[str, Kind]] = {
    # A worker. One that died or left is started again by the harness; for `least_s` to `most_s` it is away or stands still.
    "kill": Kind(track="workers", least_s=0.0, most_s=3.0),
    "kill_at": Kind(track="workers", least_s=0.0, most_s=3.0),
    "leave": Kind(track="workers", least_s=0.0, most_s=3.0),
    "freeze": Kind(track="workers", least_s=2.0, most_s=12.0),
    "freeze_at": Kind(track="workers", least_s=2.0, most_s=12.0),
    "kill_in_reload": Kind(track="workers", least_s=0.0, most_s=3.0),
    "reload": Kind(track="workers", least_s=2.0, most_s=4.0),
    "kill_in_transaction": Kind(track="workers", least_s=0.0, most_s=3.0),
    "freeze_in_transaction": Kind(track="workers", least_s=2.0, most_s=12.0),
    # A broker. Partitions that it led get another leader after `broker.session.timeout.ms`, which is 6 s here; what it
    # holds copies of is under-replicated meanwhile.
    "broker_killed": Kind(track="brokers", least_s=0.0, most_s=10.0),
    "coordinator_killed": Kind(track="brokers", least_s=0.0, most_s=10.0),
    "broker_frozen": Kind(track="brokers", least_s=1.0, most_s=12.0),
    "coordinator_frozen": Kind(track="brokers", least_s=1.0, most_s=12.0),
    "broker_disk_full": Kind(
        track="brokers", least_s=2.0, most_s=8.0
    ),  # of the one broker whose disk is small
    # The network between clients and a broker that is well.
    "broker_reset": Kind(track="brokers"),
    "broker_cut": Kind(track="brokers", least_s=1.0, most_s=15.0),
    "broker_half_open": Kind(track="brokers", least_s=1.0, most_s=15.0),
    "broker_late": Kind(track="brokers", least_s=2.0, most_s=10.0),
    "broker_slow": Kind(track="brokers", least_s=2.0, most_s=10.0),
    "requests_held": Kind(track="brokers", least_s=1.0, most_s=15.0),
    "answers_held": Kind(track="brokers", least_s=1.0, most_s=15.0),
    "all_brokers_cut": Kind(track="brokers", least_s=2.0, most_s=15.0),
    # Redis and the network before it.
    "redis_killed": Kind(track="redis", least_s=0.0, most_s=8.0),
    "redis_frozen": Kind(track="redis", least_s=1.0, most_s=8.0),
    "redis_full": Kind(track="redis", least_s=1.0, most_s=8.0),
    "redis_read_only": Kind(track="redis", least_s=1.0, most_s=8.0),
    "redis_cut": Kind(track="redis", least_s=1.0, most_s=8.0),
    "redis_half_open": Kind(track="redis", least_s=1.0, most_s=8.0),
    "redis_late": Kind(track="redis", least_s=1.0, most_s=8.0),
    "redis_slow": Kind(track="redis", least_s=1.0, most_s=8.0),
    # A client's own reply topic.
    "topic_deleted": Kind(track="topics", least_s=2.0, most_s=10.0),
}

TRACKS: Final = ("workers", "brokers", "redis", "topics")
"""Faults of one track come one after the other, those of two tracks at the same time."""
GAPS_S: Final = {"workers": (1.0, 6.0), "brokers": (4.0, 12.0), "redis": (1.0, 8.0), "topics": (10.0, 30.0)}
"""Between the end of a fault and the beginning of the next one, at least and at most. Brokers need the longest to be whole
again: one more lost before that, and two of three copies are away, which is not what three copies are for."""
_PASSES: Final = 40
"""A kill at a point comes at one of its first passes, if the point is one that every micro-batch or transaction passes."""
_OFTEN: Final = (POINTS.keys() - RARE_POINTS) | TRANSACTION_POINTS.keys()
"""At the first pass of each order, faults would meet what runs alone for its suspicion again and again: nothing else of its replica
runs then, so the next transaction is its answer's."""
TRANSACTIONAL: Final = frozenset({"kill_in_transaction", "freeze_in_transaction"})
FRAGILE: Final = frozenset({"topic_deleted"})
"""Faults that take an address away: jobs that name it may be answered by an error."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Wait, let a fault begin, and end it after `seconds`.

    `target` is the number of the worker or broker. `point` and `passes` are where a worker ends.
    """

    after_s: float
    fault: str
    target: int
    seconds: float
    point: str = ""
    passes: int = 0


def steps(
    seed: int, track: str, kinds: Sequence[str], *, workers: int, brokers: int, gaps: float = 1.0
) -> Iterator[Step]:
    """The faults of one track, without end; none if no kind belongs to it. Equal arguments give equal steps.

    `gaps` makes the times between faults so many times longer, and leaves the faults as they are.
    """
    choices = [name for name in KINDS if name in kinds and KINDS[name].track == track]
    draw = random.Random(f"{seed} {track}")
    while choices:
        # Every kind once in each round, in any order: a short run meets many kinds.
        for name in draw.sample(choices, len(choices)):
            kind = KINDS[name]
            yield Step(
                after_s=round(gaps * draw.uniform(*GAPS_S[track]), 2),
                fault=name,
                target=draw.randrange(workers) if track == "workers" else draw.randint(1, brokers),
                seconds=round(draw.uniform(kind.least_s, kind.most_s), 2),
                point=(point := draw.choice(sorted(_points_of(name))) if _points_of(name) else ""),
                passes=draw.randint(1, _PASSES) if point in _OFTEN else 1,
            )


def _points_of(fault: str) -> Sequence[str]:
    match fault:
        case "kill_at" | "freeze_at":
            return list(POINTS)
        case "kill_in_reload":
            return list(RELOAD_POINTS)
        case "kill_in_transaction" | "freeze_in_transaction":
            return list(TRANSACTION_POINTS)
        case _:
            return []
