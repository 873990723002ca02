"""What a lone job's texts may do before the cache has answered."""

from __future__ import annotations

import pytest

from embedq_consumer.batching.head_start import SHORT_BYTES, HeadStart
from embedq_consumer.engine import Text
from embedq_shared.messages import Chunking

SHORT = Text("a")


def quick(seconds: float = 0.005, tokens: int = 20) -> HeadStart:
    """The cache lacked a text, and a micro-batch took so long."""
    found = HeadStart()
    found.lacked()
    found.ran(tokens, seconds)
    return found


def test_nothing_begins_until_the_cache_has_lacked_a_text_and_then_once() -> None:
    head_start = HeadStart()
    assert not head_start.begin([SHORT])
    head_start.lacked()
    assert head_start.begin([SHORT])
    assert not head_start.begin([SHORT])
    head_start.lacked()
    assert head_start.begin([SHORT])


@pytest.mark.parametrize(
    "texts", [[], [SHORT] * 5, [Text("x" * 2_001)], [Text("x" * 1_001, prompt="y" * 1_000)]]
)
def test_only_a_few_short_texts_become_tokens_and_others_leave_the_next_ones_their_turn(
    texts: list[Text],
) -> None:
    head_start = quick()
    assert not head_start.begin(texts)
    assert head_start.begin([SHORT] * 4)


def test_a_lone_short_text_runs_where_micro_batches_of_few_tokens_are_quick() -> None:
    assert quick(0.005).may_run([SHORT])
    assert not quick(0.026).may_run([SHORT])


def test_nothing_runs_before_it_is_known_how_long_few_tokens_take() -> None:
    head_start = HeadStart()
    head_start.lacked()
    assert not head_start.may_run([SHORT])
    head_start.ran(1_000, 0.001)
    assert not head_start.may_run([SHORT])
    head_start.ran(128, 0.001)
    assert head_start.may_run([SHORT])


def test_a_device_that_became_slow_gets_nothing_and_one_that_became_quick_does() -> None:
    head_start = quick(0.005)
    head_start.ran(20, 0.1)
    assert not head_start.may_run([SHORT])
    head_start.ran(1_000, 0.001)
    assert not head_start.may_run([SHORT])
    head_start.ran(20, 0.005)
    assert head_start.may_run([SHORT])


@pytest.mark.parametrize(
    "texts",
    [
        [SHORT, SHORT],
        [Text("x" * (SHORT_BYTES + 1))],
        [Text("é" * (SHORT_BYTES // 2 + 1))],
        [Text("x" * SHORT_BYTES, prompt="y")],
        [Text("x", chunk=Chunking(mode="mean", tokens=16))],
    ],
)
def test_several_texts_long_ones_and_chunked_ones_do_not_run(texts: list[Text]) -> None:
    assert not quick().may_run(texts)


@pytest.mark.parametrize("text", ["x" * SHORT_BYTES, "é" * (SHORT_BYTES // 2), "\ud800"])
def test_a_text_runs_whose_bytes_are_few_whatever_is_in_it(text: str) -> None:
    assert quick().may_run([Text(text)])
