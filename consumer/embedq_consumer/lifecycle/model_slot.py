"""The model that serves: one slot, the one thread that may compute on it, and the one that waits for its results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.engine import Encoder, Memory, Pending, Tokens
from embedq_consumer.engine.safety.panics import panics_caught
from embedq_consumer.lifecycle.checks import ModelRejected
from embedq_consumer.threads import CLOSE_S, WorkerThreads

log = structlog.get_logger()

_MOST_HUNG: Final = 3
"""Threads that may hang in what a command asked for. Each may hold a model's memory; with more, the process needs a restart."""

Argument = TypeVar("Argument")
Returned = TypeVar("Returned")
Computed = tuple[npt.NDArray[np.float32], float]
"""Vectors of a micro-batch, and the seconds that they took."""
Loader = Callable[[Path], Encoder]
"""Makes an encoder of a model directory. Blocks; runs on a thread of its own."""


class Loaded(msgspec.Struct, frozen=True):
    """An encoder and the directory that it came from."""

    encoder: Encoder
    path: Path


class NoModel(Exception):
    """The slot is empty: a resource-preserving reload is under way, or has lost both models."""


class ModelSlot:
    """Holds the serving encoder. Work reaches the compute thread in call order, so there is no lock.

    Invariants: what is submitted, and everything that changes memory on the device, runs on the compute thread; results
    are waited for on another, unless they are there, so that the next micro-batch reaches the device while this one runs; a
    load while another model serves runs on a thread of its own, and is given up after `load_timeout_s`; `serving` and
    `busy_since` change on the event loop alone.
    """

    def __init__(self, load: Loader, *, load_timeout_s: float = 900.0) -> None:
        self._load = load
        self._load_timeout_s = load_timeout_s
        self._compute = WorkerThreads("compute")
        self._results = WorkerThreads("results")
        self._hung: list[Future[Any]] = []
        self._running = 0
        self._last_result = 0.0  # monotonic seconds; touched on the thread that has a model's results
        self.serving: Loaded | None = None
        """The serving model, if there is one. Changed by `install` and `unload` alone."""
        self.busy_since: float | None = None
        """Monotonic seconds since when the oldest micro-batch under way runs, None while none does."""

    @property
    def loaded(self) -> Loaded:
        """The serving model, where there must be one.

        Raises:
            NoModel: none serves right now.
        """
        if self.serving is None:
            raise NoModel("no model is loaded")
        return self.serving

    async def load(self, path: Path) -> Loaded:
        """Load a directory without touching the serving model.

        Raises:
            ModelRejected: it took too long. Should it end some day, it is freed.
        """
        return Loaded(await self.apart("load", self._load, path, late=self._free), path)

    async def apart(
        self,
        name: str,
        work: Callable[[Argument], Returned],
        argument: Argument,
        late: Callable[[Returned], object] = lambda _: None,
    ) -> Returned:
        """What `work` returns, on a thread of its own, which is left behind when this is cancelled or takes too long.

        `late` gets what comes nevertheless, on that thread.

        Raises:
            ModelRejected: it did not end within `load_timeout_s`; or too many did not before.
            Panic: a native library panicked.
        """
        self._hung = [each for each in self._hung if not each.done()]
        if len(self._hung) >= _MOST_HUNG:
            raise ModelRejected(f"{len(self._hung)} earlier loads still hang: restart this replica")
        threads = WorkerThreads(name)
        call: Future[Returned] = threads.submit(_guarded, work, argument)
        try:
            async with asyncio.timeout(self._load_timeout_s) as limit:
                return await asyncio.wrap_future(call)
        except BaseException as error:
            call.add_done_callback(
                lambda done: _hand_late(done, late)
            )  # at once, if it has failed: then with nothing
            if not isinstance(error, TimeoutError) or not limit.expired():
                raise
            self._hung.append(call)
            log.warning("load_left_behind", step=name, seconds=self._load_timeout_s)
            raise ModelRejected(f"{name}: it did not end within {self._load_timeout_s:g} s") from None
        finally:
            threads.shutdown(wait=False)

    async def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Computed:
        """Vectors of one micro-batch, float32 (rows, hidden_size), and the seconds that they took.

        A micro-batch that was submitted while another ran took as long as it ran alone.
        """
        self._running += 1
        self.busy_since = self.busy_since or time.monotonic()
        try:
            found = await asyncio.wrap_future(self._compute.submit(self._submit, encoder, batch))
            return await asyncio.wrap_future(found) if isinstance(found, Future) else found
        finally:
            self._running -= 1
            self.busy_since = time.monotonic() if self._running else None

    async def memory(self) -> Memory | None:
        """The device's memory; None on a CPU, and while no model serves.

        Raises:
            DeviceLost: the device does not answer any more.
        """
        if self.serving is None:
            return None
        # Between two micro-batches: while a CUDA graph is captured, no other thread may ask.
        return await asyncio.wrap_future(self._compute.submit(self.serving.encoder.memory))

    def install(self, new: Loaded) -> Loaded | None:
        """Serve this model from now on; returns the one before, to be discarded, for which nothing may be in flight."""
        old, self.serving = self.serving, new
        return old

    async def unload(self) -> Path:
        """Free the serving model, for which nothing may be in flight; returns the directory that it came from.

        Raises:
            NoModel: none serves right now.
        """
        old = self.loaded
        self.serving = None
        await self.discard(old)
        return old.path

    async def discard(self, unused: Loaded) -> None:
        """Free a model that does not serve."""
        await asyncio.wrap_future(self._compute.submit(unused.encoder.close))

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. A micro-batch that runs longer than this is left behind, as is a load."""
        until = time.monotonic() + within_s
        for threads in (self._compute, self._results):
            threads.close(until - time.monotonic())

    def _free(self, late: Encoder) -> None:
        """Free a model that nobody waits for any more, on the compute thread."""
        log.warning("late_load_freed", model_version=late.model_version)
        with suppress(RuntimeError):  # the threads are closed, and so the process ends
            self._compute.submit(late.close)

    def _submit(self, encoder: Encoder, batch: Sequence[Tokens]) -> Computed | Future[Computed]:
        submitted = time.monotonic()
        pending = encoder.submit(batch)
        if pending.ready:  # another thread to wait for it would have to be woken
            return self._result(pending, submitted)
        # From this thread, because the event loop may be busy: the vectors must not wait for it.
        return self._results.submit(self._result, pending, submitted)

    def _result(self, pending: Pending, submitted: float) -> Computed:
        vectors = pending.result()
        begin, self._last_result = max(submitted, self._last_result), time.monotonic()
        return vectors, self._last_result - begin


def _guarded(work: Callable[[Argument], Returned], argument: Argument) -> Returned:
    with panics_caught():
        return work(argument)


def _hand_late(call: Future[Returned], late: Callable[[Returned], object]) -> None:
    if not call.cancelled() and call.exception() is None:
        late(call.result())
