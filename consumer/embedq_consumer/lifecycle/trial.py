"""The trial that every model stands before it may serve: validate, load, warm up, check, compare. Then its cache is warmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.batching.token_budget import Budget, Measured, conditions_of, find_budget, part_fits
from embedq_consumer.engine import (
    Abandoned,
    DeviceLost,
    Encoder,
    Failed,
    Inspection,
    ModelError,
    OutOfMemory,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.lifecycle.gates.checks import (
    CHECK_TEXTS,
    ModelRejected,
    Vectors,
    check_finite,
    check_similarity,
    check_version,
)
from embedq_consumer.lifecycle.gates.dimensions import DimensionsInUse, check_dimensions
from embedq_consumer.lifecycle.gates.golden import check_golden, read_golden
from embedq_consumer.lifecycle.gates.load_attempts import Attempt, LoadAttempts
from embedq_consumer.lifecycle.gates.model_root import ModelRoot
from embedq_consumer.lifecycle.gates.policy import choose_policy
from embedq_consumer.lifecycle.gates.stamp import stamp_of
from embedq_consumer.lifecycle.model_slot import Computed, Loaded, ModelSlot, Source
from embedq_consumer.lifecycle.pursuit import Pursuit
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.lifecycle.warming.cache_warmer import CacheWarmer
from embedq_shared.golden import Golden
from embedq_shared.messages import GOLDEN_FILE, Control, Policy, Step
from embedq_shared.vectors import cut_and_normalize

log = structlog.get_logger()

Returned = TypeVar("Returned")

_MOST_WORDS: Final = 1 << 17
"""Of the warm-up's longest text: a model that says it takes more is warmed up with this."""


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that passed whatever can be known before it is loaded: how to load it, and what its vectors must be."""

    source: Source
    policy: Policy
    golden: Golden | None
    lacks: int = 0
    """Bytes that models which nobody uses must make room for."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that passed its trial: it may serve, within this token budget."""

    loaded: Loaded
    budget: Budget


class TrialLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Within which limits a model stands its trial."""

    batch_tokens: int
    batch_items: int
    stall_timeout_s: float
    """A micro-batch that takes longer means that the device hangs."""


class Gates(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of models and of the jobs before a model is loaded."""

    root: ModelRoot
    attempts: LoadAttempts
    dimensions: DimensionsInUse


