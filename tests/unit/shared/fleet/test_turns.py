"""Turns, rule by rule; and whole fleets that follow a command through kills, restarts and lags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_shared.fleet import Turns, rollback_of
from embedq_shared.messages import STATUS_INTERVAL_S, STATUS_STALE_AFTER_S, Control, Rollout, Status

WALL = 1_000_000.0


def a_command(version: int = 2, **more: Any) -> Control:
    known: dict[str, Any] = {
        "alias": "a",
        "version": version,
        "path": "new",
        "command_id": f"c{version}",
        "fallback": "old",
        "rollout": Rollout(max_unavailable=2, canary=True),
    }
    return Control(**(known | more))


def a_status(replica: str, **more: Any) -> Status:
    known: dict[str, Any] = {
        "replica": replica,
        "alias": "a",
        "version": 1,
        "command_id": "c1",
        "step": "serving",
        "state": "READY",
        "model_version": "old",
        "error": None,
        "serving": True,
        "at": int(WALL * 1000),
    }
    return Status(**(known | more))


def at_it(replica: str, version: int = 2, **more: Any) -> Status:
    return a_status(
        replica,
        **(
            {
                "version": version,
                "command_id": f"c{version}",
                "step": "load",
                "state": "LOADING",
                "turn": version,
            }
            | more
        ),
    )


def through(replica: str, version: int = 2, **more: Any) -> Status:
    return a_status(replica, version=version, command_id=f"c{version}", model_version="new", **more)


def failed(replica: str, version: int = 2) -> Status:
    return at_it(replica, version, state="FAILED", error="no such file")


def turns(me: str, *seen: Status) -> Turns:
    found = Turns(me, "a")
    for status in seen:
        found.see(status.replica, status, 0.0)
    return found


def let_pass(found: Turns, me: str, seconds: float) -> float:
    """Our own heartbeats come back for so long, and nobody else is heard."""
    now = 0.0
    while now < seconds:
        now += STATUS_INTERVAL_S
        found.see(me, a_status(me), now)
    return now


# -- who goes first -----------------------------------------------------------------------------------------------------


def test_the_first_by_name_goes_first_and_the_others_only_if_it_does_not() -> None:
    fleet = [a_status(name) for name in "rst"]
    assert turns("r", *fleet).may_claim(a_command(), 0.0)
    third = turns("t", *fleet)
    assert not third.may_claim(a_command(), 0.0)
    assert not third.may_claim(a_command(), 2 * STATUS_INTERVAL_S - 0.1)
    assert third.may_claim(a_command(), 2 * STATUS_INTERVAL_S)


def test_without_a_canary_as_many_go_at_once_as_may() -> None:
    fleet = [a_status(name) for name in "rst"]
    command = a_command(rollout=Rollout(max_unavailable=2))
    assert [turns(me, *fleet).may_claim(command, 0.0) for me in "rst"] == [True, True, False]


def test_once_the_canary_is_ready_a_whole_wave_goes() -> None:
    fleet = [through("r"), *(a_status(name) for name in "stu")]
    assert [turns(me, *fleet).may_claim(a_command(), 0.0) for me in "stu"] == [True, True, False]


def test_a_replica_of_another_alias_and_one_that_is_gone_are_not_waited_for() -> None:
    others = [a_status("a", alias="other"), a_status("b", state="STOPPED"), a_status("c", serving=False)]
    assert turns("r", *others, a_status("r")).may_claim(a_command(), 0.0)


# -- a claim counts from where it stands in the log ---------------------------------------------------------------------


def test_of_two_that_claim_at_once_the_first_in_the_log_has_its_turn() -> None:
    first, second = turns("r", a_status("r"), a_status("s")), turns("s", a_status("r"), a_status("s"))
    for one in (first, second):
        one.claim(a_command(), 0)
    for status in (at_it("r"), at_it("s")):
        for one in (first, second):
            one.see(status.replica, status, 1.0)
    assert (first.granted, second.granted) == (True, False)


def test_a_claim_is_open_until_its_own_record_comes_back() -> None:
    one = turns("r", a_status("r"))
    one.claim(a_command(), int(WALL * 1000))
    assert one.granted is None
    one.see("r", at_it("r", at=int(WALL * 1000) - 1), 1.0)  # of a claim that was taken back
    assert one.granted is None
    one.see("r", at_it("r"), 1.0)
    assert one.granted is True


def test_a_turn_of_an_earlier_command_counts_as_long_as_it_lasts() -> None:
    command = a_command(3, rollout=Rollout(max_unavailable=1))
    assert not turns("s", at_it("r", 2), a_status("s")).may_claim(command, 0.0)
    assert turns("s", a_status("r", version=3, command_id="c3"), a_status("s")).may_claim(command, 0.0)


def test_what_is_said_of_another_command_in_mid_turn_ends_no_turn() -> None:
    refused = at_it("r", version=1, command_id="c9", state="FAILED", turn=2)
    assert not turns("s", refused, a_status("s")).may_claim(a_command(), 0.0)


# -- failures -----------------------------------------------------------------------------------------------------------


def test_a_failure_in_a_turn_halts_the_rollout_and_the_first_by_name_takes_it_back() -> None:
    fleet = [failed("r"), a_status("s"), a_status("t")]
    second, third = turns("s", *fleet), turns("t", *fleet)
    assert not second.may_claim(a_command(), 100.0)
    assert second.rollback_due(a_command(), 0.0) is None  # r has lived to write it
    assert second.rollback_due(a_command(), 1.0) == "r: no such file"
    assert third.rollback_due(a_command(), 0.0) is None
    assert third.rollback_due(a_command(), 1.9) is None
    assert third.rollback_due(a_command(), 2.0) == "r: no such file"
    assert turns("r", *fleet).rollback_due(a_command(), 0.0) == "r: no such file"


def test_a_failure_outside_a_turn_is_its_replicas_own() -> None:
    alone = failed("r")
    without = msgspec.structs.replace(alone, turn=None)
    assert turns("s", without).failure(a_command()) is None
    other = msgspec.structs.replace(alone, command_id="d2")
    assert turns("s", other).failure(a_command()) is None
    assert turns("s", alone).failure(a_command(3)) is None


def test_a_replica_that_falls_silent_in_its_turn_fails_it() -> None:
    found = turns("s", at_it("r", step="warm_up"), a_status("s"))
    let_pass(found, "s", STATUS_STALE_AFTER_S)
    assert found.failure(a_command()) is None
    now = let_pass(found, "s", STATUS_STALE_AFTER_S + STATUS_INTERVAL_S)
    assert found.failure(a_command()) == "r: fell silent in step warm_up"
    assert found.rollback_due(a_command(), now) == "r: fell silent in step warm_up"


def test_one_that_stops_in_its_turn_fails_nothing() -> None:
    found = turns("s", at_it("r"), at_it("r", state="STOPPED", step="stopped", turn=None), a_status("s"))
    let_pass(found, "s", 100.0)
    assert found.failure(a_command()) is None


def test_nobody_has_fallen_silent_while_our_own_records_are_missing_too() -> None:
    found = turns("s", at_it("r"), a_status("s"))
    found.see("s", a_status("s"), 500.0)  # the first word after Kafka was away
    found.see("s", a_status("s"), 503.0)
    assert found.failure(a_command()) is None
    found.see("r", at_it("r"), 503.0)
    found.see("s", a_status("s"), 506.0)
    assert found.failure(a_command()) is None


def test_a_process_that_died_in_its_turn_tells_its_successor() -> None:
    found = turns("r", at_it("r"), a_status("s"))
    assert found.begin(a_command(), WALL)
    found.see("r", a_status("r", version=None, step="starting"), 1.0)
    assert found.rollback_due(a_command(), 1.0) == "r: fell silent in step load"


def test_a_successor_that_speaks_before_its_predecessor_was_missed_fails_the_rollout_for_all() -> None:
    found = turns("y", a_status("x"), a_status("y"), at_it("x"))
    found.see("x", a_status("x", step="load", state="LOADING"), 1.0)
    assert found.failure(a_command()) == "x: fell silent in step load"
    assert not found.may_claim(a_command(), 100.0), "nobody else tries it"
    assert found.failure(a_command(3)) is None


def test_a_turn_that_was_taken_back_and_an_orderly_stop_are_no_death() -> None:
    for said in (a_status("x", version=2, command_id="c2"), a_status("x", state="STOPPED"), at_it("x", 3)):
        found = turns("y", a_status("x"), a_status("y"), at_it("x"), said)
        assert found.failure(a_command()) is None


def test_a_rollback_goes_on_whoever_fails_it() -> None:
    back = rollback_of(a_command(), "why")
    assert back is not None
    fleet = [a_status("r", version=3, command_id=back.command_id, state="FAILED", turn=3), a_status("s")]
    found = turns("s", *fleet)
    assert found.may_claim(back, 0.0)
    found.claim(back, 0)
    found.see("s", a_status("s", version=3, command_id=back.command_id, state="LOADING", turn=3), 0.0)
    assert found.granted is True


# -- the canary's soak time ---------------------------------------------------------------------------------------------

SOAKS = a_command(rollout=Rollout(max_unavailable=2, canary=True, soak_s=60.0))


def test_until_the_canary_has_served_its_time_nobody_follows_it() -> None:
    others = [a_status("s"), a_status("t")]
    for served, may in ((0.0, False), (59.9, False), (60.0, True)):
        fleet = [through("r", served_s=served), *others]
        assert [turns(me, *fleet).may_claim(SOAKS, 100.0) for me in "st"] == [may, may]
        assert turns("s", *fleet).failure(SOAKS) is None
    assert turns("s", through("r"), *others).may_claim(SOAKS, 100.0), "r is older, and says nothing of it"
    assert turns("r", a_status("r"), *others).may_claim(SOAKS, 0.0), "somebody has to be the first"


def test_an_error_in_its_soak_time_fails_the_rollout_and_one_after_it_does_not() -> None:
    early = [through("r", served_s=9.0, first_error_s=8.0), a_status("s")]
    why = "r: a text got no vector 8 s after the new model began to serve"
    assert turns("s", *early).failure(SOAKS) == why
    assert turns("s", *early).rollback_due(SOAKS, 0.0) is None  # r has lived to write it
    assert turns("r", *early).rollback_due(SOAKS, 0.0) == why
    assert not turns("s", *early).may_claim(SOAKS, 100.0)
    for status in (through("r", served_s=90.0, first_error_s=8.0), through("r", served_s=60.0)):
        bad = status.first_error_s is not None
        assert (turns("s", status, a_status("s")).failure(SOAKS) is None) != bad
    assert turns("s", through("r", served_s=90.0, first_error_s=61.0), a_status("s")).failure(SOAKS) is None
    assert turns("s", *early).failure(a_command()) is None, (
        "without a soak time, errors are no matter of a roll-out"
    )


def test_once_one_has_stood_the_others_need_not_and_after_the_last_nobody_is_judged() -> None:
    erring = through("s", served_s=9.0, first_error_s=1.0)
    assert turns("t", through("r", served_s=99.0), erring, a_status("t")).failure(SOAKS) is None
    assert turns("s", erring, through("t", served_s=3.0)).failure(SOAKS) is None
    failed_at_its_start = a_status("t", version=2, command_id="c2", state="FAILED")
    assert turns("s", erring, failed_at_its_start).failure(SOAKS) is None


def test_a_canary_that_dies_in_its_soak_time_fails_the_rollout() -> None:
    found = turns("s", through("r", served_s=9.0), a_status("s"))
    let_pass(found, "s", STATUS_STALE_AFTER_S + STATUS_INTERVAL_S)
    assert found.failure(SOAKS) == "r: fell silent in its soak time"
    later = turns("s", through("r", served_s=70.0), a_status("s"))
    let_pass(later, "s", STATUS_STALE_AFTER_S + STATUS_INTERVAL_S)
    assert later.failure(SOAKS) is None
    assert later.may_claim(SOAKS, 0.0), "another canary"
    stopped = turns("s", through("r", served_s=9.0), through("r"), a_status("s"))
    stopped.see("r", a_status("r", version=2, command_id="c2", state="STOPPED"), 1.0)
    let_pass(stopped, "s", 100.0)
    assert stopped.failure(SOAKS) is None


def test_the_successor_of_a_canary_that_died_does_not_try_again_and_nobody_else_does() -> None:
    reborn = a_status("r", version=1, command_id="before", step="load", state="LOADING", serving=False)
    found = turns("s", a_status("s"), through("r", served_s=9.0), reborn)
    assert found.failure(SOAKS) == "r: fell silent in its soak time"
    own = turns("r", through("r", served_s=9.0), a_status("s"))
    assert own.begin(SOAKS, WALL)
    own.see("r", reborn, 1.0)
    assert own.rollback_due(SOAKS, 1.0) == "r: fell silent in its soak time"
    for said in (through("r", served_s=12.0), a_status("r", version=1, command_id="c9", state="FAILED")):
        refused = turns("s", a_status("s"), through("r", served_s=9.0), said)
        assert refused.failure(SOAKS) is None, "it lives, and says what it does not follow"


def test_a_rollback_has_no_soak_time() -> None:
    back = rollback_of(SOAKS, "why")
    assert back is not None
    assert back.rollout == Rollout(max_unavailable=2)


# -- a replica that starts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "before"),
    [
        ([], False),
        ([a_status("s")], True),
        ([through("s"), a_status("t")], True),
        ([through("s"), through("t")], False),
        ([a_status("s", at=0)], False),
        ([a_status("s", serving=False)], False),
        ([failed("s")], True),
    ],
)
def test_a_replica_that_starts_in_mid_rollout_begins_with_what_the_others_serve(
    others: Sequence[Status], before: bool
) -> None:
    assert turns("r", *others).begin(a_command(), WALL) == before


def test_without_a_rollout_a_replica_begins_with_what_is_desired() -> None:
    assert not turns("r", a_status("s")).begin(a_command(rollout=None), WALL)


# -- the dead -----------------------------------------------------------------------------------------------------------


def test_the_first_of_the_living_takes_away_statuses_of_an_hour_ago() -> None:
    old, older = int((WALL - 3601) * 1000), int((WALL - 5000) * 1000)
    seen = [
        a_status("a", at=old, state="STOPPED"),
        a_status("b", at=older),
        a_status("c", at=int((WALL - 100) * 1000)),
        a_status("r"),
        a_status("s"),
    ]
    first, second = turns("r", *seen), turns("s", *seen)
    assert first.long_gone(WALL) == []  # whether b and c are silent is not known yet, and they come before r
    for one, me in ((first, "r"), (second, "s")):
        now = 0.0
        while now < 20:
            now += STATUS_INTERVAL_S
            for other in "rs":
                one.see(other, a_status(other), now)
        assert one.long_gone(WALL) == (["a", "b"] if me == "r" else [])
    first.forget("a")
    assert first.long_gone(WALL) == ["b"]


# -- the command back ---------------------------------------------------------------------------------------------------


def test_a_rollback_follows_from_its_command_and_is_not_taken_back_itself() -> None:
    command = a_command(digest="sha256:" + "0" * 64, min_cosine=0.9, fallback_quantization="fp8")
    back, again = rollback_of(command, "one"), rollback_of(command, "two")
    assert back is not None
    assert again is not None
    assert msgspec.structs.replace(again, reason="one") == back
    assert (back.version, back.path, back.fallback, back.rollback_of) == (3, "old", "old", 2)
    assert (back.digest, back.min_cosine, back.quantization) == (None, None, "fp8")
    assert back.rollout == Rollout(max_unavailable=2, canary=False)
    assert rollback_of(back, "again") is None
    assert rollback_of(a_command(fallback=None), "nothing before") is None
    assert len(rollback_of(a_command(command_id="c" * 256), "x" * 5000).command_id) == 256  # type: ignore[union-attr]


# -- whole fleets -------------------------------------------------------------------------------------------------------


class Member:
    """A replica as its service runs it, over a log that it reads at its own pace."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.name = name
        self.life = 0
        self.start()

    def start(self) -> None:
        self.life += 1
        self.read = 0
        self.turns = Turns(self.name, "a")
        self.known = list(self.fleet.control)
        self.serves = "old"
        self.catch_up()
        newest = self.known[-1]
        before = self.turns.begin(newest, self.fleet.now)
        self.serves = "old" if before else newest.path
        self.follows: Control | None = None if before else newest
        self.phase = "done"
        self.turn: int | None = None
        self.alive = True
        self.serves_since = self.fleet.now
        self.say("READY")

    def catch_up(self) -> None:
        for status in self.fleet.log[self.read :]:
            self.turns.see(status.replica, status, self.fleet.now)
        self.read = len(self.fleet.log)

    def say(self, state: Any) -> None:
        followed = self.follows
        self.said = (state, None if followed is None else followed.version)
        self.fleet.log.append(
            a_status(
                self.name,
                version=None if followed is None else followed.version,
                command_id=None if followed is None else followed.command_id,
                state=state,
                turn=self.turn,
                model_version=self.serves,
                at=int(self.fleet.now * 1000),
                served_s=self.fleet.now - self.serves_since,
            )
        )

    def newest(self) -> Control:
        return self.known[-1]

    def step(self, lag: int, breaks: bool) -> None:
        """Read some records, hear of commands, then do the next thing."""
        for status in self.fleet.log[self.read : self.read + lag]:
            self.turns.see(status.replica, status, self.fleet.now)
            self.read += 1
        if len(self.known) < len(self.fleet.control):
            self.known = list(self.fleet.control)
        command = self.newest()
        now = self.fleet.now
        if self.turns.rollback_due(command, now) and (back := rollback_of(command, "it failed")):
            self.fleet.write(back)
            return
        if self.follows is None or self.follows.version < command.version:
            self.follows, self.turn, self.phase = command, None, "waits"
            if command.rollback_of is not None and self.serves == command.path:
                self.phase = "done"
                self.say("READY")
            else:
                self.say("LOADING")
            return
        if self.phase == "waits" and self.turns.may_claim(command, now):
            self.turns.claim(command, int(now * 1000))
            self.turn, self.phase = command.version, "claims"
            self.say("LOADING")
        elif self.phase == "claims" and self.turns.granted is not None:
            if self.turns.granted:
                self.phase = "works"
            else:
                self.turn, self.phase = None, "waits"
                self.say("LOADING")
        elif self.phase == "works":
            self.phase = "done"
            if breaks and command.rollback_of is None:
                self.say("FAILED")
            else:
                self.turn, self.serves, self.serves_since = None, command.path, now
                self.say("READY")

    def beat(self) -> None:
        self.say(self.said[0])


