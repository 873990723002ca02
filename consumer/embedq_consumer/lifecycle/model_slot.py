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

from embedq_consumer.batching.token_budget import Budget
from embedq_consumer.engine import Encoder, Pending, Tokens

Params = ParamSpec("Params")
Returned = TypeVar("Returned")
Loader = Callable[[Path], Encoder]


class Loaded(msgspec.Struct, frozen=True):
    """An encoder, the directory that it came from, and the token budget that was found for it, once it was."""

    encoder: Encoder
    path: Path
    budget: Budget | None = None


class NoModel(Exception):
    """The slot is empty: a resource-preserving reload is under way, or has lost both models."""


class ModelSlot:
    """Holds the serving encoder. Work reaches the compute thread in call order, so there is no lock.

    Invariants: what is submitted, and everything that changes memory on the device, runs on the compute thread; results
    are waited for on another, so that the next micro-batch reaches the device while this one runs; a load beside the
    serving model runs on a thread of its own; `loaded` and `busy_since` change on the event loop alone.
    """

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._results = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._loaded: Loaded | None = None
        self._running = 0
        self._last_result = 0.0  # monotonic seconds; touched on the results thread alone
        self.busy_since: float | None = None
        """Monotonic seconds since when the oldest micro-batch under way runs, None while none does."""

    @property
    def loaded(self) -> Loaded:
        """The serving model.

        Raises:
            NoModel: none serves right now.
        """
        if self._loaded is None:
            raise NoModel("no model is loaded")
        return self._loaded

    async def load(self, path: Path) -> Loaded:
        """Load a directory beside the serving model, without touching it."""
        encoder = await _run(self._beside, self._load, path)
        return Loaded(encoder, path)

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
        """Serve this model from now on; the one before, to be discarded. Nothing may be in flight for that one."""
        old, self._loaded = self._loaded, new
        return old

    async def unload(self) -> Path:
        """Free the serving model; the path it came from. Nothing may be in flight for it."""
        old = self.loaded
        self._loaded = None
        await self.discard(old)
        return old.path

    async def discard(self, unused: Loaded) -> None:
        """Free a model that does not serve."""
        await _run(self._compute, unused.encoder.close)

    def close(self) -> None:
        """End the threads. Waits for micro-batches that run."""
        for pool in (self._compute, self._results, self._beside):
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, encoder: Encoder, batch: Sequence[Tokens]
    ) -> Future[tuple[npt.NDArray[np.float32], float]]:
        submitted = time.monotonic()
        pending = encoder.submit(batch)
        # From here and not from the event loop, which may be away: the vectors wait for nobody.
        return self._results.submit(self._result, pending, submitted)

    def _result(self, pending: Pending, submitted: float) -> tuple[npt.NDArray[np.float32], float]:
        vectors = pending.result()
        begin, self._last_result = max(submitted, self._last_result), time.monotonic()
        return vectors, self._last_result - begin


async def _run(
    pool: ThreadPoolExecutor, work: Callable[Params, Returned], *args: Params.args, **_: Params.kwargs
) -> Returned:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