class TrialRuns:
    """Runs a model on trial: what it raises is a reason to reject it, or to try a smaller micro-batch.

    Invariants:
        - Nothing but the tokenizer of a model on trial runs off the compute thread.
        - A command that is superseded is given up before its next call.
    """

    def __init__(self, slot: ModelSlot, limits: TrialLimits) -> None:
        self._slot = slot
        self._limits = limits

    async def measure(self, encoder: Encoder, pursuit: Pursuit | None) -> Measured:
        """The largest micro-batches that fit, found by running them, so that memory runs out now or never.

        Raises:
            ModelRejected: none does.
            Superseded: there is a newer command.
        """
        try:
            return await find_budget(
                encoder,
                lambda batch: self._encode(encoder, batch, pursuit),
                await self._long_text(encoder, encoder.max_tokens, pursuit),
                tokens=self._limits.batch_tokens,
                max_items=self._limits.batch_items,
            )
        except OutOfMemory as error:
            raise _too_little_memory() from error

    async def taken_over(self, encoder: Encoder, pursuit: Pursuit | None) -> Measured | None:
        """What the trial of a model in memory has found, where this one's would find the same: its longest text need not hold the device,
        and with it those who wait for the model that serves. Micro-batches like those of bulk jobs warm it up. None: it is to be tried.

        Raises:
            ModelRejected: it cannot run.
            Superseded: there is a newer command.
        """
        limits = self._limits
        conditions = conditions_of(encoder, tokens=limits.batch_tokens, max_items=limits.batch_items)
        if conditions is None or (found := await self._slot.measured_under(encoder, conditions)) is None:
            return None
        ids = await self._long_text(encoder, found.budget.tokens, pursuit)
        run = partial(self._encode, encoder, pursuit=pursuit)
        if not await part_fits(run, ids, found.budget, limits.batch_items):
            return None
        budget = found.budget
        log.info(
            "batch_budget",
            tokens=budget.tokens,
            longest_text=budget.longest,
            taken_over=True,
            takes_bytes=found.takes,
        )
        return found

    async def unit_vectors(self, encoder: Encoder, texts: Sequence[Text], pursuit: Pursuit | None) -> Vectors:
        """Float32 (texts, hidden_size).

        Raises:
            ModelRejected: it cannot run.
            Superseded: there is a newer command.
        """
        tokens = await self._tokens(encoder, texts, pursuit)
        try:
            # Each alone: together they may exceed a budget that was found on a small device.
            raw = [(await self._encode(encoder, [found], pursuit))[0] for found in tokens]
        except OutOfMemory as error:
            raise _too_little_memory() from error
        return np.stack([cut_and_normalize(vector, encoder.hidden_size) for vector in raw])

    async def compute(self, encoder: Encoder, batch: Sequence[Tokens], pursuit: Pursuit | None) -> Computed:
        """One micro-batch.

        Raises:
            OutOfMemory: a smaller one may fit.
            ModelRejected: it cannot run.
            Superseded: there is a newer command.
        """
        if pursuit is not None:
            pursuit.check()
        try:
            async with asyncio.timeout(self._limits.stall_timeout_s):
                return await self._slot.encode(encoder, batch)
        except (OutOfMemory, DeviceLost):
            raise
        except TimeoutError:
            # Nothing else runs on this device before it, and it cannot be taken back.
            raise DeviceLost(
                f"a micro-batch of the new model did not end within {self._limits.stall_timeout_s:g} s"
            ) from None
        except Exception as error:
            raise ModelRejected(f"the model cannot run: {type(error).__name__}") from error

    async def _encode(self, encoder: Encoder, batch: Sequence[Tokens], pursuit: Pursuit | None) -> Vectors:
        return (await self.compute(encoder, batch, pursuit))[0]

    async def _long_text(
        self, encoder: Encoder, tokens: int, pursuit: Pursuit | None
    ) -> npt.NDArray[np.int32]:
        """The ids of a text of about so many tokens, or as long as the model takes."""
        words = min(tokens, encoder.max_tokens, _MOST_WORDS)
        [found] = await self._tokens(encoder, [Text("warm up " * words, truncate="end")], pursuit)
        return found.ids

    async def _tokens(self, encoder: Encoder, texts: Sequence[Text], pursuit: Pursuit | None) -> list[Tokens]:
        """Tokens of texts that may be cut.

        Raises:
            ModelRejected: the tokenizer cannot read one, or hangs.
        """
        if pursuit is not None:
            pursuit.check()
        try:
            found = await self._slot.apart("tokenize", partial(encoder.tokenize, texts))
        except ModelRejected:
            raise
        except Exception as error:
            raise ModelRejected(f"the tokenizer cannot run: {type(error).__name__}") from error
        for each in found:
            if isinstance(each, TextTooLong):
                raise ModelRejected("the tokenizer did not cut a text that it was asked to cut")
            if isinstance(each, Failed):
                raise ModelRejected(f"the tokenizer does not take every text: {each.reason}")
        return [each for each in found if isinstance(each, Tokens)]


