"""One slot, one compute thread: work in call order, results off it, and the heartbeat of what runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from embedq_consumer.engine import Failed, Pending, Text, Tokens
from embedq_consumer.lifecycle import ModelRejected, ModelSlot, NoModel
from embedq_consumer.lifecycle.model_slot import Loaded, Source
from tests.helpers.fake_models import FakeLoader, FakeModel, Vectors
from tests.helpers.support import wait_until

ONE_TEXT = [Tokens(np.zeros(3, dtype=np.int32))]


class Gate(Pending):
    """Vectors that come when they are let through."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def result(self) -> Vectors:
        assert self.open.wait(30)
        return np.ones((1, 2), dtype=np.float32)


class Gated(FakeModel):
    """A model whose micro-batches end one by one, as the test says; it notes its threads."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Gate] = []
        self.threads: set[str] = set()

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        self.threads.add(threading.current_thread().name)
        self.gates.append(Gate())
        return self.gates[-1]

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        super().close()


@pytest.fixture
def model() -> Gated:
    return Gated()


@pytest.fixture
def slot(model: Gated) -> Iterator[ModelSlot]:
    slot = ModelSlot(FakeLoader(lambda path: model))
    yield slot
    for gate in model.gates:
        gate.open.set()
    slot.close()


async def test_an_empty_slot_has_no_model_and_cannot_be_unloaded(slot: ModelSlot) -> None:
    assert slot.serving is None
    with pytest.raises(NoModel, match="no model is loaded"):
        _ = slot.loaded
    with pytest.raises(NoModel):
        await slot.unload()


async def test_a_loaded_model_serves_only_once_it_is_installed(slot: ModelSlot, model: Gated) -> None:
    loaded = await slot.load(Source(Path("one")))
    assert slot.serving is None
    assert slot.install(loaded) is None
    assert slot.loaded == Loaded(model, Source(Path("one")))
    assert slot.install(Loaded(FakeModel(), Source(Path("two")))) == loaded


async def test_unloading_frees_the_model_on_the_compute_thread_and_says_where_it_came_from(
    slot: ModelSlot, model: Gated
) -> None:
    slot.install(await slot.load(Source(Path("one"))))
    assert await slot.unload() == Source(Path("one"))
    assert (model.closed, slot.serving) == (True, None)
    assert {name.rsplit("_", 1)[0] for name in model.threads} == {"compute"}


async def test_the_next_micro_batch_reaches_the_device_while_the_first_one_runs(
    slot: ModelSlot, model: Gated
) -> None:
    first = asyncio.create_task(slot.encode(model, ONE_TEXT))
    await wait_until(lambda: len(model.gates) == 1)
    second = asyncio.create_task(slot.encode(model, ONE_TEXT))
    await wait_until(lambda: len(model.gates) == 2)
    assert len(model.threads) == 1
    model.gates[1].open.set()
    model.gates[0].open.set()
    (vectors, one), (_, two) = await first, await second
    assert vectors.shape == (1, 2)
    assert one >= 0
    assert 0 <= two <= one  # what ran while it waited is not its own time


class There(Pending):
    """Vectors that are there when `submit` returns; they note the thread that takes them."""

    def __init__(self, threads: set[str]) -> None:
        self._threads = threads

    @property
    def ready(self) -> bool:
        return True

    def result(self) -> Vectors:
        self._threads.add(threading.current_thread().name)
        return np.ones((1, 2), dtype=np.float32)


async def test_vectors_that_are_there_at_once_need_no_other_thread(
    slot: ModelSlot, model: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "submit", lambda batch: There(model.threads))
    vectors, _ = await slot.encode(model, ONE_TEXT)
    assert vectors.shape == (1, 2)
    assert {name.rsplit("_", 1)[0] for name in model.threads} == {"compute"}


async def test_a_text_that_is_started_runs_with_its_tokens_and_the_micro_batch_of_these_is_that_run(
    slot: ModelSlot, model: Gated
) -> None:
    tokens = await slot.start(model, Text("ab"))
    assert [each.ids.tolist() for each in tokens if isinstance(each, Tokens)] == [[0, 0, 0]]
    await wait_until(lambda: len(model.gates) == 1)
    assert slot.busy_since is not None
    asked = asyncio.create_task(slot.encode(model, [each for each in tokens if isinstance(each, Tokens)]))
    await asyncio.sleep(0)
    model.gates[0].open.set()
    vectors, seconds = await asked
    assert (vectors.shape, len(model.gates)) == ((1, 2), 1)
    assert seconds >= 0
    assert slot.busy_since is None
    assert {name.rsplit("_", 1)[0] for name in model.threads} == {"compute"}


async def test_a_micro_batch_of_others_is_its_own_run_and_what_was_started_ends_for_nobody(
    slot: ModelSlot, model: Gated
) -> None:
    [tokens] = await slot.start(model, Text("ab"))
    assert isinstance(tokens, Tokens)
    asked = [asyncio.create_task(slot.encode(model, batch)) for batch in (ONE_TEXT, [tokens])]
    for number in range(3):
        await wait_until(lambda number=number: len(model.gates) > number)  # type: ignore[misc]
        model.gates[number].open.set()
    await asyncio.gather(*asked)
    await wait_until(lambda: slot.busy_since is None)
    await slot.idle(30)


async def test_a_text_that_cannot_be_tokenized_or_run_fails_where_it_is_needed(slot: ModelSlot) -> None:
    with pytest.raises(KeyError, match="vocabulary"):
        await slot.start(FakeModel(tokenize_fails=KeyError("vocabulary")), Text("a"))
    assert await slot.start(FakeModel(unreadable="why"), Text("a")) == [Failed("why")]
    broken = FakeModel(failures=[KeyError("layer")])
    tokens = [each for each in await slot.start(broken, Text("a")) if isinstance(each, Tokens)]
    with pytest.raises(KeyError, match="layer"):
        await slot.encode(broken, tokens)
    await slot.start(FakeModel(failures=[KeyError("layer")]), Text("a"))
    vectors, _ = await slot.encode(FakeModel(), ONE_TEXT)
    assert vectors.tolist() == [[3.0, 4.0]]
    await wait_until(lambda: slot.busy_since is None)


async def test_it_is_busy_from_the_first_submit_to_the_last_result(slot: ModelSlot, model: Gated) -> None:
    assert slot.busy_since is None
    first = asyncio.create_task(slot.encode(model, ONE_TEXT))
    second = asyncio.create_task(slot.encode(model, ONE_TEXT))
    await wait_until(lambda: len(model.gates) == 2)
    since = slot.busy_since
    assert since is not None
    model.gates[0].open.set()
    await first
    assert slot.busy_since is not None
    assert slot.busy_since >= since  # another one runs, since now at the latest
    model.gates[1].open.set()
    await second
    assert slot.busy_since is None


async def test_with_debug_logs_each_micro_batch_says_when_it_ended_how_long_it_ran_and_for_whom(
    slot: ModelSlot, model: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        running = asyncio.create_task(slot.encode(model, ONE_TEXT))
        await wait_until(lambda: bool(model.gates))
        model.gates.pop().open.set()
        await running

    with capture_logs() as logs:
        with caplog.at_level("INFO", "embedq_consumer.lifecycle.device"):
            await run()
        assert not logs
        with caplog.at_level("DEBUG", "embedq_consumer.lifecycle.device"):
            await run()
    [said] = logs
    assert (said["event"], said["texts"], said["tokens"]) == ("micro_batch", 1, 3)
    assert said["model_version"] == model.model_version
    assert 0 < said["seconds"] < 30


async def test_a_failure_reaches_its_caller_and_leaves_the_slot_idle(slot: ModelSlot) -> None:
    with pytest.raises(KeyError):
        await slot.encode(FakeModel(failures=[KeyError("layer")]), ONE_TEXT)
    assert slot.busy_since is None
    vectors, _ = await slot.encode(FakeModel(), ONE_TEXT)
    assert vectors.tolist() == [[3.0, 4.0]]


async def test_who_waits_for_an_idle_device_waits_for_the_last_result_or_so_long(
    slot: ModelSlot, model: Gated
) -> None:
    await slot.idle(0.0)
    running = asyncio.create_task(slot.encode(model, ONE_TEXT))
    await wait_until(lambda: len(model.gates) == 1)
    await slot.idle(0.01)  # it is not, and nobody waits for ever
    idle = asyncio.create_task(slot.idle(600.0))
    model.gates[0].open.set()
    await running
    await idle


class InSteps(FakeModel):
    """A model that is freed in three steps, of which the first one ends when it is let go on."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.goes_on = threading.Event()
        self._order = order

    def close_some(self) -> bool:
        self._order.append("step")
        assert self.goes_on.wait(30)
        return self._order.count("step") < 3


