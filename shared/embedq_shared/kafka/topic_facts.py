"""Which topic it is that has a name now."""

from __future__ import annotations

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    UnknownTopicOrPartitionError,
    UnsupportedVersionError,
)

from embedq_shared.kafka.requests import TopicFacts, TopicIds, topics_of


async def topic_facts(client: AIOKafkaClient, topic: str) -> TopicFacts | None:
    """A topic's id and number of partitions, as some broker has them; None if it says that there is no such topic. Asking
    creates none.

    Raises:
        KafkaError: nothing can be said now; `UnsupportedVersionError` for ever, by a broker older than 2.8.
    """
    node = client.get_random_node()
    if node is None:
        raise KafkaConnectionError("no broker is known")
    try:
        response = await client.send(node, TopicIds([topic]))
    except NotImplementedError:  # aiokafka: the broker has no such version
        raise UnsupportedVersionError from None
    facts = topics_of(response).get(topic, UnknownTopicOrPartitionError())
    if isinstance(facts, UnknownTopicOrPartitionError):
        return None
    if isinstance(facts, KafkaError):
        raise facts
    return facts
