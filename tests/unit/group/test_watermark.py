"""Which record holds up its partition while others pass, and since when."""

from __future__ import annotations

from aiokafka import TopicPartition

from embedq_consumer.group.watermark import Lowest, Overtaken, Watermarks

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)
NOTHING = float("-inf")


def test_a_record_is_not_overtaken_by_its_age_alone() -> None:
    """A deep queue: all that was answered had been polled before it."""
    watermarks = Watermarks()
    for now in (100.0, 5000.0):
        assert watermarks.look(now, {A: (Lowest(7, polled_at=90.0), NOTHING)}) == {}
        assert watermarks.look(now, {A: (Lowest(7, polled_at=90.0), 90.0)}) == {}


def test_it_is_overtaken_from_the_moment_on_at_which_a_later_one_was_answered() -> None:
    watermarks = Watermarks()
    watermarks.look(100.0, {A: (Lowest(7, polled_at=90.0), 91.0)})
    assert watermarks.look(130.0, {A: (Lowest(7, polled_at=90.0), 91.0)}) == {A: Overtaken(A, 7, 30.0)}


def test_it_stays_overtaken_where_nothing_more_is_polled_since_its_partition_is_full() -> None:
    watermarks = Watermarks()
    for now in (100.0, 200.0, 300.0):
        found = watermarks.look(now, {A: (Lowest(7, polled_at=90.0), 91.0)})
    assert found[A].seconds == 200.0


def test_a_watermark_that_moves_begins_anew() -> None:
    watermarks = Watermarks()
    watermarks.look(100.0, {A: (Lowest(7, polled_at=90.0), 95.0)})
    assert watermarks.look(200.0, {A: (Lowest(8, polled_at=95.0), 95.0)}) == {}
    assert watermarks.look(300.0, {A: (Lowest(8, polled_at=95.0), 99.0)})[A].seconds == 0.0


def test_a_partition_that_is_drained_or_gone_is_forgotten() -> None:
    watermarks = Watermarks()
    first = Lowest(7, polled_at=90.0)
    watermarks.look(100.0, {A: (first, 95.0), B: (first, 95.0)})
    assert watermarks.look(200.0, {B: (first, 95.0)}).keys() == {B}
    assert watermarks.look(300.0, {A: (first, 95.0), B: (first, 95.0)})[A].seconds == 0.0
