"""A seed tells a run again; a schedule holds what was asked for, and in bounds."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.faults.points import ALL
from tests.faults.schedule import KINDS, TRACKS, Step, steps


def first(count: int, seed: int, track: str, kinds: list[str] | None = None) -> list[Step]:
    return list(islice(steps(seed, track, kinds or list(KINDS), workers=3, brokers=3), count))


@given(st.integers(), st.sampled_from(TRACKS))
def test_a_seed_gives_the_same_faults_each_time(seed: int, track: str) -> None:
    assert first(30, seed, track) == first(30, seed, track)


@given(st.integers(), st.sampled_from(TRACKS))
def test_longer_gaps_change_nothing_else(seed: int, track: str) -> None:
    slow = islice(steps(seed, track, list(KINDS), workers=3, brokers=3, gaps=4.0), 30)
    for usual, step in zip(first(30, seed, track), slow, strict=True):
        assert step == replace(usual, after_s=step.after_s)
        assert step.after_s == pytest.approx(4 * usual.after_s, abs=0.03)


@pytest.mark.parametrize("track", TRACKS)
def test_another_seed_gives_others(track: str) -> None:
    assert first(30, 1, track) != first(30, 2, track)


@given(st.integers(), st.sampled_from(TRACKS))
def test_each_round_holds_every_kind_of_its_track_once(seed: int, track: str) -> None:
    expected = sorted(name for name, kind in KINDS.items() if kind.track == track)
    assert sorted(step.fault for step in first(len(expected), seed, track)) == expected


@given(st.integers(), st.sampled_from(TRACKS), st.lists(st.sampled_from(list(KINDS)), unique=True))
def test_only_what_was_asked_for_comes(seed: int, track: str, kinds: list[str]) -> None:
    assert {step.fault for step in islice(steps(seed, track, kinds, workers=3, brokers=3), 40)} == {
        name for name in kinds if KINDS[name].track == track
    }


@given(st.integers(), st.sampled_from(TRACKS))
def test_a_fault_lasts_as_long_as_its_kind_allows_and_meets_somebody_who_exists(
    seed: int, track: str
) -> None:
    for step in first(40, seed, track):
        kind = KINDS[step.fault]
        assert kind.least_s <= step.seconds <= kind.most_s
        assert step.after_s > 0
        assert step.target in (range(3) if track == "workers" else range(1, 4))
        assert not step.point or step.point in ALL
        assert bool(step.point) == bool(step.passes and ("_at" in step.fault or "_in_" in step.fault))
