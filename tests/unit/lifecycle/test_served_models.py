"""Several aliases of one replica, on one device: which models are loaded for them, and which stay."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.engine import Encoder
from embedq_consumer.lifecycle import AliasOptions, BatchOptions, ModelOptions, ServedModels
from embedq_consumer.lifecycle.reloader import Turn, everybodys_turn
from embedq_consumer.lifecycle.served_model import ServedModel
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import read_status
from embedq_shared.messages import Control, Status
from embedq_shared.topics import Topics
from tests.helpers.fake_models import INSPECTION, FakeLoader, FakeModel, LiveCommands
from tests.helpers.metric_values import sample_value
from tests.helpers.support import patient, wait_until

_BATCHES = BatchOptions(max_tokens=512, max_items=4, max_wait_s=0.0, bulk_max_wait_s=5.0)


class Several:
    """Aliases that begin with the directories that a test names; each directory is a model of its name."""

    def __init__(self, root: Path, begins: Mapping[str, str], **options: Any) -> None:
        self.root = root.resolve()
        self.metrics = Metrics()
        self.sent: list[tuple[bytes, Status]] = []
        self.facts: dict[str, object] = {}
        self.loads: list[str] = []
        self.models: dict[str, FakeModel] = {}
        """The last that was loaded of each directory."""
        self.held: list[str] = []
        self.loader = FakeLoader(self._load)
        self.aliases: dict[str, ServedModel] = {}
        for name in ("one", "two", "three", "four"):
            (self.root / name).mkdir(exist_ok=True)
            (self.root / name / "model.safetensors").write_text(name)
        common = ModelOptions(
            alias="",
            replica="r",
            topics=Topics("t"),
            configured=self.root,
            root=self.root,
            batches=_BATCHES,
            drain_timeout_s=7.0,
            load_timeout_s=patient(30.0),
            stall_timeout_s=60.0,
            attempts=self.root / "attempts",
        )
        self.served = ServedModels(
            AliasOptions(
                aliases=[
                    msgspec.structs.replace(
                        common, alias=alias, configured=self.root / directory, first=not number
                    )
                    for number, (alias, directory) in enumerate(begins.items())
                ],
                **options,
            ),
            self.loader,
            self._publish,
            self.metrics,
            self.facts.update,
        )
        self.aliases = {one.alias: one for one in self.served}

    async def start(self) -> None:
        for one in self.served:
            await one.start(None)

    def serving(self) -> dict[str, str]:
        """The directory that serves each alias."""
        return {alias: one.slot.loaded.path.name for alias, one in self.aliases.items()}

    def steps(self, alias: str, version: int) -> list[str]:
        """The steps of a command, each once in a row, with its outcome."""
        said = [status for _, status in self.sent if (status.alias, status.version) == (alias, version)]
        steps = [status.step for status in said]
        return [step for before, step in zip([None, *steps], steps, strict=False) if step != before]

    @asynccontextmanager
    async def live(self, turn: Turn = everybodys_turn) -> AsyncIterator[Callable[..., None]]:
        """Follow what is written inside, by alias."""
        topics = {alias: LiveCommands() for alias in self.aliases}
        following = [
            asyncio.create_task(one.follow(topics[alias], self._hold(alias), turn))
            for alias, one in self.aliases.items()
        ]

        def write(alias: str, version: int, path: str, **more: Any) -> None:
            topics[alias].write(
                Control(alias=alias, version=version, path=path, command_id=f"{alias}{version}", **more)
            )

        try:
            yield write
        finally:
            for task in following:
                task.cancel()
            for task in following:
                with suppress(asyncio.CancelledError):
                    await task

    async def until(self, alias: str, version: int, state: str) -> Status:
        """The first status that says this of a command."""

        def found() -> list[Status]:
            return [
                said
                for _, said in self.sent
                if (said.alias, said.version, said.state) == (alias, version, state)
            ]

        await wait_until(lambda: bool(found()), what=f"{state} of {alias} {version}")
        return found()[0]

    def sample(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)

    def _load(self, path: Path) -> Encoder:
        self.loads.append(path.name)
        self.models[path.name] = FakeModel(f"sha256:{path.name}")
        return self.models[path.name]

    def _hold(self, alias: str) -> Callable[[float], AbstractAsyncContextManager[None]]:
        @asynccontextmanager
        async def held(within: float) -> AsyncIterator[None]:
            assert not self.held or self.held[-1].startswith("-"), "two aliases held all jobs at once"
            self.held.append(f"+{alias}")
            try:
                await asyncio.sleep(0)
                yield
            finally:
                self.held.append(f"-{alias}")

        return held

    async def _publish(self, records: list[Outgoing]) -> None:
        for record in records:
            assert record.value is not None
            assert record.key is not None
            self.sent.append((record.key, read_status(record.key, record.value)))


Make = Callable[..., Several]


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Make]:
    made: list[Several] = []

    def make(begins: Mapping[str, str], **options: Any) -> Several:
        made.append(Several(tmp_path, begins, **options))
        return made[-1]

    yield make
    for one in made:
        one.served.close()


async def test_each_alias_begins_with_its_model_and_one_that_two_have_is_loaded_once(several: Make) -> None:
    s = several({"a": "one", "b": "two", "c": "one"})
    await s.start()
    assert s.loads == ["one", "two"]
    assert s.serving() == {"a": "one", "b": "two", "c": "one"}
    encoders = s.served.encoders()
    assert list(encoders) == ["a", "b", "c"]
    assert encoders["a"] is encoders["c"]
    assert len({id(queue) for queue in s.served.queues.values()}) == 3, "each alias has a queue of its own"


async def test_no_alias_overwrites_the_status_of_another(several: Make) -> None:
    s = several({"a": "one", "b": "two", "c/d": "one"})
    await s.start()
    last = dict(s.sent)
    assert {key: (status.alias, status.path, status.state) for key, status in last.items()} == {
        b"r": ("a", "one", "READY"),
        b"r/b": ("b", "two", "READY"),
        b"r/c/d": ("c/d", "one", "READY"),
    }


async def test_an_alias_changes_to_a_model_in_memory_without_a_load(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    async with s.live() as write:
        write("b", 1, "one")
        status = await s.until("b", 1, "READY")
    assert (s.loads, s.serving()) == (["one", "two"], {"a": "one", "b": "one"})
    assert s.steps("b", 1) == ["validate", "check", "drain", "swap", "serving"]
    assert status.model_version == "sha256:one"
    assert s.models["two"].closed, "nobody has it any more"
    assert not s.models["one"].closed
    assert s.held == ["+b", "-b"]


async def test_a_model_that_another_alias_has_is_not_freed(several: Make) -> None:
    s = several({"a": "one", "b": "one"})
    await s.start()
    async with s.live() as write:
        write("a", 1, "two", policy="resource_preserving")
        await s.until("a", 1, "READY")
        assert (s.serving(), s.models["one"].closed) == ({"a": "two", "b": "one"}, False)
        write("b", 1, "two")
        await s.until("b", 1, "READY")
    assert (s.loads, s.models["one"].closed, s.models["two"].closed) == (["one", "two"], True, False)


async def test_a_change_to_a_model_in_memory_is_checked_like_any_other(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    async with s.live() as write:
        write("b", 1, "one", digest="sha256:else")
        failed = await s.until("b", 1, "FAILED")
        assert failed.error is not None
        assert "sha256:else" in failed.error
        write("b", 2, "one", min_dimensions=99)
        await s.until("b", 2, "FAILED")
    assert s.serving() == {"a": "one", "b": "two"}
    assert not s.models["one"].closed, "it serves the other alias"


async def test_files_that_have_changed_are_loaded_though_their_model_be_in_memory(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    (s.root / "one" / "model.safetensors").write_text("other weights")
    async with s.live() as write:
        write("b", 1, "one")
        await s.until("b", 1, "READY")
    assert s.loads == ["one", "two", "one"]
    encoders = s.served.encoders()
    assert encoders["a"] is not encoders["b"]


async def test_who_names_what_serves_has_it_loaded_anew(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    async with s.live() as write:
        write("b", 1, "two")
        await s.until("b", 1, "READY")
    assert s.loads == ["one", "two", "two"]


async def test_models_stay_as_the_settings_say_and_going_back_costs_no_load(several: Make) -> None:
    s = several({"a": "one"}, kept_models=1)
    await s.start()
    async with s.live() as write:
        for version, path in enumerate(["two", "one", "two", "three", "one"], start=1):
            write("a", version, path)
            await s.until("a", version, "READY")
    assert s.loads == ["one", "two", "three", "one"], "one went for two, when three came"
    assert s.steps("a", 2) == ["validate", "check", "drain", "swap", "serving"]
    assert [name for name, model in s.models.items() if model.closed] == ["two"]


async def test_without_the_settings_nothing_stays(several: Make) -> None:
    s = several({"a": "one"})
    await s.start()
    async with s.live() as write:
        for version, path in enumerate(["two", "one"], start=1):
            write("a", version, path)
            await s.until("a", version, "READY")
    assert s.loads == ["one", "two", "one"]
    assert s.models["two"].closed
    assert {source.stamp for source in s.loader.sources} == {None}, "nor are files looked at for it"


async def test_a_pinned_model_stays(several: Make, tmp_path: Path) -> None:
    s = several({"a": "one"}, pinned=frozenset([tmp_path.resolve() / "one"]))
    await s.start()
    async with s.live() as write:
        for version, path in enumerate(["two", "three", "one"], start=1):
            write("a", version, path)
            await s.until("a", version, "READY")
    assert s.loads == ["one", "two", "three"]


async def test_models_that_nobody_uses_make_room_for_a_load(several: Make) -> None:
    s = several({"a": "one"}, kept_models=3)
    await s.start()
    async with s.live() as write:
        write("a", 1, "two")
        await s.until("a", 1, "READY")
        # 30 free and 100 of `one`, which nobody uses: enough for 120, beside `two`.
        s.loader.inspection = msgspec.structs.replace(INSPECTION, needed=120, free=30)
        write("a", 2, "three")
        await s.until("a", 2, "READY")
        assert (s.models["one"].closed, s.models["two"].closed) == (True, False)
        # Now 100 of `two` may go, and 100 of `three`, which serves: not enough.
        s.loader.inspection = msgspec.structs.replace(INSPECTION, needed=300, free=30)
        write("a", 3, "four")
        failed = await s.until("a", 3, "FAILED")
    assert failed.error is not None
    assert failed.error.startswith("memory: needs")
    assert (s.models["two"].closed, s.loads) == (False, ["one", "two", "three"]), "nothing went in vain"


async def test_what_another_alias_has_is_not_counted_as_room(several: Make) -> None:
    s = several({"a": "one", "b": "one"})
    await s.start()
    s.loader.inspection = msgspec.structs.replace(INSPECTION, needed=120, free=30)
    async with s.live() as write:
        write("a", 1, "two")
        failed = await s.until("a", 1, "FAILED")
        assert failed.error is not None
        assert "0.0 GB more without the old model" in failed.error
        s.loader.inspection = INSPECTION
        write("b", 1, "three")
        await s.until("b", 1, "READY")
        s.loader.inspection = msgspec.structs.replace(INSPECTION, needed=120, free=30)
        write("a", 2, "two")
        await s.until("a", 2, "READY")
    assert s.serving() == {"a": "two", "b": "three"}
    assert s.models["one"].closed


async def test_a_model_to_begin_with_that_does_not_fit_beside_the_others_is_not_tried(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    a, b = s.served
    await a.start(None)
    s.loader.inspection = msgspec.structs.replace(INSPECTION, needed=120, free=30)
    await b.start(Control(alias="b", version=1, path="three", command_id="b1"))
    assert s.loads == ["one", "two"], "the configured one instead"
    failed = await s.until("b", 1, "FAILED")
    assert failed.error is not None
    assert failed.error.startswith("memory: needs")


async def test_one_alias_changes_at_a_time_and_each_counts_with_what_the_other_left(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    async with s.live() as write:
        write("a", 1, "three")
        write("b", 1, "three")
        await s.until("a", 1, "READY")
        await s.until("b", 1, "READY")
    assert s.loads == ["one", "two", "three"], "the second one found it there"
    assert s.serving() == {"a": "three", "b": "three"}
    assert s.held in (["+a", "-a", "+b", "-b"], ["+b", "-b", "+a", "-a"])


async def test_who_waits_for_its_turn_in_a_fleet_holds_up_no_other_alias(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    turn = asyncio.Event()

    async def waits(command: Control) -> None:
        if command.alias == "a":
            await turn.wait()

    async with s.live(waits) as write:
        write("a", 1, "three")
        await wait_until(lambda: s.steps("a", 1) == ["validate"], what="the wait")
        write("b", 1, "four")
        await s.until("b", 1, "READY")
        assert s.serving() == {"a": "one", "b": "four"}
        turn.set()
        await s.until("a", 1, "READY")


async def test_an_alias_whose_slot_is_empty_lets_no_other_one_in(several: Make) -> None:
    """Its successor fills the slot: until then all jobs are held, and a second hold would let them go."""
    s = several({"a": "one", "b": "two"})
    await s.start()
    loading = threading.Event()

    def load(path: Path) -> Encoder:
        if path.name == "three":
            loading.set()
            given_up = threading.Event()
            with s.loader.cancels[-1].stopping(given_up.set):
                assert given_up.wait(30)
            s.loader.cancels[-1].check()
        return s._load(path)

    s.loader.load_path = load
    async with s.live() as write:
        write("a", 1, "three", policy="resource_preserving")
        await wait_until(loading.is_set, what="the load")
        write("b", 1, "one")
        write("a", 2, "four")
        await s.until("a", 2, "READY")
        await s.until("b", 1, "READY")
    assert s.held == ["+a", "-a", "+b", "-b"]
    assert s.serving() == {"a": "four", "b": "one"}


async def test_what_operators_see_is_of_all_aliases(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    for alias, name in (("a", "one"), ("b", "two")):
        assert s.sample("model_info", alias=alias, model_version=f"sha256:{name}", hidden_size="2") == 1
    assert s.facts["max_batch_tokens of a"] == s.facts["max_batch_tokens of b"] == 512
    s.aliases["a"]._budget.ran_out(300)
    assert s.sample("batch_budget_tokens") == 150
    s.aliases["b"]._budget.ran_out(400)
    assert s.sample("batch_budget_tokens") == 150, "the smallest"
    assert s.sample("reload_running_seconds") == 0
    assert s.served.busy_since == {"compute": None, "tokenize": None}
    s.aliases["a"].slot.busy_since, s.aliases["b"].slot.busy_since = 7.0, 5.0
    assert s.served.busy_since == {"compute": 5.0, "tokenize": None}
    s.aliases["b"].slot.busy_since = None
    assert s.served.busy_since == {"compute": 7.0, "tokenize": None}


async def test_dimensions_that_jobs_ask_of_one_alias_bind_that_one_alone(several: Make) -> None:
    s = several({"a": "one", "b": "two"})
    await s.start()
    s.served.note_dimensions("a", 64)
    async with s.live() as write:
        write("a", 1, "three")
        write("b", 1, "three")
        assert "dimensions" in str((await s.until("a", 1, "FAILED")).error)
        await s.until("b", 1, "READY")
