"""A topic that was deleted and made again under its name is another one: it has another id, and offsets of its own.

Kafka's commits name a topic and not its id. A broker deletes a topic's offsets together with it, but whoever has jobs of it in
flight commits them a moment later, to the new topic. So each commit says which topic it is of, in its metadata: one that is
of another topic than the present one says nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

import msgspec
import structlog

from embedq_consumer.group.member import TopicIdSource
from embedq_consumer.group.offsets import OffsetLedger
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import KafkaError, OffsetAndMetadata, TopicPartition

log = structlog.get_logger()

_EVERY_S: Final = 1.0
"""Between two looks: so long a new topic's first jobs may wait for us to notice it. A look is one small request."""
_LOOK_S: Final = 5.0
"""The coordinator is as fast as this, or commits do not get through either."""


class _Mark(msgspec.Struct, frozen=True):
    """The part of a commit's metadata that is about its topic."""

    topic_id: str = ""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Where a partition begins for us.

    `offset` is None where nothing was committed. `topic_id` is "" where it is not known. `is_new`: what was committed is an
    offset of another topic of the same name.
    """

    offset: int | None
    topic_id: str
    is_new: bool = False


def mark(topic_id: str) -> str:
    """The metadata of a commit that has nothing else to say."""
    return msgspec.json.encode(_Mark(topic_id)).decode() if topic_id else ""


def topic_id_of(metadata: str) -> str:
    """Of which topic a commit is, by its metadata; "" if that does not say."""
    try:
        return msgspec.json.decode(metadata, type=_Mark).topic_id if metadata else ""
    except msgspec.DecodeError:  # a ValidationError, too: somebody else's words
        return ""


def start_of(stored: OffsetAndMetadata | None, topic_id: str) -> Start:
    """Where to begin in the topic of this id ("" if it is not known), after what the group has stored for its name."""
    if stored is None:
        return Start(offset=None, topic_id=topic_id)
    written = topic_id_of(stored.metadata)
    if written and topic_id and written != topic_id:
        return Start(offset=0, topic_id=topic_id, is_new=True)
    return Start(offset=stored.offset, topic_id=topic_id or written)


class TopicWatch:
    """Asks for the topics' ids again and again, and says which partitions of the ledger belong to a topic that is gone.

    Invariants:
        - A topic that is not there, or whose id is not known, changes nothing.
        - An id that was replaced never counts again: a broker that lags behind cannot bring a topic back.
        - Each topic that was made anew is logged and counted once.
    """

    def __init__(self, source: TopicIdSource, ledger: OffsetLedger, metrics: Metrics) -> None:
        self._source = source
        self._ledger = ledger
        self._metrics = metrics
        self._topics: list[str] = []
        self._remade: Callable[[frozenset[TopicPartition]], None] = lambda _: None
        self._ids: dict[str, str] = {}
        self._gone: set[str] = set()
        self._told: set[str] = set()
        self._due = 0.0

    def follow(self, topics: Collection[str], remade: Callable[[frozenset[TopicPartition]], None]) -> None:
        """Watch these; `remade` hears of partitions whose topic was made anew, in the step in which that is found out."""
        self._topics = list(topics)
        self._remade = remade

    async def look(self) -> None:
        """Ask now.

        Raises:
            KafkaError, TimeoutError: nothing can be said.
        """
        self._due = time.monotonic() + _EVERY_S
        async with asyncio.timeout(_LOOK_S):
            found = await self._source.topic_ids(self._topics)
        self._note(found)

    async def look_now_and_then(self) -> None:
        """Ask if the last time was a while ago. A broker that does not answer is asked again."""
        if time.monotonic() < self._due:
            return
        try:
            await self.look()
        except (KafkaError, TimeoutError) as error:
            log.warning("topic_ids_unknown", reason=type(error).__name__)

    def start(self, partition: TopicPartition, stored: OffsetAndMetadata | None) -> Start:
        """Where to begin in the topic as it was seen last."""
        found = start_of(stored, self._ids.get(partition.topic, ""))
        if found.is_new:
            self._tell(partition.topic, found.topic_id)
        return found

    def _note(self, found: Mapping[str, str]) -> None:
        self._ids = {topic: its for topic, its in found.items() if its not in self._gone}
        strange = set()
        for partition in self._ledger.partitions:
            before, now = self._ledger.topic_id(partition), self._ids.get(partition.topic, "")
            if not before and now:
                self._ledger.name_topic(partition, now)
            elif now and before != now:
                self._gone.add(before)
                strange.add(partition)
        for topic in {partition.topic for partition in strange}:
            self._tell(topic, self._ids[topic])
        if strange:
            self._remade(frozenset(strange))

    def _tell(self, topic: str, topic_id: str) -> None:
        if topic_id in self._told:
            return
        self._told.add(topic_id)
        self._metrics.topics_remade.inc()
        jobs = sum(self._ledger.in_flight(one) for one in self._ledger.partitions if one.topic == topic)
        log.warning("topic_made_anew", topic=topic, topic_id=topic_id, jobs_in_flight=jobs)
