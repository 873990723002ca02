"""The benchmark of reloads reads its figures from what a service logs and says."""

from __future__ import annotations

import pytest

from benchmarks.reload_figures import (
    Call,
    MicroBatch,
    Spans,
    figures,
    half_of_the_time,
    latency,
    micro_batches,
    steps,
)

OLD, NEW = "old", "new"
SPANS = Spans(command=10.0, swap=14.1, ready=14.5)


def batch(begin: float, end: float, version: str = OLD, tokens: int = 100) -> MicroBatch:
    return MicroBatch(begin, end, tokens, 1, version)


BEFORE = [batch(begin / 2, begin / 2 + 0.5) for begin in range(20)]  # until 10.0, without a gap


def test_the_pause_is_what_lies_between_the_old_models_last_micro_batch_and_the_new_ones_first() -> None:
    found = figures(
        [
            *BEFORE,
            batch(10.0, 10.5),
            batch(10.5, 11.0, NEW),  # on trial
            batch(11.0, 12.0),
            batch(12.0, 14.0),
            batch(14.03, 14.5, NEW),
            batch(14.5, 15.0, NEW),
        ],
        SPANS,
        quiet_s=5.0,
    )
    assert found["pause_s"] == pytest.approx(0.03)
    assert found["micro_batch_s"] == pytest.approx(0.5)
    assert found["beyond_a_micro_batch_s"] == pytest.approx(-0.47)
    assert found["swapped_at"] == pytest.approx(14.03)
    assert (found["trial_micro_batches"], found["trial_s"]) == (1, pytest.approx(0.5))
    assert found["longest_without_an_answer_s"] == pytest.approx(2.0)
    assert found["tokens_per_s_before"] == pytest.approx(200)
    assert found["tokens_per_s_during"] == pytest.approx(300 / 4)


def test_where_the_slot_was_empty_the_trial_belongs_to_the_pause() -> None:
    found = figures(
        [*BEFORE, batch(10.0, 10.5), batch(13.0, 14.0, NEW), batch(14.3, 14.8, NEW)], SPANS, quiet_s=5.0
    )
    assert found["pause_s"] == pytest.approx(3.8)
    assert found["trial_s"] == pytest.approx(1.0)


def test_a_logged_micro_batch_ended_when_it_was_logged() -> None:
    logged = {"event": "micro_batch", "tokens": 7, "texts": 2, "model_version": NEW, "seconds": 0.25}
    others = [{"event": "ready", "timestamp": "2026-01-01T00:00:00Z"}]
    [found] = micro_batches([*others, {**logged, "timestamp": "1970-01-01T00:00:02.5Z"}])
    assert found == MicroBatch(2.25, 2.5, 7, 2, NEW)


def test_many_short_micro_batches_count_for_the_time_that_they_take() -> None:
    assert half_of_the_time([0.001] * 100 + [0.2, 0.2]) == 0.2


def test_latencies_are_those_of_the_calls_that_were_made_within_the_span() -> None:
    calls = [Call(float(sent), sent / 1000, OLD) for sent in range(101)]
    assert latency(calls, 0, 101) == {"calls": 101, "p50_ms": 50.0, "p99_ms": 99.0, "max_ms": 100.0}
    assert latency(calls, 200, 300) == {"calls": 0}


def test_a_step_takes_until_the_next_one_and_a_repeated_status_is_none() -> None:
    def said(step: str, at: int, command: str = "c") -> dict[str, object]:
        return {"command_id": command, "step": step, "at": at}

    statuses = [
        said("serving", 900, "before"),
        said("load", 1200),
        said("load", 1500),
        said("swap", 3200),
        said("serving", 3300),
    ]
    assert steps(statuses, "c", 1.0) == {"noticed": 0.2, "load": 2.0, "swap": 0.1, "ready": 2.3}