async def test_micro_batches_reach_the_device_between_the_steps_in_which_a_model_is_freed(
    slot: ModelSlot,
) -> None:
    order: list[str] = []

    class Noting(FakeModel):
        def submit(self, batch: Sequence[Tokens]) -> Pending:
            order.append("micro-batch")
            return super().submit(batch)

    unused, other = InSteps(order), Noting()
    loaded = Loaded(unused, Source(Path("unused")))
    slot.device.residents.add(loaded)
    discarding = asyncio.create_task(slot.discard(loaded))
    await wait_until(lambda: order == ["step"])
    running = asyncio.create_task(slot.encode(other, ONE_TEXT))
    await asyncio.sleep(0)  # it is with the thread now
    unused.goes_on.set()
    await asyncio.gather(discarding, running)
    assert order == ["step", "micro-batch", "step", "step"]


async def test_who_waits_for_a_busy_device_waits_for_a_micro_batch_but_not_for_ever(
    slot: ModelSlot, model: Gated
) -> None:
    await slot.device.busy(0.01)
    waiting = asyncio.create_task(slot.device.busy(600.0))
    running = asyncio.create_task(slot.encode(model, ONE_TEXT))
    await waiting
    assert not running.done()
    await wait_until(lambda: len(model.gates) == 1)
    model.gates[0].open.set()
    await running
    ended = asyncio.create_task(slot.device.busy(600.0))
    await asyncio.sleep(0)
    assert not ended.done(), "none is under way any more"
    ended.cancel()


