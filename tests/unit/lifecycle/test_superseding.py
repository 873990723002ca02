"""Commands that come while another one is followed: it is given up at its next step, whatever that is, and nothing is left of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from embedq_consumer.engine import Abandoned, Cancellation, Encoder, ModelError, Pending, Tokens
from embedq_consumer.lifecycle.model_slot import Source
from embedq_shared.messages import Control, Policy, Rollout
from tests.helpers.fake_models import Bench, FakeLoader, FakeModel, MakeBench, command
from tests.helpers.support import wait_until

BESIDE: Policy = "availability_preserving"
IN_PLACE: Policy = "resource_preserving"

SOON = pytest.mark.usefixtures("soon")


class Gate:
    """Where a load waits for the test: it goes on at `open`, and ends at its next look if it is not wanted any more."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def wait(self, cancel: Cancellation) -> None:
        self.reached.set()
        with cancel.stopping(self.open.set):
            assert self.open.wait(60)
        cancel.check()


class GatedLoader(FakeLoader):
    """Loads of the directories that have a gate wait there."""

    def __init__(self, bench: Bench, gates: dict[str, Gate]) -> None:
        super().__init__(bench.loader.load_path)
        self._gates = gates
        self.abandoned: list[str] = []

    def load(self, source: Source, cancel: Cancellation) -> Encoder:
        found = super().load(source, cancel)
        if (gate := self._gates.get(source.path.name)) is not None:
            try:
                gate.wait(cancel)
            except Abandoned:
                found.close()
                self.abandoned.append(source.path.name)
                raise
        return found


def gated(b: Bench, **gates: Gate) -> GatedLoader:
    loader = GatedLoader(b, gates)
    b.loader = loader
    b.model.slot._loader = loader
    return loader


async def started(b: Bench) -> Bench:
    await b.model.start(None)
    b.sent.clear()
    b.loads.clear()
    return b


def refused(b: Bench) -> list[tuple[int | None, str | None]]:
    return [(said.version, said.error) for said in b.sent if said.state == "FAILED"]


@pytest.mark.parametrize("policy", [BESIDE, IN_PLACE])
async def test_twenty_commands_in_a_row_end_on_the_last_and_waste_one_load_at_most(
    bench: MakeBench, policy: Policy
) -> None:
    b = await started(bench(new=[FakeModel("sha256:new")], other=[FakeModel("sha256:other")]))
    async with b.live() as control:
        for version in range(1, 21):
            control.write(command(version, "new" if version % 2 else "other", policy=policy))
            await asyncio.sleep(0)
        last = await b.until(20, "READY")
    assert (b.serving, last.model_version) == ("other", "sha256:other")
    assert len(b.loads) <= 2
    # Each of the others is answered once. Which newer one it is told of depends on how many were there.
    answers = refused(b)
    assert [version for version, _ in answers] == list(range(1, 20))
    assert all(reason is not None and reason.startswith("superseded by version") for _, reason in answers)


@SOON
async def test_a_load_under_way_ends_at_its_next_step_and_its_model_is_freed(bench: MakeBench) -> None:
    given_up = FakeModel("sha256:new")
    b = await started(bench(new=[given_up], other=[FakeModel("sha256:other")]))
    gate = Gate()
    loader = gated(b, new=gate)
    async with b.live() as control:
        control.write(command(1, "new"))
        await wait_until(gate.reached.is_set, what="a load")
        assert b.serving == "old"
        control.write(command(2, "other"))
        await b.until(2, "READY")
    assert loader.abandoned == ["new"]
    assert given_up.closed
    [answer] = [said for said in b.sent if said.state == "FAILED"]
    assert (answer.version, answer.step, answer.error) == (1, "load", "superseded by version 2")
    assert b.sample("reloads_total", outcome="superseded") == 1
    assert b.sample("reload_seconds_count", outcome="superseded") == 1
    assert b.sample("reload_running_seconds") == 0


@SOON
async def test_a_load_that_does_not_come_to_its_next_step_is_left_behind_and_freed_when_it_does(
    bench: MakeBench,
) -> None:
    given_up, gate, reached = FakeModel("sha256:new"), threading.Event(), threading.Event()
    b = await started(bench(new=[given_up], other=[FakeModel("sha256:other")]))
    load = b.loader.load_path

    def deaf(path: Path) -> Encoder:
        if path.name == "new":
            reached.set()
            assert gate.wait(60)
        return load(path)

    b.loader.load_path = deaf
    b.model.slot._stop_s = 0.05
    async with b.live() as control:
        control.write(command(1, "new"))
        await wait_until(reached.is_set, what="a load")
        control.write(command(2, "other"))
        await b.until(2, "READY")
        gate.set()
        await wait_until(lambda: given_up.closed, what="a freed model")
    assert b.serving == "other"


class Slow(FakeModel):
    """Its n-th micro-batch of the trial waits until the test lets it go on."""

    def __init__(self, version: str, at: int) -> None:
        super().__init__(version)
        self.gate = threading.Event()
        self.reached = threading.Event()
        self._at = at

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        if len(self.batches) == self._at:
            self.reached.set()
            assert self.gate.wait(60)
        return super().submit(batch)


@SOON
@pytest.mark.parametrize(("at", "step"), [(0, "warm_up"), (3, "check")])
async def test_a_trial_ends_after_the_micro_batch_that_runs(bench: MakeBench, at: int, step: str) -> None:
    given_up = Slow("sha256:new", at)
    b = await started(bench(new=[given_up], other=[FakeModel("sha256:other")]))
    async with b.live() as control:
        control.write(command(1, "new"))
        await wait_until(given_up.reached.is_set, what="a micro-batch")
        control.write(command(2, "other"))
        # It has been taken note of once nothing waits any more.
        await wait_until(lambda: any(cancel.is_set for cancel in b.loader.cancels), what="the newer command")
        given_up.gate.set()
        await b.until(2, "READY")
    assert given_up.closed
    assert len(given_up.batches) == at + 1
    [answer] = [said for said in b.sent if said.state == "FAILED"]
    assert (answer.version, answer.step) == (1, step)


