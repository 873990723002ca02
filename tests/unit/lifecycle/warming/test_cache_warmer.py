"""The new model's vectors of what is used most are in the cache before it serves, and jobs hardly notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq_consumer.cache import CachedVector, cache_key
from embedq_consumer.engine import OutOfMemory, Pending, Text, Tokens
from embedq_consumer.lifecycle.reloader import Hold
from embedq_consumer.lifecycle.warming.cache_warmer import WarmOptions, longest_wait
from embedq_shared.messages import Job
from tests.helpers.fake_models import Bench, FakeModel, LiveCommands, command
from tests.helpers.fake_parts import DictCache
from tests.helpers.support import wait_until

OLD, NEW = ("sha256:" + digit * 64 for digit in "01")


class Recorder(FakeModel):
    """A new model that notes what had been in its cache when it ran its last text, and whose prompt is its own."""

    def __init__(self, version: str = NEW, **more: Any) -> None:
        super().__init__(version, vector=np.arange(1.0, 65.0).tolist(), **more)
        self.prompts = {"query": "new: "}
        self.max_tokens = 512


@asynccontextmanager
async def warmed_bench(
    tmp_path: Path, new: FakeModel, cache: DictCache, *, seconds: float = 60.0
) -> AsyncIterator[Bench]:
    """The old model serves, and a command may ask for the new one."""
    models: dict[str, Any] = {"old": [FakeModel(OLD, vector=[1.0] * 64)], "new": [new]}
    bench = Bench(tmp_path, models, cache=cache, warming=WarmOptions(texts=8, seconds=seconds))
    await bench.model.start(None)
    try:
        yield bench
    finally:
        await asyncio.to_thread(bench.model.close)


def use(bench: Bench, *jobs: Job) -> None:
    for job in jobs:
        bench.model.note_use(job)
        bench.model.note_use(job)


def counted(bench: Bench) -> dict[str, float | None]:
    outcomes = ("computed", "found", "left", "failed")
    found = {outcome: bench.sample("cache_warmed_total", outcome=outcome) for outcome in outcomes}
    return {outcome: count for outcome, count in found.items() if count}


def held_by(hold: Hold, before: Callable[[], None]) -> Hold:
    def noted(within: float) -> AbstractAsyncContextManager[None]:
        before()
        return hold(within)

    return noted


async def test_before_the_swap_the_cache_has_the_new_models_vectors_in_each_form_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DictCache()
    async with warmed_bench(tmp_path, Recorder(), cache) as bench:
        use(
            bench,
            Job(input=["plain", "cut " * 200], truncate="end"),
            Job(input="plain", input_type="query"),
            Job(input="plain", truncate="end", dimensions=32, dtype="int8"),
        )
        bench.model.note_use(Job(input="asked for once"))
        at_drain: list[int] = []
        monkeypatch.setattr(bench, "hold", held_by(bench.hold, lambda: at_drain.append(len(cache.entries))))
        await bench.follow([command(1, "new")])
        assert (bench.serving, at_drain) == ("new", [4])
        keys = {
            "plain": cache_key(NEW, Text("plain"), 64, "float32"),
            "cut": cache_key(NEW, Text("cut " * 200), 64, "float32"),
            "query": cache_key(NEW, Text("plain", "new: "), 64, "float32"),
            "int8": cache_key(NEW, Text("plain"), 32, "int8"),
        }
        assert set(cache.entries) == set(keys.values())
        expected = np.arange(1.0, 65.0, dtype=np.float32)
        expected /= np.linalg.norm(expected)
        plain = cache.entries[keys["plain"]]
        np.testing.assert_allclose(np.frombuffer(plain.vector, "<f4"), expected, rtol=1e-6)
        assert (plain.tokens, plain.truncated, plain.scale) == (6, "", None)
        assert cache.entries[keys["cut"]].truncated == ""
        assert len(cache.entries[keys["int8"]].vector) == 32
        assert cache.entries[keys["int8"]].scale is not None
        assert counted(bench) == {"computed": 4}
        warmed = [(status.step, status.warmed) for status in bench.sent if status.version == 1]
        assert warmed.index(("check", 0)) < warmed.index(("check", 4)) < warmed.index(("drain", 4))
        assert (bench.sent[-1].state, bench.sent[-1].warmed) == ("READY", 4)


async def test_what_another_replica_has_put_there_is_not_computed_again(tmp_path: Path) -> None:
    cache, new = DictCache(), Recorder()
    there = CachedVector(tokens=1, truncated="", scale=None, vector=b"\0" * 256)
    cache.entries[cache_key(NEW, Text("found"), 64, "float32")] = there
    async with warmed_bench(tmp_path, new, cache) as bench:
        use(bench, Job(input=["found", "computed"]))
        await bench.follow([command(1, "new")])
        assert counted(bench) == {"found": 1, "computed": 1}
        assert cache.entries[cache_key(NEW, Text("found"), 64, "float32")] is there


async def test_nothing_is_warmed_while_jobs_wait_for_the_new_model_nor_for_one_that_fails(
    tmp_path: Path,
) -> None:
    cache = DictCache()
    async with warmed_bench(tmp_path, Recorder(), cache) as bench:
        use(bench, Job(input="text"))
        await bench.follow([command(1, "new", policy="resource_preserving")])
        assert bench.serving == "new"
        await bench.follow([command(2, "old", digest=NEW)])
        assert (bench.serving, bench.sent[-1].state) == ("new", "FAILED")
        assert cache.asked == []


async def test_a_model_that_cannot_take_these_forms_serves_all_the_same(tmp_path: Path) -> None:
    async with warmed_bench(tmp_path, Recorder(), DictCache()) as bench:
        use(bench, Job(input="text", dimensions=128))
        await bench.follow([command(1, "new", min_dimensions=32)])
        assert bench.serving == "new"
        assert counted(bench) == {"failed": 1}


class Deaf(DictCache):
    """Takes nothing."""

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> int:
        return 0


async def test_a_cache_that_is_away_costs_one_micro_batch(tmp_path: Path) -> None:
    new = Recorder()
    async with warmed_bench(tmp_path, new, Deaf()) as bench:
        use(bench, Job(input=["one " * 9, "two " * 9, "six " * 9]))  # 37 tokens each, of 32 in a part
        before = len(new.batches)
        await bench.follow([command(1, "new")])
        assert bench.serving == "new"
        assert counted(bench) == {"failed": 1, "left": 2}
        assert [batch for batch in new.batches[before:] if batch == [37]] == [[37]]


async def test_time_bounds_it(tmp_path: Path) -> None:
    async with warmed_bench(tmp_path, Recorder(), DictCache(), seconds=0.0) as bench:
        use(bench, Job(input=["one", "two"]))
        await bench.follow([command(1, "new")])
        assert (bench.serving, counted(bench)) == ("new", {"left": 2})


class Failing(Recorder):
    """Raises on each text of 38 tokens."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        if any(len(tokens.ids) == 38 for tokens in batch):
            raise self.error
        return super().submit(batch)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("of this text"), {"failed": 1, "computed": 2}),
        (OutOfMemory(), {"failed": 1, "left": 2}),
    ],
)
async def test_what_fails_in_it_is_not_the_models_end(
    tmp_path: Path, error: Exception, outcome: dict[str, int]
) -> None:
    async with warmed_bench(tmp_path, Failing(error), DictCache()) as bench:
        use(bench, Job(input=["x" * 37, "one " * 9, "two " * 9]))
        await bench.follow([command(1, "new")])
        assert (bench.serving, counted(bench)) == ("new", outcome)