class Trial:
    """Makes a candidate of a directory. Each step is reported before it begins; a model that fails one is freed.

    Invariants:
        - A failure that is the model's, whatever its files hold, is `ModelError` or `ModelRejected`: no command ends the
          process. A lost or a hanging device does, and so does native code that crashes: what a command's model did to the
          processes before is asked of `gates.attempts`.
        - A command that is superseded is given up at its next step, and its model is freed. Not interrupted are a micro-batch that
          runs, and what `loader.load` names.
    """

    def __init__(
        self,
        slot: ModelSlot,
        gates: Gates,
        reporter: StatusReporter,
        limits: TrialLimits,
        warmer: CacheWarmer | None = None,
    ) -> None:
        self._slot = slot
        self._gates = gates
        self._reporter = reporter
        self._limits = limits
        self._warmer = warmer
        self._runs = TrialRuns(slot, limits)

    async def configured(self, directory: Path) -> Candidate:
        """The model of the settings, which no command asked for and which may lie anywhere.

        Raises:
            ModelError, ModelRejected: it may not serve. Its memory is not freed: there is no other to serve instead.
        """
        await self._reporter.update("load", "LOADING")
        found = partial(_configured, directory, shares=self._slot.device.shares)
        source, golden = await self._slot.apart("validate", found)
        try:
            loaded = await self._slot.load(source)
        except (ModelError, ModelRejected, DeviceLost):
            raise
        except Exception as error:
            raise _cannot_be_loaded(directory, error) from error
        if (budget := self._slot.budget_of(loaded)) is None:
            budget = await self._warm_up(loaded)
        check_finite(await self.check_vectors(loaded.encoder))
        await self._compare_golden(loaded.encoder, golden, None)
        return Candidate(loaded=loaded, budget=budget)

    async def examine(self, pursuit: Pursuit) -> Examined:
        """Validate: everything that can be said against a command's model before anything is given up for it.

        Raises:
            ModelError, ModelRejected: it may not serve.
            Superseded: there is a newer command.
        """
        command = pursuit.command
        await self._report("validate", command)
        async with pursuit.interruptible():
            found = partial(_found, self._gates, command, shares=self._slot.device.shares)
            source, golden = await self._slot.apart("validate", found)
        directory = source.path
        if (resident := self._slot.resident(source)) is not None:
            self._check_dimensions(resident.encoder.hidden_size, command)
            return Examined(source=source, policy="availability_preserving", golden=golden)
        needs = await self._of_loader(self._slot.inspect(source, pursuit.cancel), directory, pursuit)
        self._check_dimensions(needs.hidden_size, command)
        policy, lacks = _planned(self._slot, command, needs)
        source = msgspec.structs.replace(source, tried=True)
        return Examined(source=source, policy=policy, golden=golden, lacks=lacks)

    async def read_ahead(self, pursuit: Pursuit, examined: Examined) -> None:
        """Whatever of the load can be had before anything is given up for it: the model's files in memory, and whole.

        Raises:
            ModelError, ModelRejected: they cannot be read.
            Superseded: there is a newer command.
        """
        source = examined.source
        await self._of_loader(self._slot.read_ahead(source, pursuit.cancel), source.path, pursuit)

    async def serves(self, pursuit: Pursuit) -> bool:
        """Whether the model that a command names is the one that serves right now.

        Raises:
            ModelRejected: its path names no model directory.
            Superseded: there is a newer command.
        """
        command, serving = pursuit.command, self._slot.serving
        if serving is None:
            return False
        async with pursuit.interruptible():
            resolve = partial(self._gates.root.resolve, command.path)
            directory = await self._slot.apart("validate", resolve)
        same = (serving.source.path, serving.source.quantization) == (directory, command.quantization)
        return same and command.digest in (None, serving.encoder.model_version)

    async def stand(self, pursuit: Pursuit, examined: Examined, old: Vectors | None = None) -> Candidate:
        """The model of a command, loaded and checked.

        `old` is what to compare with; None: the check vectors of the model that serves, if one does.

        Raises:
            ModelError, ModelRejected: it may not serve; its memory is free again.
            Superseded: there is a newer command; its memory is free again.
        """
        if self._slot.resident(examined.source) is not None:
            return await self._try(await self._slot.load(examined.source), pursuit, examined, old)
        async with self._noted(pursuit):
            await self._report("load", pursuit.command)
            await self._slot.device.make_room(examined.lacks)
            return await self._try(await self._load(examined.source, pursuit), pursuit, examined, old)

    async def _try(
        self, loaded: Loaded, pursuit: Pursuit, examined: Examined, old: Vectors | None
    ) -> Candidate:
        """What follows once a model is in memory."""
        try:
            if (budget := self._slot.budget_of(loaded)) is None:
                await self._report("warm_up", pursuit.command)
                budget = await self._warm_up(loaded, pursuit)
            await self._report("check", pursuit.command)
            await self._check(loaded.encoder, pursuit, examined.golden, old)
            await self._warm_cache(loaded.encoder, budget, pursuit)
            pursuit.check()
        except DeviceLost:
            raise  # there is nothing left to free
        except BaseException:
            await self._slot.discard(loaded)
            raise
        return Candidate(loaded=loaded, budget=budget)

    async def check_vectors(self, encoder: Encoder, pursuit: Pursuit | None = None) -> Vectors:
        """Unit vectors of the check texts, float32 (texts, hidden_size).

        Raises:
            ModelRejected: the model cannot run.
            Superseded: there is a newer command.
        """
        texts = [Text(text, encoder.default_prompt, "end") for text in CHECK_TEXTS]
        return await self._runs.unit_vectors(encoder, texts, pursuit)

    def is_whole(self, candidate: Candidate) -> bool:
        """Whether its budget is all that was wished for: there is nothing that more memory could add."""
        whole = candidate.budget.tokens >= self._limits.batch_tokens
        return whole and candidate.budget.longest >= candidate.loaded.encoder.max_tokens

    async def measure(self, encoder: Encoder, pursuit: Pursuit | None = None) -> Measured:
        """The largest micro-batches that fit right now, found by running them.

        Raises:
            ModelRejected: none does.
            Superseded: there is a newer command.
        """
        return await self._runs.measure(encoder, pursuit)

    # -- the steps --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _noted(self, pursuit: Pursuit) -> AsyncIterator[None]:
        """Around a load that may end the process, so that the next process knows."""
        async with pursuit.interruptible():
            begin = partial(self._gates.attempts.begin, _name(pursuit.command))
            attempt = await self._slot.apart("validate", begin, late=Attempt.end)
        try:
            yield
        except DeviceLost:
            raise  # which ends the process
        except BaseException:
            await asyncio.to_thread(attempt.end)
            raise
        await asyncio.to_thread(attempt.end)

    async def _report(self, step: Step, command: Control) -> None:
        await self._reporter.update(step, "LOADING", command=command)

    async def _load(self, source: Source, pursuit: Pursuit) -> Loaded:
        return await self._of_loader(self._slot.load(source, pursuit.cancel), source.path, pursuit)

    async def _of_loader(
        self, work: Coroutine[Any, Any, Returned], directory: Path, pursuit: Pursuit
    ) -> Returned:
        """What the loader makes of a command's directory: its files must not end the process, whatever they hold."""
        try:
            return await work
        except Abandoned:
            pursuit.check()
            raise
        except (ModelError, ModelRejected, DeviceLost):
            raise
        except Exception as error:
            raise _cannot_be_loaded(directory, error) from error

    async def _check(
        self, encoder: Encoder, pursuit: Pursuit, golden: Golden | None, old: Vectors | None
    ) -> None:
        command = pursuit.command
        vectors = await self.check_vectors(encoder, pursuit)
        check_finite(vectors)
        check_version(command.digest, encoder.model_version)
        self._check_dimensions(encoder.hidden_size, command)
        await self._compare_golden(encoder, golden, command.golden_min_cosine, pursuit)
        if command.min_cosine is None:
            return
        if old is None:
            if self._slot.serving is None:
                return  # a replica that starts has no old model to compare with
            old = await self.check_vectors(self._slot.serving.encoder, pursuit)
        check_similarity(command.min_cosine, old, vectors)

    async def _warm_cache(self, encoder: Encoder, budget: Budget, pursuit: Pursuit) -> None:
        """Have what is used most ready in the cache; not while jobs wait for this model, as none serves."""
        if self._warmer is not None and self._slot.serving is not None:
            run = partial(self._runs.compute, encoder, pursuit=pursuit)
            await self._warmer.warm(encoder, run, budget.tokens)

    def _check_dimensions(self, hidden_size: int | None, command: Control) -> None:
        in_use = self._gates.dimensions.most(time.monotonic())
        check_dimensions(hidden_size, command.min_dimensions, in_use)

    async def _compare_golden(
        self,
        encoder: Encoder,
        golden: Golden | None,
        min_cosine: float | None,
        pursuit: Pursuit | None = None,
    ) -> None:
        if golden is not None:
            vectors = await self._runs.unit_vectors(encoder, _golden_texts(golden, encoder), pursuit)
            check_golden(golden, vectors, min_cosine)

    async def _warm_up(self, loaded: Loaded, pursuit: Pursuit | None = None) -> Budget:
        begin, encoder = time.monotonic(), loaded.encoder
        measured = None
        if self._slot.serving is not None:  # else nobody waits for the device
            measured = await self._runs.taken_over(encoder, pursuit)
        if measured is None:
            measured = await self.measure(encoder, pursuit)
        self._slot.note_measured(loaded, measured)
        phases = dict(encoder.phases) | {"warm_up": time.monotonic() - begin}
        log.info(
            "model_loaded",
            model_version=encoder.model_version,
            kernels=dict(encoder.kernels),
            seconds={name: round(taken, 3) for name, taken in phases.items()},
        )
        for note in encoder.notes:
            log.warning("model_note", model_version=encoder.model_version, note=note)
        return measured.budget


