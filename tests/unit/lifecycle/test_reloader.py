"""Every way in which a reload can end, without a broker: READY, or FAILED with the old model serving."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from embedq_consumer.batching.token_budget import Budget, Conditions, Measured
from embedq_consumer.engine import (
    DeviceLost,
    Encoder,
    Failed,
    Footprint,
    Memory,
    ModelError,
    OutOfMemory,
    Pending,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.engine.safety import heaps
from embedq_consumer.lifecycle import ModelRejected, NoModel, reloader
from embedq_consumer.lifecycle.gates.checks import CHECK_TEXTS
from embedq_consumer.threads import left_behind
from embedq_shared.messages import GOLDEN_FILE, Policy
from tests.helpers.fake_models import FOOTPRINT, Bench, FakeModel, MakeBench, command
from tests.helpers.support import wait_until


class PanicException(BaseException):
    """Named as pyo3's, which no library exports."""


OLD, NEW = "sha256:old", "sha256:new"
POLICIES: list[Policy] = ["availability_preserving", "resource_preserving"]


def new(**more: Any) -> FakeModel:
    return FakeModel(NEW, **more)


async def started(bench: Bench) -> Bench:
    """A bench whose configured model serves, and which forgot what it said meanwhile."""
    await bench.model.start(None)
    bench.sent.clear()
    return bench


# -- the start --------------------------------------------------------------------------------------------------------


async def test_without_a_command_the_configured_model_serves(bench: MakeBench) -> None:
    b = bench()
    await b.model.start(None)
    assert b.serving == "old"
    assert b.steps() == ["load", "serving"]
    last = b.sent[-1]
    assert (last.state, last.model_version, last.version, last.error) == ("READY", OLD, None, None)
    assert b.sample("model_info", alias="a", model_version=OLD, hidden_size="2") == 1


async def test_the_desired_model_serves_from_the_start(bench: MakeBench) -> None:
    b = bench(new=[new()])
    await b.model.start(command(4, "new"))
    assert b.serving == "new"
    assert b.steps() == ["validate", "load", "warm_up", "check", "serving"]
    last = b.sent[-1]
    assert (last.state, last.model_version, last.version, last.command_id) == ("READY", NEW, 4, "c4")


async def test_a_model_that_serves_from_the_start_is_compared_with_nothing(bench: MakeBench) -> None:
    b = bench(new=[new(vector=(-3.0, -4.0))])
    await b.model.start(command(1, "new", min_cosine=0.9))
    assert b.serving == "new"


async def test_the_fallback_serves_where_the_desired_model_cannot_and_the_status_says_why(
    bench: MakeBench,
) -> None:
    b = bench(new=[ModelError("config.json: expected an object")], before=[FakeModel("sha256:before")])
    await b.model.start(command(4, "new", fallback="before", digest=NEW))
    assert b.serving == "before"  # the digest is asked of the desired model alone
    last = b.sent[-1]
    assert (last.state, last.model_version, last.version) == ("FAILED", "sha256:before", 4)
    assert last.error == "config.json: expected an object"


async def test_the_configured_model_serves_where_neither_can_and_the_first_reason_is_kept(
    bench: MakeBench,
) -> None:
    b = bench()
    await b.model.start(command(4, "gone", fallback="gone-too"))
    assert b.serving == "old"
    assert b.sent[-1].state == "FAILED"
    assert b.sent[-1].error == f"path: expected a directory, {b.root}/gone is not one"


async def test_a_desired_model_that_is_its_own_fallback_is_tried_once(bench: MakeBench) -> None:
    b = bench()
    await b.model.start(command(4, "gone", fallback="gone"))
    assert b.steps() == ["validate", "load", "serving"]


@pytest.mark.parametrize(
    "broken",
    [ModelError("no weights"), FakeModel(vector=(math.nan, 1.0)), FakeModel(fails_always=OutOfMemory())],
)
async def test_a_configured_model_that_may_not_serve_ends_the_process(
    bench: MakeBench, broken: FakeModel | Exception
) -> None:
    b = bench(old=[broken])
    with pytest.raises((ModelError, ModelRejected)):
        await b.model.start(None)
    assert b.serving == ""


# -- a reload that succeeds -------------------------------------------------------------------------------------------


async def test_an_availability_preserving_reload_swaps_while_nothing_is_in_flight(bench: MakeBench) -> None:
    old, loaded = FakeModel(), new()
    b = await started(bench(old=[old], new=[loaded]))
    await b.follow([command(1, "new")])
    assert b.holds == ["old", "new"]
    assert b.steps() == ["validate", "load", "warm_up", "check", "drain", "swap", "serving"]
    assert (old.closed, loaded.closed) == (True, False)
    last = b.sent[-1]
    assert (last.state, last.model_version, last.version, last.error) == ("READY", NEW, 1, None)


