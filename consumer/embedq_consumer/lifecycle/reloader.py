"""Model changes: load and check the new model, swap it in while nothing is in flight; or keep the old one and say why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog

from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.engine import Encoder, ModelError
from embedq_consumer.lifecycle.desired_model import DesiredModel, Ignored, NextCommand
from embedq_consumer.lifecycle.gates.checks import ModelRejected, Vectors
from embedq_consumer.lifecycle.model_slot import Loaded, ModelSlot, NoModel, Source
from embedq_consumer.lifecycle.pursuit import Pursuit, Superseded
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.lifecycle.trial import Candidate, Examined, Trial
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import Control

log = structlog.get_logger()

_HEAVY: Final = 64 << 20
"""Bytes of weights. To free less takes no time that anybody notices."""
_FIRST_S: Final = 0.25
"""What the new model's first micro-batch has to come, before the old one is freed in any case: ten times what it takes under load."""

Hold = Callable[[float], AbstractAsyncContextManager[None]]
"""Nothing is in flight inside. Raises TimeoutError if that takes more than this many seconds; nothing is held then."""
Turn = Callable[[Control], Awaitable[None]]
"""Returns when it is this replica's turn to follow a command. Cancelled when a newer command is there."""


class Commands(Protocol):
    """Where commands come from, such as the control topic."""

    async def next(self) -> Sequence[Control]:
        """The commands since the last call, in order; waits for one. May be cancelled."""


class _Vacancy(NamedTuple):
    """The slot is empty, and nothing is in flight."""

    held: AsyncExitStack
    before: Source
    """What served."""
    reference: Vectors
    """Its vectors of the check texts."""


class _Following(NamedTuple):
    pursuit: Pursuit
    task: asyncio.Task[None]


async def everybodys_turn(command: Control) -> None:
    """Nobody waits for others."""


