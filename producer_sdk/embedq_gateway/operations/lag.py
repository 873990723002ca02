"""How many jobs wait, asked again and again: the clients stay connected between two answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from embedq_gateway.operations.history import SAMPLE_S, History
from embedq_sdk.errors import EmbedError
from embedq_sdk.transport.kafka import KafkaConnection, close, require_topics
from embedq_shared.kafka import AIOKafkaAdminClient, AIOKafkaConsumer, group_lag
from embedq_shared.topics import LANES, Lane, Topics

log = logging.getLogger("embedq.gateway")

_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 5.0


class LagReader:
    """Asks the brokers for the lag of the service's groups, one for each pool. In one task."""

    def __init__(self, connection: KafkaConnection, topics: Topics, group: str) -> None:
        self._connection = connection
        self._topics = topics
        self._group = group
        self._clients: tuple[AIOKafkaAdminClient, AIOKafkaConsumer] | None = None
        self._pools: list[Topics] = []
        """Those whose topics were there when the clients connected."""

    async def read(self) -> Mapping[Lane, int]:
        """The jobs of each lane, of all pools together, that the service has not committed.

        Raises:
            KafkaUnavailable, TopicMissing: the brokers do not say; the next call connects anew.
        """
        try:
            admin, consumer = await self._connected()
            lag = dict.fromkeys(LANES, 0)
            for pool in self._pools:
                found = await self._connection.call(
                    _ANSWER_S,
                    "reading the lag",
                    group_lag(admin, consumer, pool.group(self._group), pool.lanes),
                )
                for lane in LANES:
                    lag[lane] += found[pool.lane(lane)]
        except EmbedError:
            await self.close()
            raise
        return lag

    async def close(self) -> None:
        """Disconnect. It may be asked again later."""
        clients, self._clients = self._clients, None
        for client in clients or ():
            await close(client)

    async def _connected(self) -> tuple[AIOKafkaAdminClient, AIOKafkaConsumer]:
        if self._clients is None:
            async with contextlib.AsyncExitStack() as made:
                admin = await self._connection.connect(self._connection.admin, _CONNECT_S)
                made.push_async_callback(close, admin)
                consumer = await self._connection.connect(self._connection.consumer, _CONNECT_S)
                made.push_async_callback(close, consumer)
                known = await require_topics(self._connection, consumer, list(self._topics.lanes), _ANSWER_S)
                self._pools = [self._topics, *map(self._topics.of, self._topics.pools_among(known))]
                made.pop_all()
            self._clients = admin, consumer
        return self._clients


async def sample(history: History, reader: LagReader, tokens_so_far: Callable[[], float]) -> None:
    """Add to the history every few seconds, until cancelled."""
    said = False
    try:
        while True:
            try:
                lag = await reader.read()
                said = False
            except EmbedError as error:
                if not said:
                    log.warning("lag_not_known", extra={"reason": str(error)})
                lag, said = None, True
            history.add(time.time(), lag, await asyncio.to_thread(tokens_so_far))
            await asyncio.sleep(SAMPLE_S)
    finally:
        await reader.close()
