"""Seconds of each step of a load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedq_consumer.engine.loading.load_timer import LoadTimer


def ticking() -> Iterator[float]:
    yield from (0.0, 2.0, 10.0, 13.0, 20.0, 21.0)


def test_steps_keep_their_order_and_add_up() -> None:
    clock = ticking()
    timer = LoadTimer(clock=lambda: next(clock))
    for name in ("read", "copy", "read"):
        with timer.step(name):
            pass
    assert list(timer.seconds.items()) == [("read", 3.0), ("copy", 3.0)]


def test_what_a_step_started_on_the_device_counts_for_it() -> None:
    waited: list[str] = []
    timer = LoadTimer(wait=lambda: waited.append("device"))
    with timer.step("copy"):
        assert not waited
    assert waited == ["device"]


def test_a_step_that_raises_is_not_counted() -> None:
    timer = LoadTimer()
    with pytest.raises(ValueError, match="no"), timer.step("read"):
        raise ValueError("no")
    assert timer.seconds == {}
