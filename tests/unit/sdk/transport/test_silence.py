"""Silence is measured in time in which we listened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_sdk.transport.silence import Silence


def test_silence_grows_from_look_to_look_until_something_is_heard() -> None:
    silence = Silence(1.0)
    assert silence.at(100.0) == 0.0
    assert silence.look(None, 100.0) == 0.0
    assert silence.look(None, 100.5) == pytest.approx(0.5)
    assert silence.at(100.75) == pytest.approx(0.75)
    assert silence.look(None, 101.25) == pytest.approx(1.25)
    assert silence.look("a word", 101.5) == 0.0
    assert silence.look("a word", 102.0) == pytest.approx(0.5)


def test_a_listener_who_stood_still_charges_nobody_for_it() -> None:
    silence = Silence(1.0)
    silence.look(7, 100.0)
    silence.look(7, 100.5)
    assert silence.at(700.0) == pytest.approx(1.5), "what came in ten minutes lies unread"
    assert silence.look(7, 700.0) == pytest.approx(1.5)
    assert silence.look(8, 700.25) == 0.0


def test_what_a_listener_did_between_two_turns_of_listening_counts_for_nothing() -> None:
    silence = Silence(1.0)
    silence.listen(100.0)
    assert silence.look(None, 100.5) == pytest.approx(0.5)
    silence.listen(160.0)
    assert silence.look(None, 160.25) == pytest.approx(0.75)
    silence.listen(200.0)
    assert silence.look(1, 200.5) == 0.0


@given(st.floats(0.01, 5.0), st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 2)), max_size=30))
def test_it_is_never_longer_than_the_time_since_something_was_heard_nor_than_the_turns_since(
    turn_s: float, looks: list[tuple[float, int]]
) -> None:
    silence = Silence(turn_s)
    silence.look(None, now := 0.0)
    heard: int | None = None
    since, turns = now, 0
    for pause, word in looks:
        now += pause
        since, turns = (since, turns + 1) if word == heard else (now, 0)
        heard = word
        assert silence.look(word, now) <= min(now - since, turns * turn_s) + 1e-6
