"""Which command applies: the newest, if it is newer than the one in force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.lifecycle.desired_model import Decision, DesiredModel, Ignored, NextCommand
from embedq_shared.messages import Control
from tests.helpers.fake_models import command

ONE, TWO, THREE = command(1, "one"), command(2, "two"), command(3, "three")


def test_the_first_command_applies() -> None:
    assert DesiredModel().decide([ONE]) == Decision(ONE, ())


def test_of_several_the_newest_applies_and_the_others_are_superseded() -> None:
    superseded = "superseded by version 3"
    assert DesiredModel(ONE).decide([TWO, THREE, ONE]) == Decision(
        THREE, (Ignored(TWO, superseded), Ignored(ONE, None))
    )


def test_a_version_that_is_not_higher_is_ignored_and_keeps_the_one_in_force() -> None:
    desired = DesiredModel(TWO)
    same_version = command(2, "other", command_id="other")
    assert desired.decide([ONE]) == Decision(None, (Ignored(ONE, "expected a version above 2"),))
    assert desired.decide([same_version]) == Decision(
        None, (Ignored(same_version, "expected a version above 2"),)
    )
    assert desired.decide([THREE]) == Decision(THREE, ())


def test_a_repeat_of_the_command_in_force_is_ignored_without_a_reason() -> None:
    desired = DesiredModel()
    desired.decide([ONE])
    assert desired.decide([ONE]) == Decision(None, (Ignored(ONE, None),))


def test_of_two_equal_versions_the_first_applies() -> None:
    other = command(1, "other", command_id="other")
    assert DesiredModel().decide([ONE, other]) == Decision(ONE, (Ignored(other, "superseded by version 1"),))


def test_a_command_that_is_written_again_because_others_of_its_version_came_later_is_not_refused() -> None:
    others = [command(1, name, command_id=name) for name in ("x", "y")]
    again = command(1, "one")
    decision = DesiredModel().decide([ONE, others[0], others[1], again])
    assert decision.apply is ONE
    assert [(one.command, one.reason) for one in decision.ignored] == [
        (others[0], "superseded by version 1"),
        (others[1], "superseded by version 1"),
        (again, None),
    ]


COMMANDS = st.builds(
    lambda version, name: command(version, name, command_id=f"{version}{name}"),
    st.integers(1, 6),
    st.sampled_from("xyz"),
)


@given(st.lists(st.lists(COMMANDS, min_size=1, max_size=5), max_size=8))
def test_versions_only_rise_and_each_command_is_applied_or_ignored_once(polls: list[list[Control]]) -> None:
    desired = DesiredModel()
    highest = 0
    for poll in polls:
        decision = desired.decide(poll)
        answered = [one.command for one in decision.ignored] + ([decision.apply] if decision.apply else [])
        assert sorted(map(id, answered)) == sorted(map(id, poll))
        newest = max(one.version for one in poll)
        assert (decision.apply is not None) == (newest > highest)
        if decision.apply is not None:
            assert decision.apply.version == newest
        highest = max(highest, newest)


def test_a_command_alone_is_begun_at_once() -> None:
    next_command = NextCommand()
    assert (next_command.take(0.0), next_command.wait(0.0)) == (None, None)
    assert next_command.put(ONE, 10.0, supersedes=False) is None
    assert next_command.wait(10.0) == 0
    assert next_command.take(10.0) is ONE
    assert (next_command.take(10.0), next_command.wait(10.0)) == (None, None)


def test_one_that_takes_another_ones_place_waits_until_none_has_come_for_a_moment() -> None:
    next_command = NextCommand()
    next_command.put(ONE, 10.0, supersedes=True)
    assert next_command.take(10.4) is None
    assert next_command.put(TWO, 10.4, supersedes=False) is ONE
    assert next_command.take(10.6) is None
    assert next_command.wait(10.6) == pytest.approx(0.3)
    assert next_command.take(10.9) is TWO


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30))
def test_of_a_burst_one_is_begun_each_time_that_it_is_quiet(pauses: list[float]) -> None:
    next_command, now, begun = NextCommand(), 0.0, []
    for version, pause in enumerate(pauses, 1):
        next_command.put(command(version, "x"), now, supersedes=True)
        now += pause
        if (taken := next_command.take(now)) is not None:
            begun.append(taken.version)
    assert begun == [version for version, pause in enumerate(pauses, 1) if pause >= 0.5]
