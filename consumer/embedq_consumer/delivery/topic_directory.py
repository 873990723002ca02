"""How many partitions each topic has, as the brokers said last."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from embedq_consumer.delivery.kafka_producer import Producer

_REFRESH_S: Final = 20.0
"""The longest single look."""


class TopicDirectory:
    """How many partitions each topic has. Asks for all topics at once: so a topic that was deleted is noticed, too."""

    def __init__(self, *, min_age_s: float = 1.0) -> None:
        self._counts: dict[str, int] = {}
        self._min_age_s = min_age_s
        self._refreshed_at = -min_age_s
        self._lock = asyncio.Lock()

    def partitions(self, topic: str) -> int | None:
        """The number of partitions when last seen, None for an unknown topic."""
        return self._counts.get(topic)

    def forget(self, topic: str) -> None:
        """The broker says that it has no such topic: the next job that names it asks again."""
        self._counts.pop(topic, None)

    async def refresh(self, producer: Producer, *, since: float) -> None:
        """Look again, unless another caller has since `since` (monotonic seconds); at most once in `min_age_s`.

        Raises:
            KafkaError, TimeoutError, OSError: no broker answers.
        """
        async with self._lock:
            if self._refreshed_at > since:
                return
            await asyncio.sleep(max(0.0, self._refreshed_at + self._min_age_s - time.monotonic()))
            asked_at = time.monotonic()
            async with asyncio.timeout(_REFRESH_S):
                counts = await producer.partition_counts()
            self._refreshed_at = asked_at  # only now: a look that failed must not pass for one
            self._counts = counts
