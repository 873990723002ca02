"""The poll loop's states against a model that is too simple to be wrong: the list of all that has happened."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedq_consumer.intake.poll_state import PollState, Turn


class PollStateMachine(RuleBasedStateMachine):
    """Holds and a stop in any order, while a loop takes its turns and its polls give records.

    The model is the history alone: what was the last of some words, and how often two words are in it. A turn that polls
    gives records only when it is over, as a poll does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = PollState()
        self.history: list[str] = []
        self.polling = False

    # -- the model ----------------------------------------------------------------------------------------------------

    def last(self, *words: str) -> str | None:
        return next((word for word in reversed(self.history) if word in words), None)

    def held(self) -> bool:
        return self.history.count("hold") > self.history.count("release")

    def turn(self) -> str | None:
        return self.last("poll", "rest", "end")

    def right_turn(self) -> str:
        if "stop" in self.history:
            return "end"
        return "rest" if self.held() else "poll"

    def happened_since_the_turn_began(self) -> set[str]:
        turns = {"poll", "rest", "end"}
        since = next((n for n, word in enumerate(reversed(self.history)) if word in turns), len(self.history))
        return set(self.history[len(self.history) - since :])

    # -- what happens -------------------------------------------------------------------------------------------------

    @rule()
    def hold(self) -> None:
        self.state.hold()
        self.history.append("hold")

    @rule()
    def release(self) -> None:
        if not self.held():
            with pytest.raises(RuntimeError, match="This is a bug"):
                self.state.release()
            return
        self.state.release()
        self.history.append("release")

    @rule()
    def stop(self) -> None:
        self.state.stop()
        self.history.append("stop")

    @rule()
    def interrupt(self) -> None:
        self.state.interrupt()
        self.history.append("interrupt")

    @precondition(lambda self: self.turn() != "end")
    @rule()
    def next_turn(self) -> None:
        turn = self.state.next_turn()
        assert turn == self.right_turn()
        self.history.append(turn)
        self.polling = turn == "poll"

    # -- what is always so ----------------------------------------------------------------------------------------------

    @invariant()
    def the_next_turn_is_the_models(self) -> None:
        assert self.state.due == self.right_turn()

    @invariant()
    def a_hold_is_reached_when_no_record_can_come_in(self) -> None:
        assert self.state.hold_reached is (self.held() and not self.polling)

    @invariant()
    def whatever_changes_what_may_be_polled_interrupts_the_poll(self) -> None:
        changes = {"hold", "release", "stop", "interrupt"}
        assert self.state.interrupted is bool(self.happened_since_the_turn_began() & changes)

    @invariant()
    def the_loop_has_ended_after_its_last_turn_only(self) -> None:
        assert self.state.ended is ("end" in self.history)

    @invariant()
    def the_phase_says_it_in_one_word(self) -> None:
        if "end" in self.history:
            expected = "stopped"
        elif "stop" in self.history:
            expected = "draining"
        else:
            expected = "held" if self.held() else "running"
        assert self.state.phase == expected


PollStateMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestPollStateAgainstAModel = PollStateMachine.TestCase


def turns(state: PollState, count: int) -> list[Turn]:
    return [state.next_turn() for _ in range(count)]


def test_a_loop_that_nothing_disturbs_polls() -> None:
    assert turns(PollState(), 2) == ["poll", "poll"]


def test_a_hold_goes_on_until_the_last_of_its_holders_lets_go() -> None:
    state = PollState()
    state.hold()
    state.hold()
    state.release()
    assert state.next_turn() == "rest"
    state.release()
    assert state.next_turn() == "poll"


def test_a_stop_ends_the_loop_even_in_a_hold() -> None:
    state = PollState()
    state.hold()
    state.stop()
    assert (state.next_turn(), state.phase) == ("end", "stopped")


def test_a_poll_is_interrupted_once_and_the_next_one_is_not() -> None:
    state = PollState()
    state.next_turn()
    state.interrupt()
    assert state.interrupted
    state.next_turn()
    assert not state.interrupted
