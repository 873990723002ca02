"""Whose word counts on who leads a partition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import LeaderNotAvailableError

from embedq_shared.kafka import TopicPartition
from tests.faults.leaders import newest_leaders


def said(*partitions: tuple[int, int, int], topic: str = "t", code: int = 0) -> Any:
    """A broker's answer: (partition, leader, epoch) of one topic."""
    rows: list[Any] = [(0, number, leader, epoch, [], [], [], {}) for number, leader, epoch in partitions]
    return SimpleNamespace(topics=[(code, topic, b"", False, rows, 0, {})])


def test_a_broker_that_stood_still_is_not_believed_that_it_still_leads() -> None:
    stale, fresh = said((0, 1, 4), (1, 2, 7)), said((0, 3, 5), (1, 2, 7))
    for answers in ([stale, fresh], [fresh, stale]):
        assert newest_leaders(answers) == {TopicPartition("t", 0): 3, TopicPartition("t", 1): 2}


def test_while_nobody_leads_a_partition_it_is_asked_again() -> None:
    with pytest.raises(LeaderNotAvailableError):
        newest_leaders([said((0, 1, 4)), said((0, -1, 5))])


def test_a_topic_that_only_some_know_counts_and_one_that_nobody_has_is_left_out() -> None:
    assert newest_leaders([said(code=3), said((0, 1, 0))]) == {TopicPartition("t", 0): 1}
    assert newest_leaders([said(code=3)]) == {}
