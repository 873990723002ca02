"""A reloader with everything that it needs, over models that are a vector each: no torch, no broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.engine import (
    Cancellation,
    Chunked,
    Encoder,
    Failed,
    Footprint,
    Inspection,
    Memory,
    Pending,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.lifecycle import BatchOptions, ModelOptions, ServedModel
from embedq_consumer.lifecycle.model_slot import Loader, Source
from embedq_consumer.lifecycle.reloader import Turn, everybodys_turn
from embedq_consumer.lifecycle.warming.cache_warmer import Cache, WarmOptions
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import decode_status
from embedq_shared.messages import Control, Status
from embedq_shared.topics import Topics
from tests.helpers.metric_values import sample_value
from tests.helpers.support import patient, wait_until

Vectors = npt.NDArray[np.float32]


_BATCHES: Final = BatchOptions(max_tokens=512, max_items=4, max_wait_s=0.0, bulk_max_wait_s=5.0)


FOOTPRINT: Final = Footprint(
    device="the device",
    architecture="{}",
    dtype="bf16",
    quantization="none",
    keep_bf16=(),
    deterministic=False,
    kernels=(),
    pooling=("mean",),
    dense=(),
    max_tokens=64,
)
"""Of a model that is given it; fake models have none by themselves."""


class FakeVectors(Pending):
    """Vectors that are there already."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    def result(self) -> Vectors:
        return self._vectors


class FakeModel(Encoder):
    """Gives each text the same vector, on a device without a memory of its own. A token a character, and one more.

    `failures` are raised by the first submits, one each, `fails_always` by every one. `cuts`: whether the tokenizer cuts.
    `unreadable` is why its tokenizer reads no text, `tokenize_fails` what it raises on every call.
    """

    def __init__(
        self,
        version: str = "sha256:old",
        vector: Sequence[float] = (3.0, 4.0),
        *,
        failures: Sequence[Exception] = (),
        fails_always: BaseException | None = None,
        cuts: bool = True,
        unreadable: str | None = None,
        tokenize_fails: BaseException | None = None,
    ) -> None:
        self.model_version = version
        self.hidden_size = len(vector)
        self.max_tokens = 64
        self.prompts: Mapping[str, str] = {}
        self.late_chunks = False
        self.default_prompt = ""
        self.notes: Sequence[str] = ()
        self.phases: Mapping[str, float] = {"read": 0.5}
        self.weight_bytes = 100
        self.closed = False
        self.batches: list[list[int]] = []
        self._vector = np.array(vector, dtype=np.float32)
        self._failures = list(failures)
        self._fails_always = fails_always
        self._cuts = cuts
        self._unreadable = unreadable
        self._tokenize_fails = tokenize_fails

    @property
    def kernels(self) -> Mapping[str, str]:
        return {}

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong | Failed]:
        if self._tokenize_fails is not None:
            raise self._tokenize_fails
        if self._unreadable is not None:
            return [Failed(self._unreadable) for _ in texts]
        lengths = [len(text.text) for text in texts]
        if not self._cuts:
            return [TextTooLong(length, self.max_tokens) for length in lengths]
        return [Tokens(np.zeros(1 + min(length, self.max_tokens - 1), dtype=np.int32)) for length in lengths]

    def chunk(self, texts: Sequence[Text]) -> list[Chunked | TextTooLong | Failed]:
        raise NotImplementedError

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        if self._fails_always is not None:
            raise self._fails_always
        if self._failures:
            raise self._failures.pop(0)
        self.batches.append([len(tokens.ids) for tokens in batch])
        return FakeVectors(np.stack([self._vector] * len(batch)))

    def encode(self, batch: Sequence[npt.NDArray[np.int32]]) -> Vectors:
        raise NotImplementedError

    def memory(self) -> Memory | None:
        return None

    def close(self) -> None:
        self.closed = True


class ScriptEnded(Exception):
    """There are no more commands: ends `follow`."""


class Script:
    """Hands out these commands, each poll once `idle`, then ends the loop that reads it."""

    def __init__(self, idle: Callable[[], bool], *polls: Sequence[Control]) -> None:
        self._idle = idle
        self._polls = list(polls)

    async def next(self) -> Sequence[Control]:
        await wait_until(self._idle, what="the end of a reload")
        if not self._polls:
            raise ScriptEnded
        return self._polls.pop(0)


class LiveCommands:
    """Commands that a test writes while a reload runs."""

    def __init__(self) -> None:
        self._written: asyncio.Queue[Sequence[Control]] = asyncio.Queue()

    def write(self, *commands: Control) -> None:
        """All of one poll."""
        self._written.put_nowait(commands)

    async def next(self) -> Sequence[Control]:
        return await self._written.get()


INSPECTION: Final = Inspection(needed=100, free=1000, total=1000, device="the device", hidden_size=None)
"""There is room for everything."""


