"""One member of a fleet, over topics in memory: its turn, the rollback that it writes, the dead that it takes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.lifecycle import ModelRejected
from embedq_consumer.rollout import FleetMember, member
from embedq_consumer.rollout.status_topic import Said
from embedq_shared.codec import decode_control
from embedq_shared.fleet import rollback_of
from embedq_shared.messages import Control, Rollout, Status
from embedq_shared.topics import Topics
from tests.helpers.support import wait_until


def a_command(version: int = 2, **more: Any) -> Control:
    known: dict[str, Any] = {
        "alias": "a",
        "version": version,
        "path": "new",
        "command_id": f"c{version}",
        "fallback": "old",
        "rollout": Rollout(max_unavailable=1),
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
        "at": int(time.time() * 1000),
    }
    return Status(**(known | more))


def failed(replica: str, version: int = 2) -> Status:
    return a_status(
        replica, version=version, command_id=f"c{version}", state="FAILED", turn=version, error="broken"
    )


class Commands:
    """Commands that a test hands out."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[list[Control]] = asyncio.Queue()

    async def next(self) -> Sequence[Control]:
        return await self.waiting.get()


class World:
    """Both topics, and one member "m" that reads and writes them."""

    def __init__(self, *said: Status) -> None:
        self.log = [Said(status.replica, status) for status in said]
        self.heard = 0
        self.polls = 0
        self.written: list[Outgoing] = []
        self.problem: Exception | None = None
        self.turns: list[int | None] = []
        self.source = Commands()
        self.member = FleetMember(self, Topics("t"), "m", "a", self.write)

    async def open(self) -> list[Said]:
        return await self.next()

    async def next(self) -> list[Said]:
        await asyncio.sleep(0.001)
        self.polls += 1
        found, self.heard = self.log[self.heard :], len(self.log)
        return found

    async def has_looked_again(self) -> None:
        """The member has gone round its loop a few times: what it would do, it has done."""
        goal = self.polls + 5
        await wait_until(lambda: self.polls >= goal, what="further polls")

    async def write(self, record: Outgoing) -> Exception | None:
        self.written.append(record)
        return self.problem

    async def take_turn(self, version: int | None) -> None:
        self.turns.append(version)
        self.say(a_status("m", version=2, turn=version, state="LOADING", command_id="c2"))

    def say(self, status: Status) -> None:
        self.log.append(Said(status.replica, status))

    async def opened(self, desired: Control | None = None) -> World:
        await self.member.open()
        self.member.begin(desired)
        self.commands = self.member.commands(self.source)
        self.running = asyncio.create_task(self.member.run())
        return self

    async def hand_out(self, *commands: Control) -> None:
        self.source.waiting.put_nowait(list(commands))
        await self.commands.next()

    @property
    def rollbacks(self) -> list[Control]:
        return [decode_control(record.value or b"") for record in self.written]


async def test_a_command_without_a_rollout_is_nobodys_turn() -> None:
    world = await World(a_status("l", turn=2)).opened()
    await world.member.turn(a_command(rollout=None), world)
    assert world.turns == []
    world.running.cancel()


async def test_a_turn_waits_for_the_one_before_it() -> None:
    busy = a_status("l", version=2, command_id="c2", state="LOADING", turn=2)
    world = await World(busy, a_status("m")).opened()
    turn = asyncio.create_task(world.member.turn(a_command(), world))
    await world.has_looked_again()
    assert world.turns == []
    world.say(a_status("l", version=2, command_id="c2"))
    await wait_until(turn.done, what="the turn")
    turn.result()
    assert world.turns == [2]
    world.running.cancel()


async def test_a_claim_that_comes_second_is_taken_back_and_made_again() -> None:
    world = await World(a_status("l"), a_status("m")).opened()
    say = world.say

    def beaten(status: Status) -> None:
        world.say = say  # type: ignore[method-assign]
        say(a_status("l", version=2, command_id="c2", state="LOADING", turn=2))
        say(status)

    world.say = beaten  # type: ignore[method-assign]
    waits = a_command(rollout=Rollout(max_unavailable=1))
    # The first by name has yet to begin, so this one lets it go first; here it is not there.
    world.log[0] = Said("l", a_status("l", serving=False))
    world.heard = 0
    turn = asyncio.create_task(world.member.turn(waits, world))
    await wait_until(lambda: world.turns == [2, None], what="the claim to be taken back")
    world.say(a_status("l", version=2, command_id="c2"))
    await wait_until(turn.done, what="the turn")
    assert world.turns == [2, None, 2]
    world.running.cancel()


async def test_where_nothing_is_known_to_go_back_to_a_failure_ends_the_command_for_those_that_wait() -> None:
    world = await World(failed("l"), a_status("m")).opened()
    with pytest.raises(ModelRejected, match="not tried: l: broken"):
        await world.member.turn(a_command(fallback=None), world)
    assert world.written == []
    world.running.cancel()


async def test_a_failure_is_taken_back_by_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "_WRITE_AGAIN_S", 0.05)
    world = await World(failed("n"), a_status("m")).opened()
    command = a_command()
    await world.hand_out(command)
    await wait_until(lambda: len(world.written) >= 2, what="the rollback, written until it is read back")
    back = world.rollbacks[0]
    assert back == rollback_of(command, "n: broken")
    assert (world.written[0].topic, world.written[0].key) == ("t.control", b"a")
    await world.hand_out(back)
    await world.has_looked_again()
    count = len(world.written)
    await wait_until(lambda: time.monotonic() > world.member._write_at, what="the time to write again")
    await world.has_looked_again()
    assert len(world.written) == count
    world.running.cancel()


