"""The model that serves: one slot, the one thread that may compute on it, and the one that waits for its results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_consumer.engine import Encoder, Pending, Tokens

Params = ParamSpec("Params")
Returned = TypeVar("Returned")
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
    are waited for on another, so that the next micro-batch reaches the device while this one runs; a load while another
    model serves runs on a thread of its own; `serving` and `busy_since` change on the event loop alone.
    """

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._results = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        self._loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._running = 0
        self._last_result = 0.0  # monotonic seconds; touched on the results thread alone
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
        """Load a directory without touching the serving model."""
        return Loaded(await _run(self._loading, self._load, path), path)

    async def encode(
        self, encoder: Encoder, batch: Sequence[Tokens]
    ) -> tuple[npt.NDArray[np.float32], float]:
        """Vectors of one micro-batch, float32 (rows, hidden_size), and the seconds that they took.

        A micro-batch that was submitted while another ran took as long as it ran alone.
        """
        self._running += 1
        self.busy_since = self.busy_since or time.monotonic()
        try:
            return await asyncio.wrap_future(await _run(self._compute, self._submit, encoder, batch))
        finally:
            self._running -= 1
            self.busy_since = time.monotonic() if self._running else None

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
        await _run(self._compute, unused.encoder.close)

    def close(self) -> None:
        """End the threads. Waits for micro-batches that run."""
        for pool in (self._compute, self._results, self._loading):
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, encoder: Encoder, batch: Sequence[Tokens]
    ) -> Future[tuple[npt.NDArray[np.float32], float]]:
        submitted = time.monotonic()
        pending = encoder.submit(batch)
        # From this thread, because the event loop may be busy: the vectors must not wait for it.
        return self._results.submit(self._result, pending, submitted)

    def _result(self, pending: Pending, submitted: float) -> tuple[npt.NDArray[np.float32], float]:
        vectors = pending.result()
        begin, self._last_result = max(submitted, self._last_result), time.monotonic()
        return vectors, self._last_result - begin


async def _run(
    pool: ThreadPoolExecutor, work: Callable[Params, Returned], *args: Params.args, **_: Params.kwargs
) -> Returned:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
