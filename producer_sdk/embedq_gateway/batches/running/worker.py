"""Which batches this gateway runs: it looks for those that nobody runs, takes their lease, and runs several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from embedq_gateway.batches.batch import DAY_S, Batch, FileFault, LeaseLost, WrongStatus
from embedq_gateway.batches.files import Files
from embedq_gateway.batches.register import BatchGone, Register
from embedq_gateway.batches.running.leases import LeaseWatch, next_batch
from embedq_gateway.batches.running.runner import BatchRun, RunLine, RunOptions, clear_away
from embedq_gateway.batches.storage import StorageError
from embedq_shared.backoff import backoff

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
"""While the storage is away."""
_SWEEP_EVERY_S: Final = 3600.0


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How batches are found and shared out."""

    run: RunOptions = RunOptions()
    lease_s: float = 15.0
    """Without a sign of life for so long, another gateway takes a batch."""
    look_every_s: float = 2.0
    at_once: int = 4
    """Batches that this process runs at a time, each with its own texts in flight."""
    keep_s: int = 30 * DAY_S
    """How long the document of an ended batch is kept."""


class BatchWorker:
    """Runs batches until `stop`.

    Args:
        holder: a name that no other process, and no earlier life of this one, has.
        report: told what went wrong, for the log: a sentence and the exception.
    """

    # More than six parameters: the parts that a batch is run with, and what this process is.
    def __init__(
        self,
        holder: str,
        register: Register,
        files: Files,
        run_line: RunLine,
        options: WorkerOptions,
        report: Callable[[str, BaseException], None],
    ) -> None:
        self._holder = holder
        self._register = register
        self._files = files
        self._run_line = run_line
        self._options = options
        self._report = report
        self._watch = LeaseWatch(options.lease_s)
        self._runs: dict[str, BatchRun] = {}
        self._stopping = False
        self._wake = asyncio.Event()
        self._swept_at: float | None = None

    def poke(self, name: str) -> None:
        """This batch was made or cancelled here: look at it now."""
        if (run := self._runs.get(name)) is not None:
            run.look()
        self._wake.set()

    def stop(self) -> None:
        """Run no line any more, and let others go on; `run` returns when that is done."""
        self._stopping = True
        for run in self._runs.values():
            run.leave()
        self._wake.set()

    @property
    def running(self) -> int:
        """How many batches are run here."""
        return len(self._runs)

    async def run(self) -> None:
        """Look for batches and run them."""
        failures = 0
        async with asyncio.TaskGroup() as tasks:
            while not self._stopping:
                wait = self._options.look_every_s
                try:
                    for batch in await self._take():
                        tasks.create_task(self._run(batch), name=f"embedq-{batch.id}")
                    await self._sweep()
                    failures = 0
                except StorageError as error:
                    self._report("the storage of batches cannot be used now", error)
                    wait = backoff(failures, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
                    failures += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
                self._wake.clear()

    async def _take(self) -> list[Batch]:
        """Batches whose lease is now ours, as many as may run here."""
        listed = await self._register.listed()
        for one in listed:
            if one.ended and one.id not in self._runs:  # whoever ended it was killed in the next moment
                await clear_away(one, self._register, self._files)
        active = [batch for batch in listed if not batch.ended]
        self._watch.forget_others(batch.id for batch in active)
        now = asyncio.get_running_loop().time()
        free = {
            batch.id: batch for batch in active if batch.id not in self._runs and self._may_take(batch, now)
        }
        running = [run.batch for run in self._runs.values()]
        taken: list[Batch] = []
        while len(running) < self._options.at_once and not self._stopping:
            batch = next_batch(free.values(), running)
            if batch is None:
                break
            del free[batch.id]
            with suppress(LeaseLost, BatchGone):  # another gateway was quicker
                batch = await self._register.change(batch.owner, batch.id, _claim(batch, self._holder))
                self._runs[batch.id] = BatchRun(
                    batch, self._holder, self._register, self._files, self._run_line, self._options.run
                )
                running.append(batch)
                taken.append(batch)
        return taken

    def _may_take(self, batch: Batch, now: float) -> bool:
        ours = batch.lease is not None and batch.lease.holder == self._holder
        return self._watch.free(batch, now) or ours  # ours, and not run: the storage failed meanwhile

    async def _run(self, batch: Batch) -> None:
        run = self._runs[batch.id]
        if self._stopping:
            run.leave()
        try:
            await self._run_to_the_end(run)
        finally:
            del self._runs[batch.id]
            self._wake.set()

    async def _run_to_the_end(self, run: BatchRun) -> None:
        name = run.batch.id
        try:
            try:
                await run.run()
            except* (LeaseLost, BatchGone):
                pass  # another gateway runs it, or it is no more
            except* StorageError as errors:
                self._report(f"batch {name} waits for its storage", errors.exceptions[0])
        except Exception as error:  # noqa: BLE001  # whatever it is, it is our fault
            # It ends this batch with a reason, and not the gateway, where the next life would meet it again.
            self._report(f"batch {name} failed by a fault of the gateway", error)
            fault = FileFault(
                code="internal_error", message="The gateway failed on this batch; its log says how."
            )
            with suppress(LeaseLost, BatchGone, WrongStatus, StorageError):
                await run.fail(fault)

    async def _sweep(self) -> None:
        """Now and then remove what is too old. Several gateways doing so at once do no harm."""
        now = asyncio.get_running_loop().time()
        if self._swept_at is not None and now - self._swept_at < _SWEEP_EVERY_S:
            return
        in_use = frozenset(batch.input_file_id for batch in await self._register.active())
        for folder in await self._register.owners():
            await self._files.sweep(folder, in_use)
            await self._register.sweep(folder, self._options.keep_s)
        self._swept_at = now


def _claim(seen: Batch, holder: str) -> Callable[[Batch], Batch]:
    """Take a batch, unless it has changed hands since it was seen."""

    def claim(batch: Batch) -> Batch:
        if batch.lease != seen.lease or batch.ended:
            raise LeaseLost(f"another gateway took batch {batch.id}")
        return batch.claimed(holder)

    return claim