async def test_a_resource_preserving_reload_frees_the_old_model_before_it_loads(bench: MakeBench) -> None:
    old, loaded = FakeModel(), new()
    b = await started(bench(old=[old], new=[loaded]))
    await b.follow([command(1, "new", policy="resource_preserving")])
    assert b.holds == ["old", "new"]
    assert b.steps() == ["validate", "drain", "load", "warm_up", "check", "swap", "serving"]
    assert (old.closed, loaded.closed) == (True, False)
    assert b.sent[-1].state == "READY"


async def test_the_files_of_a_model_that_comes_in_the_old_ones_place_are_read_while_that_one_serves(
    bench: MakeBench,
) -> None:
    b = await started(bench(new=[new()]))
    read: list[tuple[str, str, list[str]]] = []

    def read_path(path: Path) -> bool:
        read.append((path.name, b.serving, list(b.steps())))
        return True

    b.loader.read_path = read_path
    await b.follow([command(1, "new", policy="resource_preserving")])
    assert (b.serving, read) == ("new", [("new", "old", ["validate"])])


async def test_files_for_which_too_little_memory_is_free_are_read_by_the_load_alone(bench: MakeBench) -> None:
    b = await started(bench(new=[new()]))
    b.loader.read_path = lambda _: False
    with capture_logs() as logs:
        await b.follow([command(1, "new", policy="resource_preserving")])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")
    assert [line["event"] for line in logs].count("model_not_read_ahead") == 1


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (ModelError("model.safetensors: cut short while it was read"), "cut short while it was read"),
        (OSError(5, "Input/output error"), "cannot be loaded: OSError"),
    ],
)
async def test_nothing_is_given_up_for_files_that_cannot_be_read(
    bench: MakeBench, problem: Exception, said: str
) -> None:
    old = FakeModel()
    b = await started(bench(old=[old], new=[new()]))

    def read_path(_: Path) -> bool:
        raise problem

    b.loader.read_path = read_path
    await b.follow([command(1, "new", policy="resource_preserving")])
    last = b.sent[-1]
    assert (b.serving, old.closed, b.holds, b.loads) == ("old", False, [], ["old"])
    assert (last.state, last.step) == ("FAILED", "validate")
    assert said in (last.error or "")


async def test_a_large_model_is_freed_once_the_new_ones_first_micro_batch_is_under_way(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloader, "_FIRST_S", 600.0)
    old, loaded = FakeModel(), new()
    old.weight_bytes = 1 << 30
    b = await started(bench(old=[old], new=[loaded]))
    async with b.live() as commands:
        commands.write(command(1, "new"))
        await wait_until(lambda: "swap" in b.steps())
        assert (b.serving, old.closed) == ("new", False)
        await b.model.slot.encode(loaded, [Tokens(np.zeros(3, dtype=np.int32))])
        await b.until(1, "READY")
    assert old.closed


@pytest.mark.parametrize(("weights", "first_s"), [(1 << 30, 0.0), (1 << 20, 600.0)])
async def test_a_small_one_is_freed_at_once_and_a_large_one_after_a_while_in_any_case(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, weights: int, first_s: float
) -> None:
    monkeypatch.setattr(reloader, "_FIRST_S", first_s)
    old = FakeModel()
    old.weight_bytes = weights
    b = await started(bench(old=[old], new=[new()]))
    await b.follow([command(1, "new")])
    assert (b.serving, b.sent[-1].state, old.closed) == ("new", "READY", True)


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_reload_is_counted_timed_and_named_in_the_metrics(bench: MakeBench, policy: Policy) -> None:
    b = await started(bench(new=[new(vector=(1.0, 0.0, 0.0))]))
    await b.follow([command(1, "new", policy=policy)])
    assert b.sample("reloads_total", outcome="ready") == 1
    assert b.sample("model_info", alias="a", model_version=NEW, hidden_size="3") == 1
    assert b.sample("model_info", alias="a", model_version=OLD, hidden_size="2") is None
    for step in ("validate", "load", "warm_up", "check", "drain", "swap"):
        assert (b.sample("reload_step_seconds_count", step=step) or 0) >= 1, step
    assert b.sample("batch_budget_tokens") == 512
    assert b.facts == {"max_batch_tokens": 512, "max_text_tokens": 64}


