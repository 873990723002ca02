"""Which command applies: the newest, if it is newer than the one in force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.lifecycle.desired_model import Decision, DesiredModel, Ignored
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
