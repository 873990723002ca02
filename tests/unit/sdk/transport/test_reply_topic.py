"""Which topic has the name of the reply topic, by what brokers say of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_sdk.transport.reply_topic import GONE_S, ReplyTopic
from embedq_shared.kafka import TopicFacts


def facts(id: str, partitions: int = 4) -> TopicFacts:
    return TopicFacts(id, partitions)


def test_another_id_is_another_topic_and_is_told_once() -> None:
    topic = ReplyTopic()
    assert topic.note(facts("one"), 0) == "same"
    assert topic.note(facts("one"), 2) == "same"
    assert topic.note(facts("two"), 4) == "made anew"
    assert topic.note(facts("two"), 6) == "same"
    assert topic.note(facts("three"), 8) == "made anew"


def test_a_broker_that_lags_behind_brings_no_topic_back() -> None:
    topic = ReplyTopic()
    topic.note(facts("one"), 0)
    topic.note(facts("two"), 2)
    assert topic.note(facts("one"), 4) == "same"
    assert topic.note(facts("two"), 6) == "same"


def test_a_broker_without_ids_says_nothing() -> None:
    topic = ReplyTopic()
    assert topic.note(facts(""), 0) == "same"
    assert topic.note(facts("one"), 2) == "same"
    assert topic.note(facts(""), 4) == "same"
    assert topic.note(facts("two"), 6) == "made anew"


def test_it_is_gone_once_that_was_said_for_long_enough_and_as_long_as_it_is() -> None:
    topic = ReplyTopic()
    topic.note(facts("one"), 0)
    assert topic.note(None, 2) == "same"
    assert topic.note(None, 1.9 + GONE_S) == "same"
    assert topic.note(None, 2 + GONE_S) == "gone"
    assert topic.note(None, 4 + GONE_S) == "gone"
    assert topic.note(facts("one"), 20) == "same", "it was never gone"
    assert topic.note(None, 22) == "same"
    assert topic.note(facts("two"), 24) == "made anew"


@pytest.mark.parametrize("seconds", [0.0, GONE_S / 2])
def test_a_topic_that_is_made_anew_soon_was_never_gone(seconds: float) -> None:
    topic = ReplyTopic()
    topic.note(facts("one"), 0)
    topic.note(None, 10)
    assert topic.note(facts("two"), 10 + seconds) == "made anew"


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=30))
def test_each_id_is_news_at_most_once(ids: list[str]) -> None:
    topic = ReplyTopic()
    news = [(id, topic.note(facts(id), now)) for now, id in enumerate(ids)]
    told = [id for id, its in news if its == "made anew"]
    assert len(told) == len(set(told))
    assert told == list(dict.fromkeys(id for id in ids if id))[1:]