async def test_the_first_failure_of_the_model_that_serves_is_remembered_until_another_one_serves(
    slot: ModelSlot,
) -> None:
    one, other = FakeModel(), FakeModel()
    slot.install(Loaded(one, Source(Path("one"))))
    slot.note_failed(other)  # of a model that does not serve, or not any more
    assert slot.first_error_s is None
    slot.note_failed(one)
    first = slot.first_error_s
    assert first is not None
    assert 0 <= first <= slot.served_s
    slot.note_failed(one)
    assert slot.first_error_s == first
    slot.install(Loaded(other, Source(Path("other"))))
    assert slot.first_error_s is None


# -- loads that do not end ----------------------------------------------------------------------------------------------


class Stuck:
    """Loads that hang until the test lets them go on."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.models: list[FakeModel] = []

    def load(self, path: Path) -> FakeModel:
        if path.name == "hangs":
            assert self.gate.wait(60)
        self.models.append(FakeModel())
        return self.models[-1]


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stuck = Stuck()
    yield stuck
    stuck.gate.set()


async def test_a_load_that_takes_too_long_is_given_up_and_the_next_one_runs(stuck: Stuck) -> None:
    slot = ModelSlot(FakeLoader(stuck.load), load_timeout_s=0.05)
    with pytest.raises(ModelRejected, match=r"load: it did not end within 0\.05 s"):
        await slot.load(Source(Path("hangs")))
    slot = ModelSlot(FakeLoader(stuck.load), load_timeout_s=60)
    assert (await slot.load(Source(Path("well")))).path == Path("well")
    await asyncio.to_thread(slot.close)


async def test_a_model_that_comes_too_late_is_freed(stuck: Stuck) -> None:
    slot = ModelSlot(FakeLoader(stuck.load), load_timeout_s=0.05)
    with pytest.raises(ModelRejected):
        await slot.load(Source(Path("hangs")))
    stuck.gate.set()
    await wait_until(lambda: bool(stuck.models) and stuck.models[0].closed, what="a freed model")
    await asyncio.to_thread(slot.close)


async def test_a_load_that_is_cancelled_is_freed_too_and_nobody_waits_for_it(stuck: Stuck) -> None:
    slot = ModelSlot(FakeLoader(stuck.load))
    load = asyncio.create_task(slot.load(Source(Path("hangs"))))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    stuck.gate.set()
    await wait_until(lambda: bool(stuck.models) and stuck.models[0].closed, what="a freed model")
    await asyncio.to_thread(slot.close)


async def test_with_three_hanging_loads_the_next_ones_are_refused(stuck: Stuck) -> None:
    slot = ModelSlot(FakeLoader(stuck.load), load_timeout_s=0.01)
    for _ in range(3):
        with pytest.raises(ModelRejected, match="did not end"):
            await slot.load(Source(Path("hangs")))
    with pytest.raises(ModelRejected, match="3 earlier loads still hang: restart this replica"):
        await slot.load(Source(Path("well")))
    stuck.gate.set()
    await wait_until(lambda: len(stuck.models) == 3)

    async def loads() -> bool:
        try:
            await slot.load(Source(Path("well")))
        except ModelRejected:  # a thread may take a moment to end, or this one more than its 10 ms
            return False
        return True

    await wait_until(loads, what="a load, now that none hangs")
    await asyncio.to_thread(slot.close)


async def test_a_close_leaves_a_micro_batch_behind_that_does_not_end(slot: ModelSlot, model: Gated) -> None:
    hangs = asyncio.create_task(slot.encode(model, ONE_TEXT))
    await wait_until(lambda: len(model.gates) == 1)
    await asyncio.to_thread(slot.close, 0.05)
    model.gates[0].open.set()
    await hangs
