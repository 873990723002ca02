"""Follows the status topic for as long as the gateway runs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from embedq_gateway.fleet.fleet import Fleet
from embedq_sdk.admin.control import ControlPlaneReader, control_consumer
from embedq_sdk.errors import EmbedError
from embedq_sdk.transport import KafkaConnection
from embedq_shared.topics import Topics

log = logging.getLogger("embedq.gateway")

_CONNECT_S: Final = 30.0
_PAUSE_S: Final = 1.0
"""Between two tries, where Kafka is away or the topic is missing."""
_FRESH_S: Final = 5.0
"""A poll takes a quarter of a second; without one for this long, what is known of the replicas grows old."""


class FleetFollower:
    """Keeps a `Fleet` up to date.

    Invariant: what the fleet knows is never thrown away. While Kafka is away its statuses grow old by themselves.
    """

    def __init__(self, fleet: Fleet, connection: KafkaConnection, topics: Topics) -> None:
        self._fleet = fleet
        self._connection = connection
        self._topics = topics
        self._polled_at: float | None = None

    def fresh(self, now: float) -> bool:
        """Whether the topic was read to its end, and is read on, at monotonic seconds `now`."""
        return self._polled_at is not None and now - self._polled_at < _FRESH_S

    async def run(self) -> None:
        """Follow until cancelled."""
        said = False
        while True:
            try:
                await self._follow()
            except EmbedError as error:
                if not said:
                    log.warning("status_topic_lost", extra={"reason": str(error)})
                said = self._polled_at is None or time.monotonic() - self._polled_at > _FRESH_S
            await asyncio.sleep(_PAUSE_S)

    async def _follow(self) -> None:
        async with self._connection.client(control_consumer(self._connection), _CONNECT_S) as consumer:
            reader = ControlPlaneReader(self._connection, consumer, self._topics, board=self._fleet.board)
            await reader.read_to_end([self._topics.status])
            while True:
                self._polled_at = time.monotonic()
                await reader.poll()
