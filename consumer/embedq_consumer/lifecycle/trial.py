"""The trial that every model stands before it may serve: validate, load, warm up, check, compare."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import structlog

from embedq_consumer.batching.token_budget import Budget, find_budget
from embedq_consumer.engine import (
    DeviceLost,
    Encoder,
    ModelError,
    OutOfMemory,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.lifecycle.checks import (
    CHECK_TEXTS,
    ModelRejected,
    Vectors,
    check_finite,
    check_similarity,
    check_version,
)
from embedq_consumer.lifecycle.model_root import ModelRoot
from embedq_consumer.lifecycle.model_slot import Loaded, ModelSlot
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_shared.messages import Control, Step
from embedq_shared.vectors import cut_and_normalize

log = structlog.get_logger()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that passed its trial: it may serve, within this token budget."""

    loaded: Loaded
    budget: Budget


class Trial:
    """Makes a candidate of a directory. Each step is reported before it begins; a model that fails one is freed.

    Invariants:
        - Nothing but the tokenizer of a model on trial runs off the compute thread.
        - A failure that is the model's, whatever its files hold, is `ModelError` or `ModelRejected`: no command ends the
          process. A lost device does.
    """

    def __init__(
        self,
        slot: ModelSlot,
        root: ModelRoot,
        reporter: StatusReporter,
        *,
        batch_tokens: int,
        batch_items: int,
    ) -> None:
        self._slot = slot
        self._root = root
        self._reporter = reporter
        self._batch_tokens = batch_tokens
        self._batch_items = batch_items

    async def configured(self, directory: Path) -> Candidate:
        """The model of the settings, which no command asked for and which may lie anywhere.

        Raises:
            ModelError, ModelRejected: it may not serve. Its memory is not freed: there is no other to serve instead.
        """
        await self._reporter.update("load", "LOADING")
        loaded = await self._slot.load(directory)
        budget = await self._warm_up(loaded.encoder)
        check_finite(await self.check_vectors(loaded.encoder))
        return Candidate(loaded=loaded, budget=budget)

    async def desired(self, path: str, command: Control | None, old: Vectors | None = None) -> Candidate:
        """The model at a path of a command. With the command itself, also what that asks of the model.

        `old` is what to compare with; None: the check vectors of the model that serves, if one does.

        Raises:
            ModelError, ModelRejected: it may not serve; its memory is free again.
        """
        await self._report("validate", command)
        directory = await self.resolve(path)
        await self._report("load", command)
        loaded = await self._load(directory)
        try:
            await self._report("warm_up", command)
            budget = await self._warm_up(loaded.encoder)
            await self._report("check", command)
            vectors = await self.check_vectors(loaded.encoder)
            check_finite(vectors)
            if command is not None:
                check_version(command.digest, loaded.encoder.model_version)
                await self._compare(command.min_cosine, old, vectors)
        except DeviceLost:
            raise  # there is nothing left to free
        except BaseException:
            await self._slot.discard(loaded)
            raise
        return Candidate(loaded=loaded, budget=budget)

    async def resolve(self, path: str) -> Path:
        """The directory that a command's path names.

        Raises:
            ModelRejected: it is not a directory below the model root.
        """
        return await asyncio.to_thread(self._root.resolve, path)  # a file system may be slow

    async def check_vectors(self, encoder: Encoder) -> Vectors:
        """Unit vectors of the check texts, float32 (texts, hidden_size).

        Raises:
            ModelRejected: the model cannot run.
        """
        texts = [Text(text, encoder.default_prompt, "end") for text in CHECK_TEXTS]
        tokens = await asyncio.to_thread(encoder.tokenize, texts)
        try:
            # Each alone: together they may exceed a budget that was found on a small device.
            raw = [(await self._encode(encoder, [found]))[0] for found in tokens if isinstance(found, Tokens)]
        except OutOfMemory as error:
            raise _too_little_memory() from error
        return np.stack([cut_and_normalize(vector, encoder.hidden_size) for vector in raw])

    async def _report(self, step: Step, command: Control | None) -> None:
        await self._reporter.update(step, "LOADING", command=command)

    async def _load(self, directory: Path) -> Loaded:
        try:
            return await self._slot.load(directory)
        except ModelError:
            raise
        except Exception as error:  # a command must not end the process, whatever its files hold
            raise ModelRejected(f"{directory} cannot be loaded: {type(error).__name__}") from error

    async def _warm_up(self, encoder: Encoder) -> Budget:
        """The largest micro-batches that fit, found by running them, so that memory runs out now or never.

        Limitation: in an availability-preserving reload the old model still holds its memory meanwhile. The budget that
        is found then may be lower than what fits once the old model is gone, and it is not measured again before the next
        reload or restart.
        """
        [tokens] = await asyncio.to_thread(
            encoder.tokenize, [Text("warm up " * encoder.max_tokens, truncate="end")]
        )
        if isinstance(tokens, TextTooLong):
            raise ModelRejected("the tokenizer did not cut a text that it was asked to cut")
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
            raise _too_little_memory() from error
        phases = dict(encoder.phases) | {"warm_up": time.monotonic() - begin}
        log.info(
            "model_loaded",
            model_version=encoder.model_version,
            kernels=dict(encoder.kernels),
            seconds={name: round(taken, 3) for name, taken in phases.items()},
        )
        return budget

    async def _encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Vectors:
        """Vectors of a model on trial: what it raises is a reason to reject it, or to try a smaller micro-batch."""
        try:
            vectors, _ = await self._slot.encode(encoder, batch)
        except (OutOfMemory, DeviceLost):
            raise
        except Exception as error:
            raise ModelRejected(f"the model cannot run: {type(error).__name__}") from error
        return vectors

    async def _compare(self, min_cosine: float | None, old: Vectors | None, new: Vectors) -> None:
        if min_cosine is None:
            return
        if old is None:
            if self._slot.serving is None:
                return  # a replica that starts has no old model to compare with
            old = await self.check_vectors(self._slot.serving.encoder)
        check_similarity(min_cosine, old, new)


def _too_little_memory() -> ModelRejected:
    return ModelRejected("the model cannot run: its device has too little memory left")