async def test_a_rollback_that_lost_a_race_is_not_what_compaction_keeps() -> None:
    world = await World(a_status("m")).opened()
    command, theirs = a_command(), a_command(3, command_id="theirs")
    lost = rollback_of(command, "why")
    assert lost is not None
    await world.hand_out(command)
    await world.hand_out(theirs, lost)
    await wait_until(lambda: world.rollbacks == [theirs], what="the command that counts, once more")
    assert world.commands.newest == theirs
    world.running.cancel()


async def test_a_control_topic_that_may_not_be_written_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(member, "_WRITE_AGAIN_S", 0.01)
    world = await World(failed("n"), a_status("m")).opened()
    world.problem = PermissionError("no right")
    await world.hand_out(a_command())
    await wait_until(lambda: len(world.written) > 3, what="further tries")
    assert not world.running.done()
    world.running.cancel()


async def test_one_that_starts_in_mid_rollout_begins_with_the_old_model_and_then_follows() -> None:
    world = World(a_status("l"))
    await world.member.open()
    desired = a_command()
    begins = world.member.begin(desired)
    assert begins is not None
    assert (begins.version, begins.path, begins.fallback, begins.rollout) == (1, "old", "new", None)
    commands = world.member.commands(world.source)
    assert await commands.next() == [desired]
    assert commands.newest == desired


@pytest.mark.parametrize("more", [{"fallback": None}, {"version": 1, "command_id": "c1"}])
async def test_where_the_model_before_is_not_known_it_begins_with_the_configured_one(more: Any) -> None:
    world = World(a_status("l", version=None, command_id=None))
    await world.member.open()
    desired = a_command(**more)
    assert world.member.begin(desired) is None
    assert await world.member.commands(world.source).next() == [desired]


async def test_one_that_starts_after_a_rollout_begins_with_the_desired_model() -> None:
    world = World(a_status("l", version=2, command_id="c2"))
    await world.member.open()
    desired = a_command()
    assert world.member.begin(desired) is desired
    commands = world.member.commands(world.source)
    world.source.waiting.put_nowait([a_command(3)])
    assert await commands.next() == [a_command(3)]


async def test_a_process_that_died_in_its_turn_is_taken_back_by_the_next_of_its_name() -> None:
    desired = a_command()
    died = a_status("m", version=2, command_id="c2", state="LOADING", step="load", turn=2)
    world = await World(died, a_status("n")).opened(desired)
    world.say(a_status("m"))
    await wait_until(lambda: world.written != [], what="the rollback")
    assert world.rollbacks[0].reason == "m: fell silent in step load"
    world.running.cancel()


async def test_a_command_for_another_pool_is_not_followed_and_what_it_leaves_behind_neither() -> None:
    world = await World(a_status("m")).opened()
    moved, late = a_command(3, pool="big"), a_command(3, command_id="late")
    following = asyncio.create_task(world.commands.next())
    world.source.waiting.put_nowait([moved, a_command(2)])
    world.source.waiting.put_nowait([late])
    await wait_until(lambda: world.commands.newest == moved and world.source.waiting.empty(), what="both")
    back = a_command(4)
    world.source.waiting.put_nowait([back])
    assert await following == [back]
    assert world.commands.newest == back
    world.running.cancel()


async def test_a_failure_of_an_alias_that_has_moved_away_takes_nothing_back() -> None:
    world = await World(failed("n"), a_status("m")).opened()
    world.source.waiting.put_nowait([a_command(2), a_command(3, pool="big")])
    world.source.waiting.put_nowait([a_command(4)])
    following = asyncio.create_task(world.commands.next())
    await wait_until(following.done, what="the command that comes back")
    assert world.written == []
    world.running.cancel()


async def test_replicas_of_another_pool_take_no_part() -> None:
    world = await World(msgspec.structs.replace(failed("n"), pool="big"), a_status("m")).opened()
    await world.hand_out(a_command())
    await world.has_looked_again()
    assert world.written == []
    world.running.cancel()


async def test_one_that_starts_with_an_alias_of_another_pool_begins_with_its_settings() -> None:
    world = World(a_status("m"))
    await world.member.open()
    moved, back = a_command(5, pool="big"), a_command(6)
    assert world.member.begin(moved) is None
    commands = world.member.commands(world.source)
    assert commands.newest == moved
    world.source.waiting.put_nowait([a_command(5, command_id="lost")])
    world.source.waiting.put_nowait([back])
    assert await commands.next() == [back]


async def test_statuses_of_the_long_gone_are_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "_TIDY_S", 0.01)
    long_ago = int((time.time() - 7200) * 1000)
    world = await World(a_status("a", at=long_ago, state="STOPPED"), a_status("m")).opened()
    await wait_until(lambda: world.written != [], what="a tombstone")
    tombstone = world.written[0]
    assert (tombstone.topic, tombstone.key, tombstone.value) == ("t.status", b"a", None)
    world.log.append(Said("a", None))
    await world.has_looked_again()
    count = len(world.written)
    tidied = world.member._tidy_at
    await wait_until(lambda: world.member._tidy_at > tidied, what="another look")
    assert len(world.written) == count
    world.running.cancel()
