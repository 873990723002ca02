"""The model that serves: one slot, the one thread that may compute on it, and the one that waits for its results."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.engine import Abandoned, Cancellation, Encoder, Inspection, Memory, Pending, Tokens
from embedq_consumer.engine.safety.panics import panics_caught
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.threads import CLOSE_S, WorkerThreads
from embedq_shared.messages import Quantization

log = structlog.get_logger()

_MOST_HUNG: Final = 3
"""Threads that may hang in what a command asked for. Each may hold a model's memory; with more, the process needs a restart."""
_STOP_S: Final = 60.0
"""What a load that is not wanted any more has to come to its next step: the longest, which reads and compiles, takes as long for
the largest models. After that the next command need not wait for it."""

Returned = TypeVar("Returned")
Computed = tuple[npt.NDArray[np.float32], float]
"""Vectors of a micro-batch, and the seconds that they took."""


class Source(msgspec.Struct, frozen=True):
    """What a model is loaded from, and how."""

    path: Path
    quantization: Quantization | None = None
    """None: as the settings say."""
    tried: bool = False
    """`inspect` has just had a process of its own try it."""


class Loader(Protocol):
    """Makes encoders. Both block, and run on threads of their own."""

    def inspect(self, source: Source, cancel: Cancellation) -> Inspection:
        """What a directory asks for.

        Raises:
            ModelError: it cannot be served.
            Abandoned: `cancel` was set meanwhile.
        """

    def load(self, source: Source, cancel: Cancellation) -> Encoder:
        """The model of a directory.

        Raises:
            ModelError: it cannot be served.
            Abandoned: `cancel` was set meanwhile; nothing is left of it.
        """


class Loaded(msgspec.Struct, frozen=True):
    """An encoder and what it was loaded from."""

    encoder: Encoder
    source: Source

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.source.path


class NoModel(Exception):
    """The slot is empty: a resource-preserving reload is under way, or has lost both models."""