class Fleet:
    """Replicas, the log of their statuses, and the control topic."""

    def __init__(self, size: int, command: Control) -> None:
        self.now = WALL
        self.log: list[Status] = [a_status(f"r{number}") for number in range(size)]
        self.command = command
        self.control = [a_command(1, path="old", fallback=None, rollout=None)]
        self.members = [Member(self, f"r{number}") for number in range(size)]
        self.write(command)

    def write(self, command: Control) -> None:
        if command.version > self.control[-1].version:
            self.control.append(command)

    @property
    def living(self) -> list[Member]:
        return [member for member in self.members if member.alive]

    def check(self) -> None:
        working = [member for member in self.living if member.phase == "works"]
        command = self.command
        assert command.rollout is not None
        most = command.rollout.max_unavailable or len(self.members)
        assert len(working) <= most, [member.name for member in working]
        passed = any(s.version == 2 and s.state == "READY" for s in self.log)
        if command.rollout.canary and not passed:
            assert len([m for m in working if m.follows is command]) <= 1
        soak_s = command.rollout.soak_s or 0.0
        soaked = any(s.version == 2 and s.state == "READY" and (s.served_s or 0) >= soak_s for s in self.log)
        if passed and not soaked:
            living = {m.name for m in self.living if m.serves == command.path}
            assert not living or not [m for m in working if m.follows is command]

    def settle(self, breaks: bool) -> None:
        """Time passes, nobody is harmed any more, and everybody reads all."""
        quiet = 0
        for _ in range(600):
            self.now += 1.0
            for member in self.living:
                member.beat()
            for member in self.living:
                for _ in range(4):
                    member.step(len(self.log), breaks)
                    self.check()
            done = all(m.phase == "done" and m.newest() is self.control[-1] for m in self.living)
            quiet = quiet + 1 if done else 0
            if quiet > 25:  # longer than anybody may be silent
                return
        raise AssertionError([(m.name, m.phase, m.said) for m in self.living])