class Overtaken(DictCache):
    """Does not take its first entry before a newer command is there."""

    bench: Bench
    commands: LiveCommands

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> int:
        if not self.entries:
            self.commands.write(command(2, "old"))
            await wait_until(lambda: self.bench.loader.cancels[-1].is_set, what="a newer command")
        return await super().put_many(items)


@pytest.mark.usefixtures("soon")
async def test_a_newer_command_ends_it(tmp_path: Path) -> None:
    new, cache = Recorder(), Overtaken()
    async with warmed_bench(tmp_path, new, cache) as cache.bench, cache.bench.live() as cache.commands:
        use(cache.bench, Job(input=["one " * 9, "two " * 9]))
        cache.commands.write(command(1, "new"))
        await cache.bench.until(2, "READY")
        entries = [key for key in cache.entries if NEW.removeprefix("sha256:").encode() in key]
        assert (len(entries), cache.bench.serving, new.closed) == (1, "old", True)


async def test_its_micro_batches_wait_for_an_idle_device_or_take_an_eleventh_of_the_time(
    tmp_path: Path,
) -> None:
    assert longest_wait(0.05) == 0.5
    async with warmed_bench(tmp_path, Recorder(), DictCache()) as bench:
        slot = bench.model.slot
        await slot.idle(0.0)
        running = asyncio.ensure_future(
            slot.encode(slot.loaded.encoder, [Tokens(np.zeros(1, dtype=np.int32))])
        )
        await asyncio.sleep(0)
        idle = asyncio.ensure_future(slot.idle(60.0))
        await asyncio.wait({running})
        await idle
        assert slot.busy_since is None
