"""How many tokens a device runs at once, unless an operator says so."""

from __future__ import annotations

import os

import pytest

from embedq_consumer.engine import cpu_tokens, default_batch_tokens


@pytest.mark.parametrize(
    ("threads", "tokens"),
    [(1, 1_024), (2, 1_024), (4, 1_024), (5, 1_280), (8, 2_048), (16, 4_096), (64, 4_096)],
)
def test_a_cpu_of_many_cores_runs_more_tokens_at_once_and_one_of_few_no_less(
    threads: int, tokens: int
) -> None:
    assert cpu_tokens(threads) == tokens
    assert default_batch_tokens("cpu", threads) == tokens


def test_in_bf16_a_cpu_runs_half_as_many_again() -> None:
    assert (cpu_tokens(2, "bf16"), default_batch_tokens("cpu", 16, "bf16")) == (1_536, 6_144)
    assert default_batch_tokens("cuda:0", quantization="fp8") == 16_384


def test_threads_are_the_cores_that_the_process_may_use_where_nobody_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert default_batch_tokens("cpu") == 4_096
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert default_batch_tokens("cpu") == 1_024
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert default_batch_tokens("cpu") == 3_072


@pytest.mark.parametrize(("told", "tokens"), [("8", 2_048), ("8,2", 2_048), ("12", 2_560), ("", 2_560)])
def test_openmp_may_be_told_to_have_fewer_threads_than_cores(
    told: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(10)))
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert default_batch_tokens("cpu") == tokens


def test_a_gpu_is_asked_for_no_threads() -> None:
    assert default_batch_tokens("cuda:0", 64) == 16_384