def _name(command: Control) -> str:
    """Of its load, for the processes after this one."""
    return f"{command.command_id} {command.path}"


def _found(gates: Gates, command: Control, *, shares: bool) -> tuple[Source, Golden | None]:
    """The model and the golden texts of a command. Blocks on the file system, which may be slow, or hang."""
    gates.attempts.refuse_deadly(_name(command))
    directory = gates.root.resolve(command.path)
    source = Source(directory, command.quantization, stamp=stamp_of(directory) if shares else None)
    if command.golden is None:
        return source, _golden_of(directory)
    return source, read_golden(gates.root.golden(command.golden))


def _planned(slot: ModelSlot, command: Control, needs: Inspection) -> tuple[Policy, int]:
    """How to make room for a model, and the bytes that ones which nobody uses must give.

    Raises:
        ModelRejected: it does not fit.
    """
    policy: Policy = command.policy or "availability_preserving"
    lacks, unloading = needs.needed - needs.free, slot.freed_by_unloading
    # Alone on its device, a model to begin with is tried in any case: there is nothing else to serve.
    if slot.serving is not None or not slot.device.residents.empty:
        free = needs.free + slot.device.residents.idle_bytes
        policy = choose_policy(command.policy, msgspec.structs.replace(needs, free=free), unloading)
    return policy, lacks - unloading if policy == "resource_preserving" else lacks


def _golden_texts(golden: Golden, encoder: Encoder) -> list[Text]:
    """Each with the prompt of its kind."""
    prompts = [
        encoder.default_prompt if each.input_type is None else encoder.prompts.get(each.input_type, "")
        for each in golden.texts
    ]
    return [Text(each.text, prompt, "end") for each, prompt in zip(golden.texts, prompts, strict=True)]


def _configured(directory: Path, *, shares: bool) -> tuple[Source, Golden | None]:
    """The same of the settings' model."""
    return Source(directory, stamp=stamp_of(directory) if shares else None), _golden_of(directory)


def _golden_of(directory: Path) -> Golden | None:
    """The golden texts that lie in a model directory, if some do. Blocks on the file system.

    Raises:
        ModelRejected: the file cannot be read.
    """
    file = directory / GOLDEN_FILE
    return read_golden(file) if file.exists() else None


def _cannot_be_loaded(directory: Path, error: Exception) -> ModelRejected:
    return ModelRejected(f"{directory} cannot be loaded: {type(error).__name__}")


def _too_little_memory() -> ModelRejected:
    return ModelRejected("the model cannot run: its device has too little memory left")
