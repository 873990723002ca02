"""Seconds of each step of a load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq_consumer.engine import load_encoder
from embedq_consumer.engine.loading.load_timer import Phases
from tests.helpers.tiny_models import make_tiny_bert


def ticking() -> Iterator[float]:
    yield from (0.0, 2.0, 10.0, 13.0, 20.0, 21.0)


def test_steps_keep_their_order_and_add_up() -> None:
    clock = ticking()
    phases = Phases(clock=lambda: next(clock))
    for name in ("read", "copy", "read"):
        with phases.step(name):
            pass
    assert list(phases.seconds.items()) == [("read", 3.0), ("copy", 3.0)]


def test_what_a_step_started_on_the_device_counts_for_it() -> None:
    waited: list[str] = []
    phases = Phases(wait=lambda: waited.append("device"))
    with phases.step("copy"):
        assert not waited
    assert waited == ["device"]


def test_a_step_that_raises_counts_nothing() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="no"), phases.step("read"):
        raise ValueError("no")
    assert phases.seconds == {}


def test_an_encoder_tells_how_it_was_loaded(tmp_path: Path) -> None:
    encoder = load_encoder(make_tiny_bert(tmp_path), device="cpu")
    assert set(encoder.phases) >= {"directory", "weights", "device", "digest", "proof"}
    assert all(seconds >= 0 for seconds in encoder.phases.values())
    assert encoder.kernels == {"attention": "torch_sdpa"}