async def test_a_reload_is_over_before_its_memory_is_the_systems_again(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = await started(bench(new=[new()]))
    given_back = threading.Event()

    def give_back() -> None:
        if b.sent[-1].state == "READY":  # before that the old model is freed, which is a part of the reload
            given_back.wait(60)

    async with b.live() as commands:
        monkeypatch.setattr(heaps, "give_back", give_back)
        try:
            commands.write(command(1, "new"))
            await wait_until(lambda: b.sample("reloads_total", outcome="ready") == 1)
            assert b.sample("reload_running_seconds") == 0
        finally:
            given_back.set()


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_model_that_is_as_similar_as_the_command_asks_serves(
    bench: MakeBench, policy: Policy
) -> None:
    b = await started(bench(new=[new(vector=(4.0, 3.0))]))  # cosine 0.96
    await b.follow([command(1, "new", min_cosine=0.95, digest=NEW, policy=policy)])
    assert b.serving == "new"


# -- a reload that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("broken", "more", "reason"),
    [
        (ModelError("config.json: expected an object"), {}, "config.json: expected an object"),
        (ValueError("secret path"), {}, "/new cannot be loaded: ValueError"),
        (FakeModel(NEW, cuts=False), {}, "the tokenizer did not cut a text"),
        (FakeModel(NEW, fails_always=OutOfMemory()), {}, "too little memory left"),
        (FakeModel(NEW, fails_always=KeyError("layer")), {}, "the model cannot run: KeyError"),
        (FakeModel(NEW, vector=(math.nan, 1.0)), {}, "check: expected finite vectors"),
        (FakeModel(NEW, vector=(0.0, 0.0)), {}, "check: expected finite vectors"),
        (FakeModel(NEW), {"digest": "sha256:other"}, "digest: expected sha256:other"),
        (FakeModel(NEW, vector=(4.0, 3.0)), {"min_cosine": 0.97}, "min_cosine: expected at least 0.97"),
        (FakeModel(NEW, vector=(1.0, 0.0, 0.0)), {"min_cosine": 0.5}, "of 2 dimensions"),
    ],
)
async def test_a_model_that_fails_a_gate_is_freed_and_the_old_one_serves(
    bench: MakeBench,
    broken: FakeModel | Exception,
    more: dict[str, Any],
    reason: str,
    policy: Policy,
) -> None:
    b = await started(bench(old=[FakeModel(), FakeModel()], new=[broken]))
    await b.follow([command(1, "new", policy=policy, **more)])
    assert b.serving == "old"
    last = b.sent[-1]
    assert (last.state, last.model_version, last.version) == ("FAILED", OLD, 1)
    assert reason in (last.error or "")
    assert "secret" not in (last.error or "")
    assert b.sample("reloads_total", outcome="failed") == 1
    assert b.sample("model_info", alias="a", model_version=OLD, hidden_size="2") == 1
    if isinstance(broken, FakeModel):
        assert broken.closed
    # The next command applies as if nothing had happened.
    await b.follow([command(2, "old", policy=policy)])
    assert b.sent[-1].state == "READY"


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_path_that_is_not_a_model_directory_costs_no_job_a_wait(
    bench: MakeBench, policy: Policy
) -> None:
    b = await started(bench())
    await b.follow([command(1, "../elsewhere", policy=policy)])
    assert b.holds == []
    assert b.sent[-1].state == "FAILED"
    assert "below" in (b.sent[-1].error or "")


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_drain_that_takes_too_long_fails_the_command_and_changes_nothing(
    bench: MakeBench, policy: Policy
) -> None:
    old, loaded = FakeModel(), new()
    b = await started(bench(old=[old], new=[loaded]))
    b.drains = False
    await b.follow([command(1, "new", policy=policy)])
    assert (b.serving, old.closed) == ("old", False)
    last = b.sent[-1]
    assert (last.step, last.state) == ("drain", "FAILED")
    assert last.error == "drain: the jobs in flight were not finished within 7 s"
    assert loaded.closed == (policy == "availability_preserving")  # else it was never loaded


@pytest.mark.parametrize("policy", POLICIES)
async def test_each_status_says_whether_a_model_serves_whatever_became_of_the_command(
    bench: MakeBench, policy: Policy
) -> None:
    b = await started(bench(new=[new()]))
    await b.follow([command(1, "new", policy=policy)], [command(2, "nowhere", policy=policy)])
    await b.model.reporter.update("stopped", "STOPPED")
    trial = [
        said.serving for said in b.sent if said.version == 1 and said.step in ("load", "warm_up", "check")
    ]
    assert trial == [policy == "availability_preserving"] * 3
    ended = [(said.version, said.state, said.serving) for said in b.sent if said.state != "LOADING"]
    assert ended == [(1, "READY", True), (2, "FAILED", True), (2, "STOPPED", False)]


async def test_memory_that_runs_out_in_the_check_alone_fails_the_command(bench: MakeBench) -> None:
    class RunsOut(FakeModel):
        """Takes the two micro-batches of the warm-up, then nothing more."""

        def submit(self, batch: Sequence[Tokens]) -> Pending:
            if len(self.batches) == 2:
                raise OutOfMemory
            return super().submit(batch)

    b = await started(bench(new=[RunsOut(NEW)]))
    await b.follow([command(1, "new")])
    assert b.sent[-1].error == "the model cannot run: its device has too little memory left"


async def test_a_smaller_budget_is_found_where_the_full_one_does_not_fit(bench: MakeBench) -> None:
    b = bench(new=[new(failures=[OutOfMemory()])])
    await b.model.start(command(1, "new"))
    assert b.sent[-1].state == "READY"
    assert b.sample("batch_budget_tokens") == 256


# -- the budget once the old model is gone ------------------------------------------------------------------------------