Acts = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "step", "beat", "tick", "kill", "restart"]),
        st.integers(0, 5),
        st.integers(0, 12),
        st.booleans(),
    ),
    max_size=150,
)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    most=st.one_of(st.none(), st.integers(1, 3)),
    canary=st.booleans(),
    soak=st.sampled_from([None, 20.0]),
    broken=st.booleans(),
    acts=Acts,
)
def test_a_fleet_never_changes_more_at_once_than_it_may_and_ends_on_one_model(
    size: int,
    most: int | None,
    canary: bool,
    soak: float | None,
    broken: bool,
    acts: list[tuple[str, int, int, bool]],
) -> None:
    soak_s = soak if canary else None
    fleet = Fleet(size, a_command(rollout=Rollout(max_unavailable=most, canary=canary, soak_s=soak_s)))
    for act, who, lag, breaks in acts:
        member = fleet.members[who % size]
        if act == "tick":
            fleet.now += lag / 4
        elif act == "restart" and not member.alive:
            member.start()
        elif not member.alive:
            continue
        elif act == "step":
            member.step(lag, broken and breaks)
        elif act == "beat":
            member.beat()
        elif act == "kill" and len(fleet.living) > 1:
            member.alive = False
        fleet.check()
    fleet.settle(broken)
    assert len({member.serves for member in fleet.living}) == 1, [(m.name, m.serves) for m in fleet.living]
    last = fleet.control[-1]
    assert {member.serves for member in fleet.living} == {last.path}


@given(size=st.integers(1, 6), most=st.integers(1, 3), canary=st.booleans())
def test_a_good_model_reaches_every_replica_and_a_bad_one_none(size: int, most: int, canary: bool) -> None:
    good = Fleet(size, a_command(rollout=Rollout(max_unavailable=most, canary=canary)))
    good.settle(breaks=False)
    assert [member.serves for member in good.members] == ["new"] * size
    assert len(good.control) == 2
    bad = Fleet(size, a_command(rollout=Rollout(max_unavailable=most, canary=canary)))
    bad.settle(breaks=True)
    assert [member.serves for member in bad.members] == ["old"] * size
    assert [command.version for command in bad.control] == [1, 2, 3]
