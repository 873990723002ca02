"""Model changes: validate, load, warm up, check, drain, swap; or keep the old model and say why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.batching.token_budget import Budget, TokenBudget, find_budget
from embedq_consumer.engine import (
    DeviceLost,
    Encoder,
    ModelError,
    OutOfMemory,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.model_slot import Loaded, ModelSlot, NoModel
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import Control
from embedq_shared.vectors import cut_and_normalize

log = structlog.get_logger()

CHECK_TEXTS: Final = (
    "",
    "embedq",
    "The harbour pilot boards the ship two miles before the breakwater.",
    "Wie lange muss der Teig ruhen, bevor er in den Ofen kommt?",
    "光合成は、光のエネルギーを使って二酸化炭素と水から糖を作る反応である。",
    "¿Dónde puedo renovar el pasaporte si vivo en el extranjero? 🛂",
    "SELECT name, count(*) FROM jobs WHERE state = 'waiting' GROUP BY name ORDER BY 2 DESC;",
    "A reload is safe when every job accepted before it is answered, and every vector says which model made it. "
    * 8,
)
"""What a new model is checked with: short, long, in several scripts, and nothing at all."""

Hold = Callable[[float], AbstractAsyncContextManager[None]]


class Rejected(Exception):
    """A model may not serve; the message says why."""


class Reloader:
    """Decides which model the slot holds.

    Invariants:
        - A command ends in READY or FAILED, and after FAILED a model serves as before. Only a lost device, or both models
          lost, ends the process.
        - Nothing is in flight while the slot changes, so that no job is split over two models.
        - Versions only rise. A command that is not newer changes nothing.
    """

    def __init__(
        self,
        slot: ModelSlot,
        *,
        root: Path,
        initial: Path,
        budget: TokenBudget,
        batch_tokens: int,
        batch_items: int,
        reporter: StatusReporter,
        metrics: Metrics,
        drain_timeout_s: float,
    ) -> None:
        self._slot = slot
        self._root = root
        self._initial = initial
        self._budget = budget
        self._batch_tokens = batch_tokens
        self._batch_items = batch_items
        self._reporter = reporter
        self._metrics = metrics
        self._drain_timeout_s = drain_timeout_s
        self._applied: Control | None = None

    async def start(self, desired: Control | None) -> None:
        """Load the first model: the desired one, else the one before it, else the configured one.

        Raises:
            ModelError: not even the configured one can be loaded.
        """
        self._applied = desired
        problem: str | None = None
        candidates = [desired.path, desired.fallback] if desired else []
        for path in dict.fromkeys(path for path in candidates if path):
            try:
                loaded = await self._prepare(path, desired if desired and path == desired.path else None)
                break
            except (ModelError, Rejected) as error:
                problem = problem or str(error)
                log.warning("model_not_loaded", reason=str(error))
        else:
            loaded = await self._prepare_initial()
        self._install(loaded)
        self._show(loaded)
        await self._reporter.say(
            "serving",
            "READY" if problem is None else "FAILED",
            command=desired,
            model_version=loaded.encoder.model_version,
            error=problem,
        )

    async def follow(self, topic: ControlTopic, hold: Hold) -> None:
        """Apply commands as they come. Of several that wait, only the newest matters."""
        while True:
            commands = await topic.next()
            newest = max(commands, key=lambda command: command.version)
            for command in commands:
                if command is not newest:
                    await self._ignore(command, f"superseded by version {newest.version}")
            if self._applied is not None and newest.version <= self._applied.version:
                await self._ignore(newest, f"expected a version above {self._applied.version}")
                continue
            self._applied = newest
            await self._apply(newest, hold)

    async def _ignore(self, command: Control, why: str) -> None:
        self._metrics.reloads.labels("ignored").inc()
        if self._applied is not None and command.command_id == self._applied.command_id:
            await self._reporter.say_again()
        else:
            await self._reporter.refuse(command, why)

    async def _apply(self, command: Control, hold: Hold) -> None:
        with structlog.contextvars.bound_contextvars(command=command.command_id, version=command.version):
            try:
                if command.policy == "availability_preserving":
                    await self._load_beside(command, hold)
                else:
                    await self._unload_first(command, hold)
            except (ModelError, Rejected, TimeoutError) as error:
                self._metrics.reloads.labels("failed").inc()
                log.warning("reload_failed", reason=str(error))
                version = self._slot.loaded.encoder.model_version
                await self._reporter.say(
                    self._reporter.status.step,
                    "FAILED",
                    command=command,
                    model_version=version,
                    error=str(error),
                )
                return
            loaded = self._slot.loaded
            self._show(loaded)
            self._metrics.reloads.labels("ready").inc()
            log.info("reload_done", model_version=loaded.encoder.model_version)
            await self._reporter.say(
                "serving", "READY", command=command, model_version=loaded.encoder.model_version
            )

    async def _load_beside(self, command: Control, hold: Hold) -> None:
        """Both models in memory for a while; jobs wait only for the swap."""
        new = await self._prepare(command.path, command)
        try:
            await self._reporter.say("drain", "LOADING", command=command)
            async with hold(self._drain_timeout_s):
                old = self._install(new)
        except TimeoutError:
            await self._slot.discard(new)
            raise
        await self._reporter.say("swap", "LOADING", command=command)
        if old is not None:
            await self._slot.discard(old)  # while jobs flow again: freeing gigabytes takes its time

    async def _unload_first(self, command: Control, hold: Hold) -> None:
        """One model in memory at a time; jobs wait for the whole load, and the old model comes back if it fails."""
        await asyncio.to_thread(self._resolve, command.path)
        reference = await self._check_vectors(self._slot.loaded.encoder)
        await self._reporter.say("drain", "LOADING", command=command)
        async with hold(self._drain_timeout_s):
            before = await self._slot.unload()
            try:
                new = await self._prepare(command.path, command, reference)
            except Exception:  # not a cancellation: a process that ends needs no model
                self._slot.install(await self._load_again(before))
                raise
            await self._reporter.say("swap", "LOADING", command=command)
            self._install(new)

    def _install(self, new: Loaded) -> Loaded | None:
        """Serve this model from now on, within its budget; the one before."""
        assert new.budget is not None, "a model that did not warm up. This is a bug."
        self._budget.serve(new.budget)
        return self._slot.install(new)

    async def _load_again(self, path: Path) -> Loaded:
        """The model that served before, since the new one may not."""
        try:
            return await self._slot.load(path)
        except Exception as error:
            raise NoModel(f"neither the new model nor the old one at {path} can be loaded") from error

    # -- what a model must pass -----------------------------------------------------------------------------------------

    async def _prepare_initial(self) -> Loaded:
        await self._reporter.say("load", "LOADING")
        loaded = await self._slot.load(self._initial)
        budget = await self._warm_up(loaded.encoder)
        await self._checked(loaded.encoder)
        return msgspec.structs.replace(loaded, budget=budget)

    async def _prepare(
        self, path: str, command: Control | None, reference: npt.NDArray[np.float32] | None = None
    ) -> Loaded:
        """A model that passed everything but the swap.

        Raises:
            ModelError, Rejected: it did not; its memory is free again.
        """
        await self._reporter.say("validate", "LOADING", command=command)
        directory = await asyncio.to_thread(self._resolve, path)  # a file system may be slow
        await self._reporter.say("load", "LOADING", command=command)
        loaded = await self._load(directory)
        try:
            await self._reporter.say("warm_up", "LOADING", command=command)
            budget = await self._warm_up(loaded.encoder)
            await self._reporter.say("check", "LOADING", command=command)
            vectors = await self._checked(loaded.encoder)
            if command is not None:
                await self._compare(loaded.encoder, vectors, command, reference)
        except DeviceLost:
            raise  # there is nothing left to free
        except BaseException:
            await self._slot.discard(loaded)
            raise
        return msgspec.structs.replace(loaded, budget=budget)

    async def _load(self, directory: Path) -> Loaded:
        try:
            return await self._slot.load(directory)
        except ModelError:
            raise
        except Exception as error:  # a command must not end the process, whatever its files hold
            raise Rejected(f"{directory} cannot be loaded: {type(error).__name__}") from error

    def _resolve(self, path: str) -> Path:
        """The directory, below the root, whatever links and dots the path holds."""
        if "\0" in path:
            raise Rejected("path: expected a directory name")
        try:
            directory = (self._root / path).resolve()
            is_directory = directory.is_dir()
        except (OSError, RuntimeError) as error:  # a name too long, no permission, links in a circle
            raise Rejected(f"path: expected a directory name ({type(error).__name__})") from error
        if not directory.is_relative_to(self._root):
            raise Rejected(f"path: expected a directory below {self._root}")
        if not is_directory:
            raise Rejected(f"path: {directory} is no directory")
        return directory

    async def _warm_up(self, encoder: Encoder) -> Budget:
        """Micro-batches as large as any that will come, and what of them fits, so that memory runs out now or never.

        Beside a model that still serves, less fits than will later; nobody looks again.
        """
        [tokens] = await asyncio.to_thread(
            encoder.tokenize, [Text("warm up " * encoder.max_tokens, truncate="end")]
        )
        if isinstance(tokens, TextTooLong):
            raise Rejected("the tokenizer did not cut a text that it was asked to cut")
        begin = time.monotonic()
        try:
            budget = await find_budget(
                encoder,
                lambda batch: self._encode(encoder, batch),
                tokens.ids,
                tokens=self._batch_tokens,
                max_items=self._batch_items,
            )
        except OutOfMemory as error:
            raise Rejected("the model cannot run: its device has too little memory left") from error
        phases = dict(encoder.phases) | {"warm_up": time.monotonic() - begin}
        log.info(
            "model_loaded",
            model_version=encoder.model_version,
            kernels=dict(encoder.kernels),
            seconds={name: round(taken, 3) for name, taken in phases.items()},
        )
        return budget

    async def _checked(self, encoder: Encoder) -> npt.NDArray[np.float32]:
        """Unit vectors of the check texts, float32 (texts, hidden_size)."""
        vectors = await self._check_vectors(encoder)
        norms = np.linalg.norm(vectors, axis=1)
        if not np.isfinite(vectors).all() or not np.allclose(norms, 1.0, atol=1e-3):
            raise Rejected("check: expected finite vectors of length 1 for every check text")
        return vectors

    async def _check_vectors(self, encoder: Encoder) -> npt.NDArray[np.float32]:
        texts = [Text(text, encoder.default_prompt, "end") for text in CHECK_TEXTS]
        tokens = await asyncio.to_thread(encoder.tokenize, texts)
        try:
            # Each alone: together they may be more than a budget that was found on a small device.
            raw = [(await self._encode(encoder, [found]))[0] for found in tokens if isinstance(found, Tokens)]
        except OutOfMemory as error:
            raise Rejected("the model cannot run: its device has too little memory left") from error
        return np.stack([cut_and_normalize(vector, encoder.hidden_size) for vector in raw])

    async def _encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> npt.NDArray[np.float32]:
        """Vectors of a model on trial: what it raises is a reason to reject it, or to try a smaller micro-batch."""
        try:
            vectors, _ = await self._slot.encode(encoder, batch)
        except (OutOfMemory, DeviceLost):
            raise
        except Exception as error:
            raise Rejected(f"the model cannot run: {type(error).__name__}") from error
        return vectors

    async def _compare(
        self,
        encoder: Encoder,
        vectors: npt.NDArray[np.float32],
        command: Control,
        reference: npt.NDArray[np.float32] | None,
    ) -> None:
        """What the command asks of the new model."""
        if command.digest is not None and command.digest != encoder.model_version:
            raise Rejected(f"digest: expected {command.digest}, the directory has {encoder.model_version}")
        if command.min_cosine is None:
            return
        if reference is None:
            if self._reporter.status.model_version is None:
                return  # a replica that starts has no old model to compare with
            reference = await self._check_vectors(self._slot.loaded.encoder)
        if reference.shape != vectors.shape:
            raise Rejected(
                f"min_cosine: expected vectors of {reference.shape[1]} dimensions, as the old model has, got {vectors.shape[1]}"
            )
        least = float((reference * vectors).sum(axis=1).min())
        if least < command.min_cosine:
            raise Rejected(
                f"min_cosine: expected at least {command.min_cosine:g} to the old model, got {least:.4f}"
            )

    def _show(self, loaded: Loaded) -> None:
        self._metrics.model.info(
            {"model_version": loaded.encoder.model_version, "hidden_size": str(loaded.encoder.hidden_size)}
        )