class Device:
    """Memory that models share, in units of a token."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.weights: dict[str, int] = {}
        self.peak = 0

    @property
    def free(self) -> int:
        return self.total - sum(self.weights.values())


class OnDevice(FakeModel):
    """A model that takes memory from its load to its close, and a token more for each of a micro-batch."""

    def __init__(
        self, device: Device, version: str, weights: int, footprint: Footprint | None = None
    ) -> None:
        super().__init__(version)
        self.max_tokens = 128
        self.footprint = footprint
        self._device = device
        self._weights = weights

    def loaded(self) -> OnDevice:
        self._device.weights[self.model_version] = self._weights
        return self

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        tokens = sum(len(tokens.ids) for tokens in batch)
        if tokens > self._device.free:
            raise OutOfMemory("out of memory")
        self._device.peak = max(self._device.peak, self._device.total - self._device.free + tokens)
        return super().submit(batch)

    def memory(self) -> Memory | None:
        device = self._device
        used = device.total - device.free
        return Memory(
            used=used, free=device.free, total=device.total, reserved=used, peak=max(used, device.peak)
        )

    def close(self) -> None:
        del self._device.weights[self.model_version]
        super().close()


async def half_full(bench: MakeBench, *, weights: int = 300) -> tuple[Bench, Device]:
    """A model serves on a device on which two of its kind leave room for half of the budget, which is 512 tokens."""
    device = Device(900)
    old = OnDevice(device, "sha256:old", weights).loaded()
    b = await started(bench(old=[old], new=[OnDevice(device, NEW, weights)]))
    assert b.sample("batch_budget_tokens") == 512
    return loading_onto_the_device(b), device


def loading_onto_the_device(b: Bench) -> Bench:
    """What is loaded from now on takes its memory."""
    load = b.loader.load_path

    def onto_device(path: Path) -> Encoder:
        model = load(path)
        assert isinstance(model, OnDevice)
        return model.loaded()

    b.loader.load_path = onto_device
    return b


async def test_after_a_reload_the_budget_is_that_of_the_device_without_the_old_model(
    bench: MakeBench,
) -> None:
    b, device = await half_full(bench)
    await b.follow([command(1, "new")])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")
    assert device.weights == {NEW: 300}
    assert b.sample("batch_budget_tokens") == 512
    assert b.facts["max_batch_tokens"] == 512
    assert b.holds == ["old", "new", "new", "new"], "while nothing is in flight"


async def test_a_budget_that_was_whole_beside_the_old_model_costs_no_second_pause(bench: MakeBench) -> None:
    b, _ = await half_full(bench, weights=100)
    await b.follow([command(1, "new")])
    assert b.sample("batch_budget_tokens") == 512
    assert b.holds == ["old", "new"]


async def test_a_budget_that_cannot_be_measured_again_stays_and_the_reload_has_worked(
    bench: MakeBench,
) -> None:
    b, _ = await half_full(bench)
    hold = b.hold

    def busy_after_the_swap(within: float) -> AbstractAsyncContextManager[None]:
        b.drains = b.serving == "old"
        return hold(within)

    b.hold = busy_after_the_swap  # type: ignore[method-assign]
    with capture_logs() as logs:
        await b.follow([command(1, "new")])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")
    assert b.sample("batch_budget_tokens") == 256
    [line] = [line for line in logs if line["event"] == "batch_budget_not_measured_again"]
    assert line["reason"] == "drain: the jobs in flight were not finished within 7 s"


# -- the budget of the model before ---------------------------------------------------------------------------------------

SHAPE = msgspec.structs.replace(FOOTPRINT, max_tokens=128)
QUARTERS = [[128], [16]]
"""Of micro-batches of 4 texts."""
WHOLE = [[128], [128] * 4, [16] * 4]
"""A trial: the longest text, and micro-batches of long and of short ones."""


async def of_one_shape(
    bench: MakeBench, *, total: int = 900, shape: Footprint | None = SHAPE
) -> tuple[Bench, OnDevice, OnDevice, Device]:
    """A model serves that takes 100, as others do; a trial of it took 512 more. The other one has the given shape."""
    device = Device(total)
    old = OnDevice(device, OLD, 100, SHAPE).loaded()
    other = OnDevice(device, NEW, 100, shape)
    b = await started(bench(old=[old], new=[other]))
    assert old.batches[: len(WHOLE)] == WHOLE
    assert b.sample("batch_budget_tokens") == 512
    return loading_onto_the_device(b), old, other, device


def trial_of(model: FakeModel) -> list[list[int]]:
    """The micro-batches that it ran before the check texts, each of which is alone."""
    return model.batches[: -len(CHECK_TEXTS)]


async def test_a_model_of_one_shape_takes_the_budget_over_and_its_longest_text_holds_nobody_up(
    bench: MakeBench,
) -> None:
    b, _, loaded, _ = await of_one_shape(bench)
    with capture_logs() as logs:
        await b.follow([command(1, "new")])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")
    assert trial_of(loaded) == QUARTERS
    assert b.sample("batch_budget_tokens") == 512
    assert b.facts == {"max_batch_tokens": 512, "max_text_tokens": 128}
    assert b.holds == ["old", "new"], "nothing is measured again"
    [line] = [line for line in logs if line["event"] == "batch_budget"]
    assert (line["taken_over"], line["takes_bytes"]) == (True, 512)


async def test_a_budget_goes_from_model_to_model(bench: MakeBench) -> None:
    b, _, loaded, device = await of_one_shape(bench)
    third = OnDevice(device, "sha256:third", 100, SHAPE)
    b._models["old"][:] = [third]
    await b.follow([command(1, "new")], [command(2, "old")])
    assert (b.serving, trial_of(loaded), trial_of(third)) == ("old", QUARTERS, QUARTERS)


@pytest.mark.parametrize(
    "change",
    [
        {"device": "another"},
        {"architecture": '{"hidden_size":2}'},
        {"dtype": "float32"},
        {"quantization": "fp8"},
        {"keep_bf16": (0,)},
        {"deterministic": True},
        {"kernels": (("attention", "another"),)},
        {"pooling": ("lasttoken",)},
        {"dense": ((2, 2),)},
        None,
    ],
)
async def test_a_model_of_another_shape_stands_the_whole_trial(
    bench: MakeBench, change: dict[str, Any] | None
) -> None:
    shape = None if change is None else msgspec.structs.replace(SHAPE, **change)
    b, _, loaded, _ = await of_one_shape(bench, shape=shape)
    await b.follow([command(1, "new")])
    assert (b.serving, trial_of(loaded)) == ("new", WHOLE)


async def test_a_budget_is_taken_over_where_what_it_takes_is_free_beside_both_models(
    bench: MakeBench,
) -> None:
    b, _, loaded, _ = await of_one_shape(bench, total=100 + 100 + 512)
    await b.follow([command(1, "new")])
    assert (b.serving, trial_of(loaded)) == ("new", QUARTERS)


async def test_where_a_byte_of_that_is_missing_a_smaller_one_is_found_and_measured_again_without_the_old_model(
    bench: MakeBench,
) -> None:
    b, _, loaded, _ = await of_one_shape(bench, total=100 + 100 + 511)
    await b.follow([command(1, "new")])
    beside = [[128], [128] * 2, [16] * 4]
    assert (b.serving, loaded.batches[:3]) == ("new", beside)
    assert loaded.batches[-len(WHOLE) :] == WHOLE
    assert b.holds == ["old", "new", "new", "new"]
    assert b.sample("batch_budget_tokens") == 512


async def test_a_budget_in_which_memory_ran_out_is_nobodys_any_more(bench: MakeBench) -> None:
    b, old, loaded, _ = await of_one_shape(bench)
    b.model.slot.note_out_of_memory(old)
    await b.follow([command(1, "new")])
    assert (b.serving, trial_of(loaded)) == ("new", WHOLE)


async def test_a_budget_that_is_not_whole_is_not_taken_over(bench: MakeBench) -> None:
    b, _, loaded, _ = await of_one_shape(bench, total=5000)
    b.model.slot.note_measured(
        b.model.slot.loaded,
        Measured(
            budget=Budget(256, 128),
            conditions=Conditions(footprint=SHAPE, tokens=512, max_items=4),
        ),
    )
    await b.follow([command(1, "new")])
    assert (b.serving, trial_of(loaded)) == ("new", WHOLE)


async def test_a_model_that_does_not_run_its_warm_up_within_the_budget_stands_the_whole_trial(
    bench: MakeBench,
) -> None:
    b, _, loaded, _ = await of_one_shape(bench)
    loaded._failures = [OutOfMemory("out of memory")]
    await b.follow([command(1, "new")])
    assert (b.serving, trial_of(loaded)) == ("new", WHOLE)


async def test_while_no_model_serves_a_budget_is_measured(bench: MakeBench) -> None:
    b, _, loaded, _ = await of_one_shape(bench)
    await b.follow([command(1, "new", policy="resource_preserving")])
    assert (b.serving, trial_of(loaded)) == ("new", WHOLE)


# -- before anything is given up for it ---------------------------------------------------------------------------------


async def test_without_a_policy_the_old_model_goes_first_where_both_do_not_fit(bench: MakeBench) -> None:
    old = FakeModel()
    b = await started(bench(old=[old], new=[new()]))
    b.loader.inspection = msgspec.structs.replace(b.loader.inspection, needed=150, free=100)
    await b.follow([command(1, "new")])
    assert b.steps() == ["validate", "drain", "load", "warm_up", "check", "swap", "serving"]
    assert (b.serving, old.closed) == ("new", True)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"policy": "availability_preserving"}, "memory: needs 0.0 GB at least beside the old model"),
        ({"needed": 201}, "memory: needs"),
        ({"hidden_size": 63}, "dimensions: jobs of the last hour asked for 64"),
        (
            {"hidden_size": 99, "min_dimensions": 100},
            "min_dimensions: expected a hidden size of at least 100",
        ),
    ],
)
async def test_a_model_that_will_not_do_is_refused_before_it_is_loaded(
    bench: MakeBench, more: dict[str, Any], reason: str
) -> None:
    b = await started(bench(new=[new()]))
    b.model.note_dimensions(64)
    asked = {name: more.pop(name) for name in ("policy", "min_dimensions") if name in more}
    b.loader.inspection = msgspec.structs.replace(b.loader.inspection, **{"needed": 150, "free": 100} | more)
    loads = len(b.loads)
    await b.follow([command(1, "new", **asked)])
    last = b.sent[-1]
    assert (last.step, last.state) == ("validate", "FAILED")
    assert (last.error or "").startswith(reason)
    assert (b.serving, len(b.loads), b.holds) == ("old", loads, [])


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_directory_that_fails_its_inspection_costs_no_job_a_wait(
    bench: MakeBench, policy: Policy
) -> None:
    b = await started(bench(new=[new()]))
    for problem, reason in (
        (ModelError("torn"), "torn"),
        (PanicException("short"), "cannot be loaded: Panic"),
    ):
        b.loader.problem = problem
        await b.follow([command(1 + len(reason), "new", policy=policy)])
        last = b.sent[-1]
        assert (last.step, last.state) == ("validate", "FAILED")
        assert reason in (last.error or "")
    assert b.holds == []


async def test_a_hidden_size_that_only_the_load_knows_is_checked_after_it(bench: MakeBench) -> None:
    b = await started(bench(new=[new()]))
    b.model.note_dimensions(64)
    await b.follow([command(1, "new")], [command(2, "new", min_dimensions=2)])
    refused, last = [said for said in b.sent if said.state != "LOADING"]
    assert (refused.step, refused.state) == ("check", "FAILED")
    assert (last.state, last.version) == ("READY", 2)


# -- golden texts ---------------------------------------------------------------------------------------------------------


def golden_file(file: Path, *embedding: float, **more: Any) -> None:
    file.write_text(json.dumps({"texts": [{"text": "one", "embedding": embedding}]} | more))


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_model_whose_vectors_are_not_those_stored_beside_it_is_refused(
    bench: MakeBench, policy: Policy
) -> None:
    b = await started(bench(old=[FakeModel(), FakeModel()], new=[new(), new()]))
    golden_file(b.root / "new" / GOLDEN_FILE, 4.0, 3.0)
    await b.follow([command(1, "new", policy=policy)])
    last = b.sent[-1]
    assert (last.step, last.state) == ("check", "FAILED")
    assert (
        last.error == "golden: texts[0]: expected a cosine of at least 0.995 to the stored vector, got 0.9600"
    )
    assert b.serving == "old"
    await b.follow([command(2, "new", golden_min_cosine=0.9, policy=policy)])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")


async def test_a_command_may_name_other_golden_texts_below_the_root(bench: MakeBench) -> None:
    b = await started(bench(new=[new(), new()]))
    golden_file(b.root / "new" / GOLDEN_FILE, 4.0, 3.0)
    golden_file(b.root / "others.json", 3.0, 4.0)
    (b.root.parent / "outside.json").write_text("secret")
    await b.follow([command(1, "new", golden="others.json")])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")
    for version, (path, reason) in enumerate(
        [("../outside.json", "golden: expected a file below"), ("none.json", "none.json: missing")], 2
    ):
        await b.follow([command(version, "new", golden=path)])
        assert (b.sent[-1].step, b.sent[-1].state) == ("validate", "FAILED")
        assert reason in (b.sent[-1].error or "")


async def test_the_configured_model_is_held_to_its_own_golden_texts(bench: MakeBench) -> None:
    b = bench()
    golden_file(b.root / "old" / GOLDEN_FILE, 4.0, 3.0)
    with pytest.raises(ModelRejected, match=r"^golden: texts\[0\]"):
        await b.model.start(None)


async def test_a_text_gets_the_prompt_of_its_input_type(bench: MakeBench) -> None:
    class Prompted(FakeModel):
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong | Failed]:
            asked.extend((text.prompt, text.text) for text in texts if text.text == "one")
            return super().tokenize(texts)

    asked: list[tuple[str, str]] = []
    loaded = Prompted(NEW)
    loaded.prompts, loaded.default_prompt = {"query": "Q: "}, "D: "
    b = await started(bench(new=[loaded]))
    texts = [
        {"text": "one", "embedding": [3.0, 4.0], "input_type": kind} for kind in ("query", "document", None)
    ]
    (b.root / "new" / GOLDEN_FILE).write_text(json.dumps({"texts": texts}))
    await b.follow([command(1, "new")])
    assert asked == [("Q: ", "one"), ("", "one"), ("D: ", "one")]


# -- how it is held -------------------------------------------------------------------------------------------------------


async def test_a_command_says_how_the_weights_are_held_and_its_fallback_how_they_were(
    bench: MakeBench,
) -> None:
    b = bench(new=[ModelError("torn")], before=[FakeModel("sha256:before")])
    await b.model.start(
        command(4, "new", quantization="fp8", fallback="before", fallback_quantization="none")
    )
    assert [(source.path.name, source.quantization) for source in b.loader.sources] == [
        ("new", "fp8"),
        ("before", "none"),
    ]


async def test_a_model_that_comes_back_is_held_as_it_was(bench: MakeBench) -> None:
    b = await started(bench(old=[FakeModel()], other=[FakeModel("sha256:other")], torn=[ModelError("torn")]))
    await b.follow(
        [command(1, "other", quantization="fp8")], [command(2, "torn", policy="resource_preserving")]
    )
    assert [(source.path.name, source.quantization) for source in b.loader.sources] == [
        ("old", None),
        ("other", "fp8"),
        ("torn", None),
        ("other", "fp8"),
    ]


# -- what is measured ---------------------------------------------------------------------------------------------------


async def test_a_whole_reload_is_timed_by_its_outcome(bench: MakeBench) -> None:
    b = await started(bench(new=[new()]))
    await b.follow([command(1, "new")], [command(2, "nowhere")])
    assert b.sample("reload_seconds_count", outcome="ready") == 1
    assert b.sample("reload_seconds_count", outcome="failed") == 1
    assert b.sample("reload_seconds_bucket", outcome="ready", le="15.0") == 1
    assert b.sample("reload_running_seconds") == 0


async def test_a_reload_that_does_not_end_shows_for_how_long_it_has_been_running(bench: MakeBench) -> None:
    b = await started(bench(new=[new()]))
    running: list[float] = []
    load = b.loader.load_path

    def slow(path: Path) -> Encoder:
        running.append(b.sample("reload_running_seconds") or 0.0)
        return load(path)

    b.loader.load_path = slow
    await b.follow([command(1, "new")])
    assert running[0] > 0


async def test_the_devices_memory_is_measured_while_a_model_serves(bench: MakeBench) -> None:
    b, device = await half_full(bench)
    watching = asyncio.create_task(b.model.watch_memory())
    await wait_until(lambda: b.sample("gpu_memory_used_bytes") == 300, what="a measurement")
    assert b.sample("gpu_memory_total_bytes") == device.total
    assert b.sample("gpu_memory_reserved_bytes") == 300
    assert b.sample("gpu_memory_peak_bytes") == 300 + 512, "and a full micro-batch of the trial"
    assert not watching.done()
    watching.cancel()


async def test_on_a_cpu_a_status_says_what_the_process_holds_of_the_machines_memory(bench: MakeBench) -> None:
    b = await started(bench())
    watching = asyncio.create_task(b.model.watch_memory())

    async def measured() -> bool:
        await b.model.reporter.resend()
        return b.sent[-1].memory_used is not None

    await wait_until(measured, what="a measurement")
    watching.cancel()
    used, total = b.sent[-1].memory_used, b.sent[-1].memory_total
    assert used is not None
    assert total is not None
    assert 10_000_000 < used < total
    assert b.sample("gpu_memory_total_bytes") == 0


# -- what ends the process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_lost_device_ends_the_process_and_frees_nothing(bench: MakeBench, policy: Policy) -> None:
    lost = new(fails_always=DeviceLost("device 0"))
    b = await started(bench(new=[lost], old=[FakeModel(), ModelError("the device is lost")]))
    with pytest.raises(DeviceLost):
        await b.follow([command(1, "new", policy=policy)])
    assert not lost.closed


async def test_both_models_lost_end_the_process_and_name_the_old_ones_directory(bench: MakeBench) -> None:
    b = await started(bench(old=[FakeModel(), ModelError("gone")], new=[ModelError("torn")]))
    with pytest.raises(NoModel, match=r"neither the new model nor the old one at .*/old can be loaded"):
        await b.follow([command(1, "new", policy="resource_preserving")])
    assert b.serving == ""


async def test_a_cancelled_reload_loads_no_model_again(bench: MakeBench) -> None:
    """The process ends; a second load would only delay that."""
    b = await started(bench(new=[new(fails_always=asyncio.CancelledError())]))
    with pytest.raises(asyncio.CancelledError):
        await b.follow([command(1, "new", policy="resource_preserving")])
    assert b.serving == ""


# -- commands that do not apply ---------------------------------------------------------------------------------------


async def test_of_several_commands_the_newest_is_applied_and_the_others_are_rejected(
    bench: MakeBench,
) -> None:
    b = await started(bench(new=[new()]))
    await b.follow([command(1, "old"), command(3, "new"), command(2, "old")])
    assert b.serving == "new"
    rejected = [status for status in b.sent if status.state == "FAILED"]
    assert [(status.version, status.error) for status in rejected] == [
        (1, "superseded by version 3"),
        (2, "superseded by version 3"),
    ]
    assert b.sample("reloads_total", outcome="ignored") == 2
    assert b.sample("reloads_total", outcome="ready") == 1


async def test_a_command_that_is_not_newer_is_rejected_once_and_the_status_stays(bench: MakeBench) -> None:
    b = bench(new=[new()])
    await b.model.start(command(5, "new"))
    b.sent.clear()
    await b.follow([command(4, "old")])
    rejected, standing = b.sent
    assert (standing.version, standing.state) == (5, "READY"), "it is not the last word"
    assert (rejected.version, rejected.state, rejected.error) == (4, "FAILED", "expected a version above 5")
    assert (b.serving, b.model.reporter.status.version) == ("new", 5)


async def test_a_repeated_command_is_answered_with_its_outcome(bench: MakeBench) -> None:
    b = await started(bench(new=[new()]))
    await b.follow([command(1, "new")], [command(1, "new")])
    before, again = b.sent[-2:]
    assert (again.state, again.command_id, again.version) == ("READY", "c1", 1)
    assert (before.step, before.state) == (again.step, again.state)
    assert b.sample("reloads_total", outcome="ignored") == 1


# -- failures that no guard used to see -----------------------------------------------------------------------------------


def broken_models() -> list[tuple[FakeModel | BaseException, str]]:
    return [
        (PanicException("Precompiled: short table"), "cannot be loaded: Panic"),
        (TypeError("secret"), "cannot be loaded: TypeError"),
        (new(unreadable="no unknown token"), "the tokenizer does not take every text: no unknown token"),
        (new(tokenize_fails=PanicException("index")), "the tokenizer cannot run: Panic"),
        (new(tokenize_fails=RuntimeError("secret")), "the tokenizer cannot run: RuntimeError"),
        (new(cuts=False), "did not cut"),
    ]


@pytest.mark.parametrize("number", range(len(broken_models())))
async def test_whatever_the_desired_model_does_at_the_start_the_fallback_serves(
    bench: MakeBench, number: int
) -> None:
    broken, reason = broken_models()[number]
    b = bench(new=[broken], before=[FakeModel("sha256:before")])
    await b.model.start(command(4, "new", fallback="before"))
    assert b.serving == "before"
    assert b.sent[-1].state == "FAILED"
    assert reason in (b.sent[-1].error or "")
    assert "secret" not in (b.sent[-1].error or "")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", range(len(broken_models())))
async def test_whatever_a_new_model_does_the_old_one_serves_on(
    bench: MakeBench, number: int, policy: Policy
) -> None:
    broken, reason = broken_models()[number]
    b = await started(bench(old=[FakeModel(), FakeModel()], new=[broken]))
    await b.follow([command(1, "new", policy=policy)])
    assert (b.serving, b.sent[-1].state) == ("old", "FAILED")
    assert reason in (b.sent[-1].error or "")


@pytest.mark.parametrize("number", range(len(broken_models())))
async def test_a_configured_model_that_cannot_serve_either_ends_the_start_with_its_reason(
    bench: MakeBench, number: int
) -> None:
    broken, reason = broken_models()[number]
    with pytest.raises(ModelRejected, match=reason):
        await bench(old=[broken]).model.start(command(1, "gone", fallback="gone-too"))


async def test_a_model_that_cost_two_processes_their_device_is_not_tried_by_the_third(
    bench: MakeBench,
) -> None:
    for _ in range(2):
        b = bench(new=[new(fails_always=DeviceLost("device 0"))], before=[FakeModel("sha256:before")])
        with pytest.raises(DeviceLost):
            await b.model.start(command(4, "new", fallback="before"))
        release(b.root / "attempts")
    b = bench(new=[new()], before=[FakeModel("sha256:before")])
    await b.model.start(command(4, "new", fallback="before"))
    assert b.serving == "before"
    assert b.sent[-1].error == (
        "it ended the process that loaded it 2 times; it is not tried again before a new command"
    )
    # A new command is a new try.
    await b.follow([command(5, "new")])
    assert (b.serving, b.sent[-1].state) == ("new", "READY")


async def test_a_micro_batch_of_a_new_model_that_does_not_end_means_that_the_device_hangs(
    bench: MakeBench,
) -> None:
    gate = threading.Event()

    class Hangs(FakeModel):
        def submit(self, batch: Sequence[Tokens]) -> Pending:
            assert gate.wait(60)
            return super().submit(batch)

    b = bench(new=[Hangs(NEW)], stall_timeout_s=0.05)
    try:
        with pytest.raises(DeviceLost, match=r"did not end within 0\.05 s"):
            await b.model.start(command(1, "new"))
    finally:
        gate.set()


async def test_a_stop_during_a_load_waits_for_nothing(bench: MakeBench) -> None:
    gate = threading.Event()

    class Slow(Bench):
        def _load(self, path: Path) -> FakeModel:
            assert gate.wait(60)
            return FakeModel()

    b = Slow(bench().root, {"old": [FakeModel()]})
    start = asyncio.create_task(b.model.start(None))
    await wait_until(lambda: "load_0" in left_behind(), what="a load")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await asyncio.to_thread(b.model.close)
    gate.set()


def release(folder: Path) -> None:
    """What the kernel does to locks when the process of a bench dies."""
    gc.collect()
    for number in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if number.readlink().is_relative_to(folder):
                os.close(int(number.name))
