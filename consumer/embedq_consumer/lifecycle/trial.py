"""The trial that every model stands before it may serve: validate, load, warm up, check, compare."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import structlog

from embedq_consumer.batching.token_budget import Budget, find_budget
from embedq_consumer.engine import (
    DeviceLost,
    Encoder,
    Failed,
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
from embedq_consumer.lifecycle.load_attempts import Attempt, LoadAttempts
from embedq_consumer.lifecycle.model_root import ModelRoot
from embedq_consumer.lifecycle.model_slot import Loaded, ModelSlot
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_shared.messages import Control, Step
from embedq_shared.vectors import cut_and_normalize

log = structlog.get_logger()

_MOST_WORDS: Final = 1 << 17
"""Of the warm-up's longest text: a model that says it takes more is warmed up with this."""


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


class Trial:
    """Makes a candidate of a directory. Each step is reported before it begins; a model that fails one is freed.

    Invariants:
        - Nothing but the tokenizer of a model on trial runs off the compute thread.
        - A failure that is the model's, whatever its files hold, is `ModelError` or `ModelRejected`: no command ends the
          process. A lost or a hanging device does, and so does native code that crashes: what a command's model did to the
          processes before is asked of `attempts`.
    """

    def __init__(
        self,
        slot: ModelSlot,
        root: ModelRoot,
        attempts: LoadAttempts,
        reporter: StatusReporter,
        limits: TrialLimits,
    ) -> None:
        self._slot = slot
        self._root = root
        self._attempts = attempts
        self._reporter = reporter
        self._limits = limits

    async def configured(self, directory: Path) -> Candidate:
        """The model of the settings, which no command asked for and which may lie anywhere.

        Raises:
            ModelError, ModelRejected: it may not serve. Its memory is not freed: there is no other to serve instead.
        """
        await self._reporter.update("load", "LOADING")
        loaded = await self._load(directory)
        budget = await self._warm_up(loaded.encoder)
        check_finite(await self.check_vectors(loaded.encoder))
        return Candidate(loaded=loaded, budget=budget)

    async def desired(self, command: Control, old: Vectors | None = None) -> Candidate:
        """The model of a command, if it is what that asks for.

        `old` is what to compare with; None: the check vectors of the model that serves, if one does.

        Raises:
            ModelError, ModelRejected: it may not serve; its memory is free again.
        """
        async with self._noted(f"{command.command_id} {command.path}"):
            return await self._candidate(command.path, command, old)

    async def fallback(self, command: Control, path: str) -> Candidate:
        """The model that served before the command, in place of the command's own.

        Raises:
            ModelError, ModelRejected: it may not serve; its memory is free again.
        """
        async with self._noted(f"{command.command_id} {path}"):
            return await self._candidate(path, None, None)

    @asynccontextmanager
    async def _noted(self, model: str) -> AsyncIterator[None]:
        """Around a load that may end the process, so that the next process knows."""
        attempt = await self._slot.apart("validate", self._attempts.begin, model, late=Attempt.end)
        try:
            yield
        except DeviceLost:
            raise  # which ends the process
        except BaseException:
            await asyncio.to_thread(attempt.end)
            raise
        await asyncio.to_thread(attempt.end)

    async def _candidate(self, path: str, command: Control | None, old: Vectors | None) -> Candidate:
        """With the command, also what that asks of the model."""
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
        return await self._slot.apart(
            "validate", self._root.resolve, path
        )  # a file system may be slow, or hang

    async def check_vectors(self, encoder: Encoder) -> Vectors:
        """Unit vectors of the check texts, float32 (texts, hidden_size).

        Raises:
            ModelRejected: the model cannot run.
        """
        texts = [Text(text, encoder.default_prompt, "end") for text in CHECK_TEXTS]
        tokens = await self._tokens(encoder, texts)
        try:
            # Each alone: together they may exceed a budget that was found on a small device.
            raw = [(await self._encode(encoder, [found]))[0] for found in tokens]
        except OutOfMemory as error:
            raise _too_little_memory() from error
        return np.stack([cut_and_normalize(vector, encoder.hidden_size) for vector in raw])

    async def _report(self, step: Step, command: Control | None) -> None:
        await self._reporter.update(step, "LOADING", command=command)

    async def _load(self, directory: Path) -> Loaded:
        try:
            return await self._slot.load(directory)
        except (ModelError, ModelRejected, DeviceLost):
            raise
        except Exception as error:  # a command must not end the process, whatever its files hold
            raise ModelRejected(f"{directory} cannot be loaded: {type(error).__name__}") from error

    def is_whole(self, candidate: Candidate) -> bool:
        """Whether its budget is all that was wished for: there is nothing that more memory could add."""
        whole = candidate.budget.tokens >= self._limits.batch_tokens
        return whole and candidate.budget.longest >= candidate.loaded.encoder.max_tokens

    async def measure(self, encoder: Encoder) -> Budget:
        """The largest micro-batches that fit, found by running them, so that memory runs out now or never.

        Raises:
            ModelRejected: none does.
        """
        words = min(encoder.max_tokens, _MOST_WORDS)
        [tokens] = await self._tokens(encoder, [Text("warm up " * words, truncate="end")])
        try:
            return await find_budget(
                encoder,
                lambda batch: self._encode(encoder, batch),
                tokens.ids,
                tokens=self._limits.batch_tokens,
                max_items=self._limits.batch_items,
            )
        except OutOfMemory as error:
            raise _too_little_memory() from error

    async def _warm_up(self, encoder: Encoder) -> Budget:
        begin = time.monotonic()
        budget = await self.measure(encoder)
        phases = dict(encoder.phases) | {"warm_up": time.monotonic() - begin}
        log.info(
            "model_loaded",
            model_version=encoder.model_version,
            kernels=dict(encoder.kernels),
            seconds={name: round(taken, 3) for name, taken in phases.items()},
        )
        for note in encoder.notes:
            log.warning("model_note", model_version=encoder.model_version, note=note)
        return budget

    async def _tokens(self, encoder: Encoder, texts: Sequence[Text]) -> list[Tokens]:
        """Tokens of texts that may be cut.

        Raises:
            ModelRejected: the tokenizer cannot read one, or hangs.
        """
        try:
            found = await self._slot.apart("tokenize", encoder.tokenize, texts)
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

    async def _encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Vectors:
        """Vectors of a model on trial: what it raises is a reason to reject it, or to try a smaller micro-batch."""
        try:
            async with asyncio.timeout(self._limits.stall_timeout_s):
                vectors, _ = await self._slot.encode(encoder, batch)
        except (OutOfMemory, DeviceLost):
            raise
        except TimeoutError:
            # Nothing else runs on this device before it, and it cannot be taken back.
            raise DeviceLost(
                f"a micro-batch of the new model did not end within {self._limits.stall_timeout_s:g} s"
            ) from None
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
