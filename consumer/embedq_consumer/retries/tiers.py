"""Which jobs are run again, and after how long. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from embedq_consumer.group import Ticket
from embedq_shared.topics import MAX_RETRY_TIERS, Lane, Topics

HEALS: Final[frozenset[str]] = frozenset({"internal", "undeliverable"})
"""Errors that may be gone the next time. Not `overloaded`, the third that a sender may try again after: it asks the sender to
slow down, and a job that waits in a topic would hide that."""


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One retry topic, numbered from 1, and how long its records wait. `partitions` is how many it had at the start."""

    number: int
    topic: str
    delay_s: float
    partitions: int = 1


class RetryTiers(msgspec.Struct, frozen=True, kw_only=True):
    """The tiers in use, in order, and retry topics that are left over from other settings.

    What is left over is read as well, without a wait: no record is stranded by a setting.
    """

    tiers: tuple[Tier, ...] = ()
    left_over: tuple[str, ...] = ()

    @property
    def topics(self) -> tuple[str, ...]:
        """Every retry topic to read."""
        return (*(tier.topic for tier in self.tiers), *self.left_over)

    def delay_s(self, topic: str) -> float | None:
        """The longest that a record of this topic waits; None for one that is no retry topic."""
        if topic in self.left_over:
            return 0.0
        return next((tier.delay_s for tier in self.tiers if tier.topic == topic), None)

    def after(self, topic: str) -> Tier | None:
        """The next tier for a job that was read from this topic: of a lane the first, of the last tier none.

        It follows from the topic alone. What a record says of itself counts for nothing, so nobody skips or repeats a tier.
        """
        if topic in self.left_over:
            return None
        passed = next((tier.number for tier in self.tiers if tier.topic == topic), 0)
        return next((tier for tier in self.tiers if tier.number > passed), None)


def existing_tiers(
    topics: Topics, delays_s: Sequence[float], partitions: Callable[[str], int | None]
) -> tuple[RetryTiers, list[str]]:
    """The tiers of these delays whose topics exist, and the names of those that are missing."""
    tiers: list[Tier] = []
    missing: list[str] = []
    for number, delay_s in enumerate(delays_s, 1):
        topic = topics.retry(number)
        if (count := partitions(topic)) is None:
            missing.append(topic)
        else:
            tiers.append(Tier(number=number, topic=topic, delay_s=delay_s, partitions=max(1, count)))
    others = (topics.retry(number) for number in range(len(delays_s) + 1, MAX_RETRY_TIERS + 1))
    left_over = tuple(topic for topic in others if partitions(topic) is not None)
    return RetryTiers(tiers=tuple(tiers), left_over=left_over), missing


class RetryPolicy:
    """Decides of an answer whether its job is run again instead."""

    def __init__(self, tiers: RetryTiers) -> None:
        self.tiers = tiers

    def tier_for(
        self, ticket: Ticket, lane: Lane, codes: Iterable[str], deadline_ms: int | None, now_ms: float
    ) -> Tier | None:
        """Where a job goes that would be answered with nothing but errors, of these codes; None: it is answered.

        Interactive jobs have a caller who waits, and who tries again by itself. One that ran under suspicion of having killed a
        process may go: it has not killed this one.
        """
        if lane != "bulk" or HEALS.isdisjoint(codes):
            return None
        tier = self.tiers.after(ticket.partition.topic)
        if tier is None or (deadline_ms is not None and now_ms + tier.delay_s * 1000 >= deadline_ms):
            return None
        return tier
