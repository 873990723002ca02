"""Which jobs are run again, and where they go."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from embedq_consumer.group import Ticket
from embedq_consumer.retries import HEALS, RetryPolicy, RetryTiers, Tier, open_tiers
from embedq_consumer.retries.tiers import existing_tiers
from embedq_shared.kafka import TopicPartition
from embedq_shared.messages import RETRYABLE
from embedq_shared.topics import MAX_RETRY_TIERS, Lane, Topics

TOPICS = Topics("t")
NOW_MS = 1_000_000.0
FIRST, SECOND = (
    Tier(number=number, topic=TOPICS.retry(number), delay_s=delay)
    for number, delay in ((1, 30.0), (2, 300.0))
)
TIERS = RetryTiers(tiers=(FIRST, SECOND))


def ticket(topic: str = TOPICS.bulk) -> Ticket:
    return Ticket(TopicPartition(topic, 0), 1, 7)


def tier_for(
    code: str = "internal",
    *,
    topic: str = TOPICS.bulk,
    lane: Lane = "bulk",
    deadline_ms: int | None = None,
    policy: RetryPolicy | None = None,
) -> Tier | None:
    return (policy or RetryPolicy(TIERS)).tier_for(ticket(topic), lane, [code], deadline_ms, NOW_MS)


def test_a_bulk_job_whose_fault_may_heal_goes_from_tier_to_tier_and_is_then_answered() -> None:
    assert tier_for() == FIRST
    assert tier_for(topic=FIRST.topic) == SECOND
    assert tier_for(topic=SECOND.topic) is None


def test_an_interactive_job_is_answered_at_once() -> None:
    assert tier_for(topic=TOPICS.jobs, lane="interactive") is None


@pytest.mark.parametrize("code", ["malformed", "text_too_long", "invalid_header", "expired", "crashed"])
def test_what_is_the_senders_fault_or_does_not_heal_is_answered_at_once(code: str) -> None:
    assert tier_for(code) is None


def test_what_heals_may_be_tried_again_by_its_sender_too_but_asks_nobody_to_slow_down() -> None:
    assert RETRYABLE - {"overloaded"} == HEALS


@pytest.mark.parametrize(("left_ms", "expected"), [(30_000, None), (30_001, FIRST), (-1, None)])
def test_a_deadline_must_leave_the_time_to_wait(left_ms: int, expected: Tier | None) -> None:
    assert tier_for(deadline_ms=int(NOW_MS) + left_ms) == expected


def test_without_tiers_every_job_is_answered() -> None:
    assert tier_for(policy=RetryPolicy(RetryTiers())) is None


@given(st.lists(st.floats(0, 100), max_size=MAX_RETRY_TIERS), st.sets(st.integers(1, MAX_RETRY_TIERS)))
def test_a_job_passes_each_tier_once_and_comes_to_an_end_whichever_topics_there_are(
    delays: list[float], there: set[int]
) -> None:
    known = {TOPICS.retry(number) for number in there}
    tiers, missing = existing_tiers(TOPICS, delays, lambda topic: 3 if topic in known else None)
    assert set(tiers.topics) == known, "what exists is read, whatever the setting says"
    assert {*missing, *(tier.topic for tier in tiers.tiers)} == {
        TOPICS.retry(n) for n in range(1, len(delays) + 1)
    }
    for begin in (TOPICS.bulk, *tiers.topics):
        passed, topic = [begin], begin
        while (tier := tiers.after(topic)) is not None:
            topic = tier.topic
            passed.append(topic)
        assert len(set(passed)) == len(passed) <= len(delays) + 1
        numbers = [tier.number for tier in tiers.tiers if tier.topic in passed]
        assert all(one < other for one, other in pairwise(numbers))


def test_what_is_left_over_from_other_settings_does_not_wait_and_goes_nowhere_else() -> None:
    tiers, _ = existing_tiers(TOPICS, [30.0], {TOPICS.retry(1): 2, TOPICS.retry(2): 2}.get)
    assert (tiers.delay_s(TOPICS.retry(1)), tiers.delay_s(TOPICS.retry(2))) == (30.0, 0.0)
    assert tiers.delay_s(TOPICS.bulk) is None
    assert tiers.after(TOPICS.retry(2)) is None


def test_topics_that_are_missing_are_named_once() -> None:
    with capture_logs() as logs:
        tiers = open_tiers(TOPICS, [30.0, 300.0], {TOPICS.retry(2): 4}.get)
    [said] = logs
    assert (said["event"], said["topics"]) == ("retry_topics_missing", [TOPICS.retry(1)])
    assert [(tier.number, tier.partitions) for tier in tiers.tiers] == [(2, 4)]
    with capture_logs() as logs:
        open_tiers(TOPICS, [], lambda topic: None)
    assert logs == []