class ModelSlot:
    """Holds the serving encoder. Work reaches the compute thread in call order, so there is no lock.

    Invariants: what is submitted, and everything that changes memory on the device, runs on the compute thread; results
    are waited for on another, unless they are there, so that the next micro-batch reaches the device while this one runs; a
    load while another model serves runs on a thread of its own, and is given up after `load_timeout_s`; `serving` and
    `busy_since` change on the event loop alone.
    """

    def __init__(self, loader: Loader, *, load_timeout_s: float = 900.0, stop_s: float = _STOP_S) -> None:
        self._loader = loader
        self._load_timeout_s = load_timeout_s
        self._stop_s = stop_s
        self._compute = WorkerThreads("compute")
        self._results = WorkerThreads("results")
        self._hung: list[Future[Any]] = []
        self._running = 0
        self._serves_since = 0.0
        self._first_failure: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()
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

    async def inspect(self, source: Source, cancel: Cancellation) -> Inspection:
        """What a directory asks for, before anything is given up for it.

        Raises:
            ModelError: it cannot be served.
            ModelRejected: it took too long.
            Abandoned: `cancel` was set meanwhile.
        """
        return await self.apart(
            "validate", partial(self._loader.inspect, source, cancel), lambda _: None, cancel
        )

    async def load(self, source: Source, cancel: Cancellation | None = None) -> Loaded:
        """Load a directory without touching the serving model.

        Raises:
            ModelRejected: it took too long. Should it end some day, it is freed.
            Abandoned: `cancel` was set meanwhile, and the load has ended and freed what it had; or it does not come to its next
                step, and is freed then.
        """
        cancel = cancel or Cancellation()
        load = partial(self._loader.load, source, cancel)
        return Loaded(await self.apart("load", load, self._free, cancel), source)

    async def apart(
        self,
        name: str,
        work: Callable[[], Returned],
        late: Callable[[Returned], object] = lambda _: None,
        cancel: Cancellation | None = None,
    ) -> Returned:
        """What `work` returns, on a thread of its own, which is left behind when this is cancelled or takes too long.

        `late` gets what comes nevertheless, on that thread. Work that looks at `cancel` has a while to end once that is set.

        Raises:
            ModelRejected: it did not end within `load_timeout_s`; or too many did not before.
            Abandoned: `cancel` is set, and `work` did not end.
            Panic: a native library panicked.
        """
        self._hung = [each for each in self._hung if not each.done()]
        if len(self._hung) >= _MOST_HUNG:
            raise ModelRejected(f"{len(self._hung)} earlier loads still hang: restart this replica")
        cancel = cancel or Cancellation()
        threads = WorkerThreads(name)
        call: Future[Returned] = threads.submit(_guarded, work)
        limit = asyncio.timeout(self._load_timeout_s)
        try:
            async with limit:
                with cancel.stopping(partial(self._hurry, limit)):
                    return await asyncio.wrap_future(call)
        except BaseException as error:
            call.add_done_callback(
                lambda done: _hand_late(done, late)
            )  # at once, if it has failed: then with nothing
            if not isinstance(error, TimeoutError) or not limit.expired():
                raise
            self._hung.append(call)
            seconds = self._stop_s if cancel.is_set else self._load_timeout_s
            log.warning("load_left_behind", step=name, seconds=seconds)
            if cancel.is_set:
                raise Abandoned from None
            raise ModelRejected(f"{name}: it did not end within {self._load_timeout_s:g} s") from None
        finally:
            threads.shutdown(wait=False)

    async def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Computed:
        """Vectors of one micro-batch, float32 (rows, hidden_size), and the seconds that they took.

        A micro-batch that was submitted while another ran took as long as it ran alone.
        """
        self._running += 1
        self._idle.clear()
        self.busy_since = self.busy_since or time.monotonic()
        try:
            found = await asyncio.wrap_future(self._compute.submit(self._submit, encoder, batch))
            return await asyncio.wrap_future(found) if isinstance(found, Future) else found
        finally:
            self._running -= 1
            self.busy_since = time.monotonic() if self._running else None
            if not self._running:
                self._idle.set()

    async def idle(self, within_s: float) -> None:
        """Return once no micro-batch is under way, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()

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
        self._serves_since, self._first_failure = time.monotonic(), None
        return old

    def note_failed(self, encoder: Encoder) -> None:
        """A text has got no vector of this model, even alone."""
        if self.serving is not None and self.serving.encoder is encoder and self._first_failure is None:
            self._first_failure = time.monotonic()

    @property
    def served_s(self) -> float:
        """For how long the serving model serves."""
        return time.monotonic() - self._serves_since

    @property
    def first_error_s(self) -> float | None:
        """After how many of these seconds it first failed to give a text a vector; None: it never did."""
        return None if self._first_failure is None else self._first_failure - self._serves_since

    async def unload(self) -> Source:
        """Free the serving model, for which nothing may be in flight; returns what it was loaded from.

        Raises:
            NoModel: none serves right now.
        """
        old = self.loaded
        self.serving = None
        await self.discard(old)
        return old.source

    async def discard(self, unused: Loaded) -> None:
        """Free a model that does not serve."""
        await asyncio.wrap_future(self._compute.submit(unused.encoder.close))
        await asyncio.to_thread(_give_back)

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. A micro-batch that runs longer than this is left behind, as is a load."""
        until = time.monotonic() + within_s
        for threads in (self._compute, self._results):
            threads.close(until - time.monotonic())

    def _hurry(self, limit: asyncio.Timeout) -> None:
        """Nobody wants this work any more."""
        when = asyncio.get_running_loop().time() + self._stop_s
        if not limit.expired():
            limit.reschedule(when if (before := limit.when()) is None else min(before, when))

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


def _give_back() -> None:
    """Hand what was freed to the system. glibc keeps it in the heaps of the threads that made it, and each load has a new one: a
    model's size on a CPU, after a few reloads."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _guarded(work: Callable[[], Returned]) -> Returned:
    with panics_caught():
        return work()


def _hand_late(call: Future[Returned], late: Callable[[Returned], object]) -> None:
    if not call.cancelled() and call.exception() is None:
        late(call.result())
