"""The one task that reads replies, from one partition of the reply topic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.kafka import KafkaConnection, close, list_topics, require_topics
from embedq_sdk.transport.reply_topic import ReplyTopic
from embedq_sdk.transport.silence import Silence
from embedq_shared.kafka import (
    AIOKafkaConsumer,
    KafkaError,
    TopicPartition,
    UnreadableRecord,
    is_permanent,
    poll_partition,
)

_FETCH_WAIT_MS: Final = 500
"""The broker answers a fetch at least this often, which shows that it is there."""
_POLL_MS: Final = 250
"""How often we look whether it has: half of what a broker may take, so that its silence is noticed soon after."""
_TURN_S: Final = 2 * _POLL_MS / 1000
"""From one look to the next, in an event loop that runs."""
_LOOK_EVERY_S: Final = 2.0
"""Between two looks at the topic. A client of an idle service sends four fetches in that time."""
_LOOK_S: Final = 5.0
_RECONNECT_S: Final = 30.0
_LEAST_CALL_S: Final = 0.1
_REFUSED_PAUSE_S: Final = 1.0
"""Between two tries where the broker says that they will not help."""


class ReplyReader:
    """Delivers every record of one reply partition that is written after `open`, in order.

    Invariants:
        - The position is fixed at the partition's end before the first job is sent, so no reply is missed.
        - A new consumer goes on where the last one stopped: nothing is delivered twice or left out.
        - No consumer group: a rebalance would take the partition away while replies are under way.
        - A topic that was deleted and made again is read from its beginning, at the partition that its number of partitions
          gives; `moved` is called once the new address is known.
    """

    def __init__(
        self,
        connection: KafkaConnection,
        topic: str,
        choose: Callable[[int], int],
        deliver: Callable[[Any], None],
        refused: Callable[[KafkaRefused | TopicMissing], None],
        moved: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._topic = topic
        self._choose = choose
        self._deliver = deliver
        self._refused = refused
        self._moved = moved
        self._identity = ReplyTopic()
        self._is_behind = False
        """Whether the consumer reads a topic that is gone."""
        self._silence = Silence(_TURN_S)
        self._consumer: AIOKafkaConsumer | None = None
        self._position: int | None = None
        self.partition = -1
        """The partition that is read; -1 before `open`."""

    def silent_for(self, now: float) -> float:
        """Seconds, at monotonic seconds `now`, for which the broker has answered no fetch while we listened; infinite without
        a connection."""
        return float("inf") if self._consumer is None else self._silence.at(now)

    async def open(self, topics: list[str], timeout: float) -> set[str]:
        """Connect, check that `topics` exist, choose the partition and go to its end. Returns the names of all topics.

        Raises:
            KafkaUnavailable, TopicMissing.
        """
        end = time.monotonic() + timeout
        consumer = await self._connect(timeout)
        try:
            names = await require_topics(self._connection, consumer, topics, end - time.monotonic())
            self._consumer = consumer
            await self._look(consumer)
            left = max(_LEAST_CALL_S, end - time.monotonic())
            await self._connection.call(
                left, "finding the end of the reply partition", self._go_to_end(consumer)
            )
        except BaseException:
            self._consumer = None
            await close(consumer)
            raise
        return names

    async def topics(self) -> set[str]:
        """The names of all topics.

        Raises:
            KafkaUnavailable: no broker says them.
        """
        if self._consumer is None:
            raise self._connection.unavailable("listing the topics: not connected")
        return await list_topics(self._connection, self._consumer, _LOOK_S)

    async def _go_to_end(self, consumer: AIOKafkaConsumer) -> None:
        self.partition = 0
        partitions = consumer.partitions_for_topic(self._topic)
        if partitions is None:
            # Assigning one partition makes the client ask for the topic's metadata, which has the number of partitions.
            consumer.assign([TopicPartition(self._topic, 0)])
            await consumer.position(TopicPartition(self._topic, 0))
            partitions = consumer.partitions_for_topic(self._topic) or {0}
        self.partition = self._choose(len(partitions))
        here = TopicPartition(self._topic, self.partition)
        consumer.assign([here])
        await consumer.seek_to_end(here)
        self._position = await consumer.position(here)

    async def _connect(self, timeout: float) -> AIOKafkaConsumer:
        return await self._connection.connect(
            lambda: self._connection.consumer(fetch_max_wait_ms=_FETCH_WAIT_MS, fetch_max_bytes=32 << 20),
            timeout,
        )

    async def close(self) -> None:
        """Close the consumer."""
        if self._consumer is not None:
            await close(self._consumer)
            self._consumer = None

    async def run(self) -> None:
        """Deliver records until cancelled."""
        while True:
            consumer = self._consumer or await self._reconnect()
            try:
                await self._read(consumer)
                await self.close()
            except (KafkaError, OSError) as error:
                await self.close()
                if is_permanent(error):
                    await self._refuse(self._connection.failed(error, "reading the replies"))

    async def watch(self) -> None:
        """Look again and again, until cancelled, whether the topic is still the one that is read."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._consumer is not None:
                await self._look(self._consumer)

    async def _look(self, consumer: AIOKafkaConsumer) -> None:
        """Where no broker answers, or says which topic it is, nothing is known."""
        try:
            async with asyncio.timeout(_LOOK_S):
                facts = await consumer.topic_facts(self._topic)
        except (KafkaError, OSError, TimeoutError):
            return
        news = self._identity.note(facts, time.monotonic())
        if news == "gone":
            self._refused(TopicMissing(servers=self._connection.servers, topic=self._topic))
        elif news == "made anew" and facts is not None:
            self.partition = self._choose(facts.partitions)
            self._position = 0
            self._is_behind = True
            self._moved()

    async def _refuse(self, error: KafkaUnavailable) -> None:
        """No job of now will see its reply. Somebody may still put it right, so that reading is tried again."""
        if isinstance(error, KafkaRefused):
            self._refused(error)
        await asyncio.sleep(_REFUSED_PAUSE_S)

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """Until the topic is another one."""
        here = TopicPartition(self._topic, self.partition)
        while not self._is_behind:
            found = await poll_partition(consumer, here, timeout_ms=_POLL_MS)
            self._silence.look(consumer.last_poll_timestamp(here), time.monotonic())
            if self._is_behind:
                return  # these may lie anywhere in the new topic, and will come again
            for record in found:
                self._position = record.offset + 1
                if not isinstance(record, UnreadableRecord):  # the service writes none: it is foreign
                    self._deliver(record)
            if found:
                await asyncio.sleep(0)  # who waited for these goes on before the next poll is prepared

    async def _reconnect(self) -> AIOKafkaConsumer:
        """A new consumer where the last one was."""
        while True:
            try:
                consumer = await self._connect(_RECONNECT_S)
            except KafkaRefused as refused:
                await self._refuse(refused)
                continue
            except KafkaUnavailable:
                continue
            here = TopicPartition(self._topic, self.partition)
            consumer.assign([here])
            if self._position is not None:
                consumer.seek(here, self._position)
            self._is_behind = False
            self._silence = Silence(_TURN_S)
            self._consumer = consumer
            return consumer
