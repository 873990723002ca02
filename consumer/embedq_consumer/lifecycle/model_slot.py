"""The model that serves an alias: one slot, and the threads on which its successor is loaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import structlog

from embedq_consumer.batching.token_budget import Budget, Conditions, Measured
from embedq_consumer.engine import Abandoned, Cancellation, Encoder, Found, Inspection, Memory, Text, Tokens
from embedq_consumer.engine.safety.panics import panics_caught
from embedq_consumer.lifecycle.device import Computed, Device
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.residents import Loaded, Source
from embedq_consumer.threads import CLOSE_S, WorkerThreads

log = structlog.get_logger()

_MOST_HUNG: Final = 3
"""Threads that may hang in what a command asked for. Each may hold a model's memory; with more, the process needs a restart."""
_STOP_S: Final = 60.0
"""What a load that is not wanted any more has to come to its next step: the longest, which reads and compiles, takes as long for
the largest models. After that the next command need not wait for it."""

Returned = TypeVar("Returned")

__all__ = ["Computed", "Loaded", "Loader", "ModelSlot", "NoModel", "Source"]


class Loader(Protocol):
    """Makes encoders. All of these block, and run on threads of their own."""

    def inspect(self, source: Source, cancel: Cancellation) -> Inspection:
        """What a directory asks for.

        Raises:
            ModelError: it cannot be served.
            Abandoned: `cancel` was set meanwhile.
        """

    def read_ahead(self, source: Source, cancel: Cancellation) -> bool:
        """Have a directory's files in memory before the load, where there is room for that.

        Raises:
            ModelError: they are not complete any more.
            Abandoned: `cancel` was set meanwhile.
        """

    def load(self, source: Source, cancel: Cancellation) -> Encoder:
        """The model of a directory.

        Raises:
            ModelError: it cannot be served.
            Abandoned: `cancel` was set meanwhile; nothing is left of it.
        """


class NoModel(Exception):
    """The slot is empty: a resource-preserving reload is under way, or has lost both models."""


