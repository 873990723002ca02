"""Which topics there are, asked of a broker that may have started a moment ago."""

from __future__ import annotations

from typing import cast

import pytest
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError

from embedq_sdk import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.kafka import KafkaConnection, list_topics, require_topics
from embedq_shared.kafka import AIOKafkaConsumer, KafkaOptions

CONNECTION = KafkaConnection(KafkaOptions(servers="kafka:9092"))
STARTING = KafkaError("Unable to get cluster metadata over all known brokers")


class Consumer:
    """Says one thing after the other, and the last one for ever."""

    def __init__(self, *answers: set[str] | KafkaError) -> None:
        self._answers = [*answers]
        self.asked = 0

    async def topics(self) -> set[str]:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, KafkaError):
            raise answer
        return answer


def consumer_of(*answers: set[str] | KafkaError) -> tuple[Consumer, AIOKafkaConsumer]:
    consumer = Consumer(*answers)
    return consumer, cast("AIOKafkaConsumer", consumer)


async def test_a_broker_that_knows_no_broker_yet_is_asked_again() -> None:
    asked, consumer = consumer_of(STARTING, STARTING, {"embed.jobs", "other"})
    assert await require_topics(CONNECTION, consumer, ["embed.jobs"], 30) == {"embed.jobs", "other"}
    assert asked.asked == 3


async def test_a_broker_that_never_says_it_is_given_up_in_time_and_the_error_has_its_reason() -> None:
    asked, consumer = consumer_of(STARTING)
    with pytest.raises(KafkaUnavailable, match=r"listing the topics: .*over all known brokers"):
        await require_topics(CONNECTION, consumer, ["embed.jobs"], 0.2)
    assert asked.asked > 1


async def test_a_topic_that_is_not_there_is_missing_at_once() -> None:
    asked, consumer = consumer_of({"other"})
    with pytest.raises(TopicMissing, match=r"embed\.jobs"):
        await require_topics(CONNECTION, consumer, ["other", "embed.jobs"], 30)
    assert asked.asked == 1


async def test_a_broker_that_refuses_is_not_asked_again() -> None:
    asked, consumer = consumer_of(TopicAuthorizationFailedError())
    with pytest.raises(KafkaRefused):
        await require_topics(CONNECTION, consumer, ["embed.jobs"], 30)
    assert asked.asked == 1


async def test_one_look_is_one_look() -> None:
    asked, consumer = consumer_of(STARTING, {"embed.jobs"})
    with pytest.raises(KafkaUnavailable):
        await list_topics(CONNECTION, consumer, 30)
    assert asked.asked == 1
