"""Bulk jobs whose fault may heal wait in topics of their own, tier by tier, and are run again.

The intake reads these topics like a lane's, but for each record only once it is due. So a retry has all that a job has: its
partition's offset, its place in a transaction, and the count of deaths; and nobody but the service decides how often.
"""

from collections.abc import Callable, Sequence

import structlog

from embedq_consumer.retries.past import Attempt, Past, headers_of, past_of
from embedq_consumer.retries.tier_consumer import TierConsumer
from embedq_consumer.retries.tiers import HEALS, RetryPolicy, RetryTiers, Tier, existing_tiers
from embedq_shared.topics import Topics

__all__ = [
    "HEALS",
    "Attempt",
    "Past",
    "RetryPolicy",
    "RetryTiers",
    "Tier",
    "TierConsumer",
    "headers_of",
    "open_tiers",
    "past_of",
]

log = structlog.get_logger()


def open_tiers(
    topics: Topics, delays_s: Sequence[float], partitions: Callable[[str], int | None]
) -> RetryTiers:
    """The tiers that have topics now. The group reads no others before the next start, so no job goes there either."""
    tiers, missing = existing_tiers(topics, delays_s, partitions)
    if missing:
        log.warning(
            "retry_topics_missing", topics=missing, hint="`embedq topics create` makes them; then restart"
        )
    return tiers
