"""A flag that any thread may set, and what is told of it."""

from __future__ import annotations

import pytest

from embedq_consumer.engine import Abandoned, Cancellation


def test_work_goes_on_until_the_flag_is_set_and_never_after() -> None:
    cancel = Cancellation()
    cancel.check()
    assert not cancel.is_set
    cancel.set()
    cancel.set()
    assert cancel.is_set
    with pytest.raises(Abandoned):
        cancel.check()


def test_what_waits_is_stopped_once_and_only_while_it_waits() -> None:
    cancel, stopped = Cancellation(), []
    with cancel.stopping(lambda: stopped.append("over")):
        pass
    with cancel.stopping(lambda: stopped.append("outer")), cancel.stopping(lambda: stopped.append("inner")):
        cancel.set()
        assert stopped == ["outer", "inner"]
        cancel.set()
    assert stopped == ["outer", "inner"]


def test_what_begins_to_wait_too_late_is_stopped_at_once() -> None:
    cancel, stopped = Cancellation(), []
    cancel.set()
    with cancel.stopping(lambda: stopped.append("late")):
        assert stopped == ["late"]
