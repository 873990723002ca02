"""Model changes: load and check the new model, swap it in while nothing is in flight; or keep the old one and say why."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.engine import Encoder, ModelError
from embedq_consumer.lifecycle.checks import ModelRejected
from embedq_consumer.lifecycle.desired_model import DesiredModel, Ignored
from embedq_consumer.lifecycle.model_slot import Loaded, ModelSlot, NoModel
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.lifecycle.trial import Candidate, Trial
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import Control

log = structlog.get_logger()

Hold = Callable[[float], AbstractAsyncContextManager[None]]
"""Nothing is in flight inside. Raises TimeoutError if that takes more than this many seconds; nothing is held then."""


class Commands(Protocol):
    """Where commands come from, such as the control topic."""

    async def next(self) -> Sequence[Control]:
        """The commands since the last call, in order; waits for one."""


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
        trial: Trial,
        budget: TokenBudget,
        reporter: StatusReporter,
        metrics: Metrics,
        *,
        drain_timeout_s: float,
    ) -> None:
        self._slot = slot
        self._trial = trial
        self._budget = budget
        self._reporter = reporter
        self._metrics = metrics
        self._drain_timeout_s = drain_timeout_s
        self._desired = DesiredModel()
        self._since: float | None = None
        metrics.reload_running.set_function(self._running_s)

    async def start(self, desired: Control | None, configured: Path) -> None:
        """Load the first model: the desired one, else the one before it, else the configured one.

        Raises:
            ModelError, ModelRejected: not even the configured one may serve.
        """
        self._desired = DesiredModel(desired)
        candidate, problem = await self._first_candidate(desired, configured)
        self._serve(candidate)
        encoder = candidate.loaded.encoder
        self._publish_info(encoder)
        await self._reporter.update(
            "serving",
            "READY" if problem is None else "FAILED",
            command=desired,
            model_version=encoder.model_version,
            error=problem,
        )

    async def follow(self, commands: Commands, hold: Hold) -> None:
        """Apply commands as they arrive, until cancelled. `hold` keeps everything out of flight during a swap."""
        while True:
            decision = self._desired.decide(await commands.next())
            for ignored in decision.ignored:
                await self._ignore(ignored)
            if decision.apply is not None:
                await self._apply(decision.apply, hold)
            else:
                # What was said of the others must not stay the last word: the command in force has its outcome.
                await self._reporter.resend()

    async def _first_candidate(
        self, desired: Control | None, configured: Path
    ) -> tuple[Candidate, str | None]:
        """A model to begin with, and why it is not the desired one, if it is not."""
        problem: str | None = None
        trials = []
        if desired is not None:
            trials.append(partial(self._trial.desired, desired))
            if desired.fallback and desired.fallback != desired.path:
                trials.append(partial(self._trial.fallback, desired, desired.fallback))
        for stand in trials:
            try:
                return await stand(), problem
            except (ModelError, ModelRejected) as error:
                problem = problem or str(error)
                log.warning("model_not_loaded", reason=str(error))
        return await self._trial.configured(configured), problem

    async def _ignore(self, ignored: Ignored) -> None:
        self._metrics.reloads.labels("ignored").inc()
        if ignored.reason is not None:
            await self._reporter.reject(ignored.command, ignored.reason)

    async def _apply(self, command: Control, hold: Hold) -> None:
        self._since = begin = time.monotonic()
        with structlog.contextvars.bound_contextvars(command=command.command_id, version=command.version):
            try:
                if command.policy == "availability_preserving":
                    await self._load_then_swap(command, hold)
                else:
                    await self._unload_then_load(command, hold)
            except (ModelError, ModelRejected) as error:
                self._note_ended("failed", begin)
                await self._note_failure(command, str(error))
            else:
                self._note_ended("ready", begin)
                await self._note_success(command)

    async def _load_then_swap(self, command: Control, hold: Hold) -> None:
        """Availability-preserving: both models in memory for a while; jobs wait for the swap alone."""
        candidate = await self._trial.desired(command)
        try:
            await self._reporter.update("drain", "LOADING", command=command)
            async with self._nothing_in_flight(hold):
                old = self._serve(candidate)
        except ModelRejected:
            await self._slot.discard(candidate.loaded)
            raise
        await self._reporter.update("swap", "LOADING", command=command)
        if old is not None:
            await self._slot.discard(old)  # while jobs flow again: freeing gigabytes takes its time
            await self._measure_again(candidate, hold)

    async def _measure_again(self, candidate: Candidate, hold: Hold) -> None:
        """Both models were in memory when the budget was found. If that made it smaller, it is found anew now, while nothing
        else runs: what is in flight would take memory from the trial, and the trial from it."""
        if self._trial.is_whole(candidate):
            return
        try:
            async with self._nothing_in_flight(hold):
                self._budget.serve(await self._trial.measure(candidate.loaded.encoder))
        except ModelRejected as error:  # it serves all the same, within the budget that was found first
            log.warning("batch_budget_not_measured_again", reason=str(error))

    async def _unload_then_load(self, command: Control, hold: Hold) -> None:
        """Resource-preserving: one model in memory at a time; jobs wait for the whole load, and the old model comes back if
        it fails."""
        await self._trial.resolve(command.path)  # before the old model is given up for it
        reference = await self._trial.check_vectors(self._slot.loaded.encoder)
        await self._reporter.update("drain", "LOADING", command=command)
        async with self._nothing_in_flight(hold):
            before = await self._slot.unload()
            try:
                candidate = await self._trial.desired(command, reference)
            except Exception:  # not a cancellation: a process that ends needs no model
                self._slot.install(await self._load_again(before))
                raise
            await self._reporter.update("swap", "LOADING", command=command)
            self._serve(candidate)

    @asynccontextmanager
    async def _nothing_in_flight(self, hold: Hold) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(hold(self._drain_timeout_s))
            except TimeoutError:
                raise ModelRejected(
                    f"drain: the jobs in flight were not finished within {self._drain_timeout_s:g} s"
                ) from None
            yield

    def _serve(self, candidate: Candidate) -> Loaded | None:
        """The swap itself: this model serves from now on, within its budget. Returns the one before."""
        self._budget.serve(candidate.budget)
        return self._slot.install(candidate.loaded)

    async def _load_again(self, path: Path) -> Loaded:
        """The model that served before, since the new one may not. Its budget is still in force."""
        try:
            return await self._slot.load(path)
        except Exception as error:
            raise NoModel(f"neither the new model nor the old one at {path} can be loaded") from error

    def _note_ended(self, outcome: str, begin: float) -> None:
        self._metrics.reloads.labels(outcome).inc()
        self._metrics.reload_seconds.labels(outcome).observe(time.monotonic() - begin)
        self._since = None

    def _running_s(self) -> float:
        """Seconds of the reload under way. Any thread may ask."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    async def _note_failure(self, command: Control, reason: str) -> None:
        log.warning("reload_failed", reason=reason)
        await self._reporter.update(
            self._reporter.status.step,
            "FAILED",
            command=command,
            model_version=self._slot.loaded.encoder.model_version,
            error=reason,
        )

    async def _note_success(self, command: Control) -> None:
        encoder = self._slot.loaded.encoder
        self._publish_info(encoder)
        log.info("reload_done", model_version=encoder.model_version)
        await self._reporter.update("serving", "READY", command=command, model_version=encoder.model_version)

    def _publish_info(self, encoder: Encoder) -> None:
        self._metrics.model.info(
            {"model_version": encoder.model_version, "hidden_size": str(encoder.hidden_size)}
        )
