"""The model that serves: one slot, and the one thread that may compute on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_consumer.engine import Encoder

Params = ParamSpec("Params")
Returned = TypeVar("Returned")
Loader = Callable[[Path], Encoder]


class Loaded(msgspec.Struct, frozen=True):
    """An encoder and the directory that it came from."""

    encoder: Encoder
    path: Path


class NoModel(Exception):
    """The slot is empty: a resource-preserving reload is under way, or has lost both models."""


class ModelSlot:
    """Holds the serving encoder. Work reaches the compute thread in call order, so there is no lock.

    Invariants: `encode` and everything that changes memory on the device run on the compute thread; a load beside the
    serving model runs on a thread of its own; `loaded` changes on the event loop alone.
    """

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._loaded: Loaded | None = None
        self.busy_since: float | None = None
        """Monotonic seconds since when a micro-batch runs, None while none does."""

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
        self, encoder: Encoder, batch: Sequence[npt.NDArray[np.int32]]
    ) -> tuple[npt.NDArray[np.float32], float]:
        """Vectors of one micro-batch, float32 (len(batch), hidden_size), and the seconds that they took."""
        return await _run(self._compute, self._timed, encoder, batch)

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
        """End the threads. Waits for a micro-batch that runs."""
        self._compute.shutdown(wait=True, cancel_futures=True)
        self._beside.shutdown(wait=True, cancel_futures=True)

    def _timed(
        self, encoder: Encoder, batch: Sequence[npt.NDArray[np.int32]]
    ) -> tuple[npt.NDArray[np.float32], float]:
        self.busy_since = started = time.monotonic()
        try:
            return encoder.encode(batch), time.monotonic() - started
        finally:
            self.busy_since = None


async def _run(
    pool: ThreadPoolExecutor, work: Callable[Params, Returned], *args: Params.args, **_: Params.kwargs
) -> Returned:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