class Blocked(Bench):
    """Its first hold waits for jobs that do not end."""

    waits = False
    blocks = True

    def hold(self, within: float) -> AbstractAsyncContextManager[None]:
        if not self.blocks:
            return super().hold(within)

        @asynccontextmanager
        async def held() -> AsyncIterator[None]:
            self.waits = True
            try:
                await asyncio.Event().wait()
                yield
            finally:
                self.waits = False

        return held()


@SOON
@pytest.mark.parametrize("policy", [BESIDE, IN_PLACE])
async def test_a_drain_is_given_up_at_once(bench: MakeBench, policy: Policy) -> None:
    given_up, old = FakeModel("sha256:new"), FakeModel()
    root = bench().root
    b = await started(Blocked(root, {"old": [old], "new": [given_up], "other": [FakeModel("sha256:other")]}))
    assert isinstance(b, Blocked)
    async with b.live() as control:
        control.write(command(1, "new", policy=policy))
        await wait_until(lambda: b.waits, what="a drain")
        b.blocks = False
        control.write(command(2, "other", policy=policy))
        await b.until(2, "READY")
    assert not b.waits
    assert given_up.closed == (policy == BESIDE)  # else it was never loaded
    assert refused(b) == [(1, "superseded by version 2")]
    await asyncio.to_thread(b.model.close)


@SOON
async def test_what_emptied_the_slot_leaves_it_to_the_newer_command_and_jobs_wait_until_that_serves(
    bench: MakeBench,
) -> None:
    old = FakeModel()
    b = await started(bench(old=[old], new=[FakeModel("sha256:new")], other=[FakeModel("sha256:other")]))
    gate = Gate()
    gated(b, new=gate)
    async with b.live() as control:
        control.write(command(1, "new", policy=IN_PLACE))
        await wait_until(gate.reached.is_set, what="a load")
        assert (b.serving, old.closed) == ("", True)
        control.write(command(2, "other"))
        await b.until(2, "READY")
    assert b.loads == ["new", "other"], "the old model is not loaded again on the way"
    assert b.holds == ["old", "other"], "one hold, from the drain of the first to the swap of the second"


@SOON
async def test_where_the_newer_command_fails_the_model_before_both_comes_back(bench: MakeBench) -> None:
    b = await started(
        bench(old=[FakeModel(), FakeModel("sha256:again")], new=[FakeModel()], torn=[ModelError("cut short")])
    )
    gate = Gate()
    gated(b, new=gate)
    async with b.live() as control:
        control.write(command(1, "new", policy=IN_PLACE))
        await wait_until(gate.reached.is_set, what="a load")
        control.write(command(2, "torn"))
        await b.until(2, "FAILED")
    assert (b.serving, b.model.slot.loaded.encoder.model_version) == ("old", "sha256:again")
    assert b.holds == ["old", "old"]
    assert refused(b) == [(1, "superseded by version 2"), (2, "cut short")]


@SOON
async def test_jobs_do_not_wait_for_the_turn_of_a_roll_out(bench: MakeBench) -> None:
    b = await started(
        bench(
            old=[FakeModel(), FakeModel("sha256:again")],
            new=[FakeModel("sha256:new")],
            other=[FakeModel("sha256:other")],
        )
    )
    gate, turns = Gate(), asyncio.Event()
    gated(b, new=gate)

    async def turn(command: Control) -> None:
        if command.rollout is not None:
            await turns.wait()

    async with b.live(turn) as control:
        control.write(command(1, "new", policy=IN_PLACE))
        await wait_until(gate.reached.is_set, what="a load")
        control.write(command(2, "other", rollout=Rollout(max_unavailable=1)))
        await wait_until(lambda: b.serving == "old", what="the old model")
        assert b.holds == ["old", "old"]
        turns.set()
        await b.until(2, "READY")
    assert b.serving == "other"


@SOON
async def test_a_replica_that_waits_for_its_turn_follows_a_newer_command_at_once(bench: MakeBench) -> None:
    b = await started(bench(new=[FakeModel("sha256:new")], other=[FakeModel("sha256:other")]))
    asked: list[int] = []

    async def turn(command: Control) -> None:
        asked.append(command.version)
        if command.version == 1:
            await asyncio.Event().wait()

    async with b.live(turn) as control:
        control.write(command(1, "new"))
        await wait_until(lambda: asked == [1], what="a turn")
        control.write(command(2, "other"))
        await b.until(2, "READY")
    assert asked == [1, 2]
    assert b.loads == ["other"], "nothing is loaded before its turn"


@pytest.mark.parametrize(
    ("more", "loads"),
    [({"rollback_of": 1}, []), ({}, ["old"]), ({"rollback_of": 1, "digest": "sha256:more"}, ["old"])],
)
async def test_a_command_that_takes_back_what_was_never_followed_is_ready_without_a_load_or_a_turn(
    bench: MakeBench, more: dict[str, Any], loads: list[str]
) -> None:
    b = await started(bench(old=[FakeModel(), FakeModel("sha256:more")], new=[FakeModel()]))
    asked: list[int] = []

    async def turn(command: Control) -> None:
        asked.append(command.version)

    await b.follow([command(2, "old", **more)], turn=turn)
    assert (b.serving, b.sent[-1].state, b.sent[-1].version) == ("old", "READY", 2)
    assert b.loads == loads
    assert asked == ([2] if loads else [])