class ModelSlot:
    """Holds the serving encoder of one alias; slots of one `device` share its memory and its compute thread.

    Invariants: a load while another model serves runs on a thread of its own, and is given up after `load_timeout_s`; a model
    that another alias has in memory is not loaded again; `serving` and `busy_since` change on the event loop alone.
    """

    def __init__(
        self,
        loader: Loader,
        device: Device | None = None,
        *,
        load_timeout_s: float = 900.0,
        stop_s: float = _STOP_S,
    ) -> None:
        """`device`: None for one of its own, which is closed with it."""
        self._loader = loader
        self._load_timeout_s = load_timeout_s
        self._stop_s = stop_s
        self._own = device is None
        self.device = Device() if device is None else device
        self._hung: list[Future[Any]] = []
        self._running = 0
        self._serves_since = 0.0
        self._first_failure: float | None = None
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

    async def read_ahead(self, source: Source, cancel: Cancellation) -> None:
        """Read a directory's files while the model before it still serves: the load, for which jobs wait, then finds them in memory.

        Raises:
            ModelError: they are not complete any more.
            ModelRejected: it took too long.
            Abandoned: `cancel` was set meanwhile.
        """
        work = partial(self._loader.read_ahead, source, cancel)
        if not await self.apart("validate", work, cancel=cancel):
            log.info("model_not_read_ahead", reason="too little memory is free to hold its files")

    async def load(self, source: Source, cancel: Cancellation | None = None) -> Loaded:
        """The model of a directory, without touching the serving one: loaded, or that in memory.

        Raises:
            ModelRejected: it took too long. Should it end some day, it is freed.
            Abandoned: `cancel` was set meanwhile, and the load has ended and freed what it had; or it does not come to its next
                step, and is freed then.
        """
        if (resident := self.resident(source)) is not None:
            self.device.residents.take(resident)
            return resident
        cancel = cancel or Cancellation()
        load = partial(self._loader.load, source, cancel)
        loaded = Loaded(await self.apart("load", load, self.device.free_late, cancel), source)
        self.device.residents.add(loaded)
        return loaded

    def resident(self, source: Source) -> Loaded | None:
        """The model of these very files, if it is in memory. Not the one that serves here: who names that one again has a reason."""
        found = self.device.residents.find(source)
        return None if found is None or found is self.serving else found

    @property
    def freed_by_unloading(self) -> int:
        """Bytes that the device gets back when this alias's model goes: none where it stays for another alias, or is pinned."""
        return 0 if self.serving is None else self.device.residents.freed_by(self.serving)

    def note_measured(self, loaded: Loaded, measured: Measured) -> None:
        """Remember the token budget that was found for a model: who comes back to it need not find it again."""
        self.device.residents.note_measured(loaded, measured)

    def budget_of(self, loaded: Loaded) -> Budget | None:
        """The token budget that was found for a model, if one was."""
        return self.device.residents.budget_of(loaded)

    async def measured_under(self, encoder: Encoder, conditions: Conditions) -> Measured | None:
        """What the trial of a model in memory has found, if that of this one, loaded beside it, would find the same: the driver itself says
        that what it took is free. What PyTorch keeps does not count, of which graphs have the most."""
        memory = await self.device.between_batches(encoder.memory)
        return (
            None
            if memory is None
            else self.device.residents.measured_under(conditions, memory.total - memory.used)
        )

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

    def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Coroutine[Any, Any, Computed]:
        """Give one micro-batch to the compute thread, at once. Its vectors, float32 (rows, hidden_size), and the seconds that they
        took; one that was submitted while another ran took as long as it ran alone.
        """
        computing = self.device.encode(encoder, batch)
        self._begin()
        return self._computed(computing)

    def start(self, encoder: Encoder, text: Text) -> asyncio.Future[list[Found]]:
        """Give one text to the compute thread, at once, to be tokenized and run there; see `Device.start`."""
        found, run = self.device.start(encoder, text)
        self._begin()
        run.add_done_callback(lambda _: self._end())
        return found

    async def _computed(self, computing: Coroutine[Any, Any, Computed]) -> Computed:
        try:
            return await computing
        finally:
            self._end()

    def _begin(self) -> None:
        self._running += 1
        self.busy_since = self.busy_since or time.monotonic()

    def _end(self) -> None:
        self._running -= 1
        self.busy_since = time.monotonic() if self._running else None

    async def idle(self, within_s: float) -> None:
        """Return once no micro-batch is under way on the device, or after so many seconds."""
        await self.device.idle(within_s)

    async def memory(self) -> Memory | None:
        """The device's memory; None on a CPU, and while no model serves.

        Raises:
            DeviceLost: the device does not answer any more.
        """
        if self.serving is None:
            return None
        return await self.device.between_batches(self.serving.encoder.memory)

    def install(self, new: Loaded) -> Loaded | None:
        """Serve this model from now on; returns the one before, to be discarded, for which nothing may be in flight."""
        old, self.serving = self.serving, new
        self._serves_since, self._first_failure = time.monotonic(), None
        return old

    def note_out_of_memory(self, encoder: Encoder) -> None:
        """A micro-batch of this model, within its budget, found too little memory."""
        self.device.residents.doubt(encoder)

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

    async def discard(self, unused: Loaded, *, keep: bool = False) -> None:
        """Free a model that does not serve here, unless another alias has it; with `keep` it stays as far as the settings allow."""
        await self.device.leave(unused, keep=keep)

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads, where they are its own. What runs longer than this is left behind, as is a load."""
        if self._own:
            self.device.close(within_s)

    def _hurry(self, limit: asyncio.Timeout) -> None:
        """Nobody wants this work any more."""
        when = asyncio.get_running_loop().time() + self._stop_s
        if not limit.expired():
            limit.reschedule(when if (before := limit.when()) is None else min(before, when))


def _guarded(work: Callable[[], Returned]) -> Returned:
    with panics_caught():
        return work()


def _hand_late(call: Future[Returned], late: Callable[[Returned], object]) -> None:
    if not call.cancelled() and call.exception() is None:
        late(call.result())