class FakeLoader(Loader):
    """Loads by a function, and inspects by another; by default there is room for everything."""

    def __init__(self, load: Callable[[Path], Encoder]) -> None:
        self.load_path = load
        self.inspection = INSPECTION
        self.problem: BaseException | None = None
        """What every inspection raises."""
        self.read_path: Callable[[Path], bool] = lambda _: True
        """Reads a directory's files ahead."""
        self.sources: list[Source] = []
        self.cancels: list[Cancellation] = []

    def inspect(self, source: Source, cancel: Cancellation) -> Inspection:
        if self.problem is not None:
            raise self.problem
        return self.inspection

    def read_ahead(self, source: Source, cancel: Cancellation) -> bool:
        self.cancels.append(cancel)
        return self.read_path(source.path)

    def load(self, source: Source, cancel: Cancellation) -> Encoder:
        self.sources.append(source)
        self.cancels.append(cancel)
        return self.load_path(source.path)


class Bench:
    """One served model of the alias "a", whose model directories and their encoders a test names.

    `models` maps a directory's name to its encoders, one for each load of it, the last for all further loads; an
    exception among them is raised by that load.
    """

    def __init__(
        self,
        root: Path,
        models: Mapping[str, list[FakeModel | BaseException]],
        *,
        stall_timeout_s: float = 60.0,
        load_timeout_s: float = 30.0,
        batches: BatchOptions = _BATCHES,
        loader: Loader | None = None,
        cache: Cache | None = None,
        warming: WarmOptions | None = None,
    ) -> None:
        self.root = root.resolve()
        self.metrics = Metrics()
        self.topics = Topics("t")
        self.facts: dict[str, object] = {}
        self.sent: list[Status] = []
        self.records: list[Outgoing] = []
        self.holds: list[str] = []
        self.drains = True
        self._models = models
        self.loads: list[str] = []
        self.loader = FakeLoader(self._load)
        for name in models:
            (root / name).mkdir(exist_ok=True)
        self.model = ServedModel(
            ModelOptions(
                alias="a",
                replica="r",
                topics=self.topics,
                configured=self.root / "old",
                root=self.root,
                batches=batches,
                drain_timeout_s=7.0,
                load_timeout_s=patient(load_timeout_s),
                stall_timeout_s=stall_timeout_s,
                attempts=self.root / "attempts",
                warming=warming,
            ),
            loader or self.loader,
            self._publish,
            self.metrics,
            self.facts.update,
            cache=cache,
        )

    def _load(self, path: Path) -> Encoder:
        self.loads.append(path.name)
        models = self._models[path.name]
        found = models.pop(0) if len(models) > 1 else models[0]
        if isinstance(found, BaseException):
            raise found
        return found

    async def _publish(self, records: list[Outgoing]) -> None:
        self.records += records
        for record in records:
            assert record.topic == self.topics.status
            assert record.key == b"r"
            assert record.value is not None
            self.sent.append(decode_status(record.value))

    def hold(self, within: float) -> AbstractAsyncContextManager[None]:
        """As `Intake.held`: raises if `drains` is False, and notes which model serves before and after."""

        @asynccontextmanager
        async def held() -> AsyncIterator[None]:
            assert within == 7.0
            if not self.drains:
                raise TimeoutError
            self.holds.append(self.serving)
            try:
                yield
            finally:
                self.holds.append(self.serving)

        return held()

    @property
    def serving(self) -> str:
        """The directory of the model that serves, or ""."""
        loaded = self.model.slot.serving
        return loaded.path.name if loaded else ""

    async def follow(self, *polls: Sequence[Control], turn: Turn = everybodys_turn) -> None:
        """Apply commands, given by what each poll returns; a poll comes when the reload before has ended."""
        script = Script(lambda: self.sample("reload_running_seconds") == 0, *polls)
        with suppress(ScriptEnded):
            await self.model.follow(script, self.hold, turn)

    @asynccontextmanager
    async def live(self, turn: Turn = everybodys_turn) -> AsyncIterator[LiveCommands]:
        """Follow what is written inside."""
        commands = LiveCommands()
        following = asyncio.create_task(self.model.follow(commands, self.hold, turn))
        try:
            yield commands
        finally:
            following.cancel()
            await asyncio.wait({following})
            if not following.cancelled() and (error := following.exception()) is not None:
                raise error

    async def until(self, version: int, state: str) -> Status:
        """The first status that says this of a command."""

        def found() -> list[Status]:
            return [said for said in self.sent if (said.version, said.state) == (version, state)]

        await wait_until(lambda: bool(found()), what=f"{state} of version {version}")
        return found()[0]

    def steps(self) -> list[str]:
        """The steps that were reported, each once in a row."""
        steps = [status.step for status in self.sent]
        return [step for before, step in zip([None, *steps], steps, strict=False) if step != before]

    def sample(self, name: str, **labels: str) -> float | None:
        """A metric's value."""
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)


MakeBench = Callable[..., Bench]


def command(version: int, path: str, **more: Any) -> Control:
    """A control record of the alias "a"."""
    return Control(**{"alias": "a", "version": version, "path": path, "command_id": f"c{version}", **more})