class Reloader:
    """Decides which model the slot holds.

    Invariants:
        - A command ends in READY or FAILED, and after FAILED a model serves as before. Only a lost device, or both models
          lost, ends the process.
        - Nothing is in flight while the slot changes, so that no job is split over two models.
        - Of the aliases of one device one changes its model at a time. Whoever waits for its turn in a fleet holds up no other alias.
        - Versions only rise. A command that is not newer changes nothing; one that is abandons the command under way. If that
          had emptied the slot, the newer one's model fills it, and jobs wait until then.
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
        self._next = NextCommand()
        self._vacancy: _Vacancy | None = None
        self._has_floor = False
        self._since: float | None = None
        metrics.reload_running.set_function(lambda: self.running_s)

    async def start(self, desired: Control | None, configured: Path) -> None:
        """Load the first model: the desired one, else the one before it, else the configured one.

        Raises:
            ModelError, ModelRejected: not even the configured one may serve.
        """
        self._desired = DesiredModel(desired)
        await self._slot.device.take_floor()
        try:
            candidate, problem = await self._first_candidate(desired, configured)
            self._serve(candidate)
        finally:
            await self._slot.device.leave_floor()
        encoder = candidate.loaded.encoder
        self._publish_info(encoder)
        await self._reporter.update(
            "serving",
            "READY" if problem is None else "FAILED",
            command=desired,
            model_version=encoder.model_version,
            error=problem,
        )

    async def follow(self, commands: Commands, hold: Hold, turn: Turn = everybodys_turn) -> None:
        """Apply commands as they arrive, until cancelled. `hold` keeps everything out of flight during a swap."""
        following: _Following | None = None
        reading = asyncio.ensure_future(commands.next())
        try:
            while True:
                if following is not None and following.task.done():
                    following.task.result()
                    following = None
                if reading.done():
                    await self._take(reading.result(), following)
                    reading = asyncio.ensure_future(commands.next())
                if following is None and (command := self._next.take(time.monotonic())) is not None:
                    pursuit = Pursuit(command)
                    following = _Following(pursuit, asyncio.create_task(self._apply(pursuit, hold, turn)))
                waits = {reading} if following is None else {reading, following.task}
                wait = self._next.wait(time.monotonic()) if following is None else None
                await asyncio.wait(waits, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end(reading, following)

    async def _end(self, reading: asyncio.Future[Sequence[Control]], following: _Following | None) -> None:
        reading.cancel()
        if following is not None:
            following.pursuit.cancel.set()
            following.task.cancel()
            await asyncio.wait({following.task})
        await asyncio.wait({reading})
        await self._end_vacancy()

    async def _take(self, commands: Sequence[Control], following: _Following | None) -> None:
        """Note the newest command, answer those that are not applied, and give up what the newest supersedes."""
        decision = self._desired.decide(commands)
        if (newest := decision.apply) is not None:
            self._since = self._since or time.monotonic()
            if following is not None:
                following.pursuit.supersede(newest)
            now = time.monotonic()
            if (waited := self._next.put(newest, now, supersedes=following is not None)) is not None:
                await self._ignore(Ignored(waited, f"superseded by version {newest.version}"))
        for ignored in decision.ignored:
            await self._ignore(ignored)
        if newest is None:
            # What was said of the others must not stay the last word: the command in force has its outcome.
            await self._reporter.resend()

    async def _first_candidate(
        self, desired: Control | None, configured: Path
    ) -> tuple[Candidate, str | None]:
        """A model to begin with, and why it is not the desired one, if it is not."""
        problem: str | None = None
        for command in [] if desired is None else [desired, *_fallback_of(desired)]:
            pursuit = Pursuit(command)
            try:
                return await self._trial.stand(pursuit, await self._trial.examine(pursuit)), problem
            except (ModelError, ModelRejected) as error:
                problem = problem or str(error)
                log.warning("model_not_loaded", reason=str(error))
        return await self._trial.configured(configured), problem

    async def _ignore(self, ignored: Ignored) -> None:
        self._metrics.reloads.labels("ignored").inc()
        if ignored.reason is not None:
            await self._reporter.reject(ignored.command, ignored.reason)

    async def _apply(self, pursuit: Pursuit, hold: Hold, turn: Turn) -> None:
        command, begin = pursuit.command, time.monotonic()
        self._since = begin
        with structlog.contextvars.bound_contextvars(command=command.command_id, version=command.version):
            try:
                outcome = await self._outcome(pursuit, hold, turn)
                self._metrics.reloads.labels(outcome).inc()
                self._metrics.reload_seconds.labels(outcome).observe(time.monotonic() - begin)
                self._since = None if self._next.wait(0.0) is None else self._since
            finally:
                await self._leave_floor()

    async def _outcome(self, pursuit: Pursuit, hold: Hold, turn: Turn) -> str:
        """Follow one command to its end, and say how that went, in a status and in this word."""
        command = pursuit.command
        try:
            if not await self._serves_already(pursuit):
                await self._change(pursuit, hold, turn)
        except Superseded as superseded:
            log.info("reload_abandoned", reason=str(superseded))
            await self._reporter.reject(command, str(superseded), self._reporter.status.step)
            return "superseded"
        except (ModelError, ModelRejected) as error:
            await self._bring_back()
            await self._note_failure(command, str(error))
            return "failed"
        await self._note_success(command)
        return "ready"

    async def _serves_already(self, pursuit: Pursuit) -> bool:
        """Whether a command takes another one back that this replica did not follow."""
        return pursuit.command.rollback_of is not None and await self._trial.serves(pursuit)

    async def _change(self, pursuit: Pursuit, hold: Hold, turn: Turn) -> None:
        if pursuit.command.rollout is not None:
            await self._bring_back()  # its turn may take a while to come, and jobs must not wait for that
        changes = self._slot.device.residents.changes
        examined = await self._trial.examine(pursuit)
        async with pursuit.interruptible():
            await turn(pursuit.command)
        await self._take_floor(pursuit)
        if self._slot.device.residents.changes != changes:
            examined = await self._trial.examine(
                pursuit
            )  # another alias took memory meanwhile, or gave some back
        if self._vacancy is not None or examined.policy == "resource_preserving":
            await self._unload_then_load(pursuit, examined, hold)
        else:
            await self._load_then_swap(pursuit, examined, hold)

    async def _load_then_swap(self, pursuit: Pursuit, examined: Examined, hold: Hold) -> None:
        """Availability-preserving: both models in memory for a while; jobs wait for the swap alone."""
        candidate = await self._trial.stand(pursuit, examined)
        try:
            await self._reporter.update("drain", "LOADING", command=pursuit.command)
            async with await self._nothing_in_flight(pursuit, hold):
                old = self._serve(candidate)
        except (ModelRejected, Superseded):
            await self._slot.discard(candidate.loaded)
            raise
        await self._reporter.update("swap", "LOADING", command=pursuit.command)
        if old is not None:
            if old.encoder.weight_bytes >= _HEAVY:
                await self._slot.device.busy(_FIRST_S)  # what frees it is the thread that feeds the device
            await self._slot.discard(old, keep=True)  # while jobs flow again
            await self._measure_again(candidate, pursuit, hold)

    async def _measure_again(self, candidate: Candidate, pursuit: Pursuit, hold: Hold) -> None:
        """Both models were in memory when the budget was found. If that made it smaller, it is found anew now, while nothing
        else runs: what is in flight would take memory from the trial, and the trial from it."""
        if self._trial.is_whole(candidate):
            return
        try:
            async with await self._nothing_in_flight(pursuit, hold):
                measured = await self._trial.measure(candidate.loaded.encoder, pursuit)
                self._slot.note_measured(candidate.loaded, measured)
                self._budget.serve(measured.budget)
        except (ModelRejected, Superseded) as error:  # it serves all the same, within the budget found first
            log.warning("batch_budget_not_measured_again", reason=str(error))

    async def _unload_then_load(self, pursuit: Pursuit, examined: Examined, hold: Hold) -> None:
        """Resource-preserving: one model in memory at a time; jobs wait for the whole load, and the old model comes back if
        it fails."""
        if self._vacancy is None:
            await self._trial.read_ahead(pursuit, examined)
            await self._vacate(pursuit, hold)
        vacancy = self._vacancy
        assert vacancy is not None
        candidate = await self._trial.stand(pursuit, examined, vacancy.reference)
        await self._reporter.update("swap", "LOADING", command=pursuit.command)
        self._serve(candidate)
        await self._end_vacancy()

    async def _vacate(self, pursuit: Pursuit, hold: Hold) -> None:
        reference = await self._trial.check_vectors(self._slot.loaded.encoder, pursuit)
        await self._reporter.update("drain", "LOADING", command=pursuit.command)
        held = await self._nothing_in_flight(pursuit, hold)
        try:
            self._vacancy = _Vacancy(held, await self._slot.unload(), reference)
        except BaseException:
            await held.aclose()
            raise

    async def _bring_back(self) -> None:
        """Load the model that served before, if it was given up for one that may not serve. Its budget is still in force."""
        if self._vacancy is None:
            return
        before = self._vacancy.before
        try:
            self._slot.install(await self._slot.load(before))
        except Exception as error:
            raise NoModel(f"neither the new model nor the old one at {before.path} can be loaded") from error
        await self._end_vacancy()

    async def _end_vacancy(self) -> None:
        if self._vacancy is not None:
            held, self._vacancy = self._vacancy.held, None
            await held.aclose()
            await self._leave_floor()

    async def _take_floor(self, pursuit: Pursuit) -> None:
        async with pursuit.interruptible():
            if not self._has_floor:
                await self._slot.device.take_floor()
                self._has_floor = True

    async def _leave_floor(self) -> None:
        """Let other aliases change their models, unless this one's slot is empty: the next command fills it."""
        if self._has_floor and self._vacancy is None:
            self._has_floor = False
            await self._slot.device.leave_floor()

    async def _nothing_in_flight(self, pursuit: Pursuit, hold: Hold) -> AsyncExitStack:
        """A hold, which ends when what is returned is closed."""
        held = AsyncExitStack()
        try:
            async with pursuit.interruptible():
                await held.enter_async_context(hold(self._drain_timeout_s))
        except TimeoutError:
            raise ModelRejected(
                f"drain: the jobs in flight were not finished within {self._drain_timeout_s:g} s"
            ) from None
        return held

    def _serve(self, candidate: Candidate) -> Loaded | None:
        """The swap itself: this model serves from now on, within its budget. Returns the one before."""
        self._budget.serve(candidate.budget)
        return self._slot.install(candidate.loaded)

    @property
    def running_s(self) -> float:
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
        self._metrics.model.labels(self._reporter.status.alias).info(
            {"model_version": encoder.model_version, "hidden_size": str(encoder.hidden_size)}
        )


def _fallback_of(command: Control) -> list[Control]:
    """The model that served before, of which nothing is asked but that it can serve; none if there is no other one."""
    if not command.fallback or command.fallback == command.path:
        return []
    return [
        msgspec.structs.replace(
            command,
            path=command.fallback,
            quantization=command.fallback_quantization,
            digest=None,
            min_cosine=None,
            golden=None,
            golden_min_cosine=None,
            min_dimensions=None,
        )
    ]
