"""The device of a replica: the one thread that may compute on it, the one that waits for results, and the models in its memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.engine import Encoder, Found, Pending, Text, Tokens
from embedq_consumer.engine.safety import heaps
from embedq_consumer.lifecycle.residents import Loaded, Residents
from embedq_consumer.threads import CLOSE_S, WorkerThreads

log = structlog.get_logger()
_micro_batches: Final = logging.getLogger(__name__)
"""Asked before an event is made of a micro-batch, of which a busy device runs hundreds in a second."""

Returned = TypeVar("Returned")
Computed = tuple[npt.NDArray[np.float32], float]
"""Vectors of a micro-batch, and the seconds that they took."""


class _Ahead:
    """A run that began with a text, of which nobody has asked for the vectors yet."""

    def __init__(self, run: asyncio.Future[Computed | None]) -> None:
        self.run = run
        self.tokens: object = None


class Device:
    """What all aliases of a replica share. Work reaches the compute thread in call order, so there is no lock around it.

    Invariants: what is submitted, and everything that changes memory on the device, runs on the compute thread; results are
    waited for on another, unless they are there, so that the next micro-batch reaches the device while this one runs.
    """

    def __init__(self, residents: Residents | None = None, *, shares: bool = False) -> None:
        """`shares`: a model may be in memory for another alias, or for one that comes back to it."""
        self._compute = WorkerThreads("compute")
        self._results = WorkerThreads("results")
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._busy = asyncio.Event()
        self._floor = asyncio.Lock()
        self._last_result = 0.0  # monotonic seconds; touched on the thread that has a model's results
        self._ahead: _Ahead | None = None
        self.residents = Residents() if residents is None else residents
        self.shares = shares

    def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Coroutine[Any, Any, Computed]:
        """Give one micro-batch to the compute thread, at once. Its vectors, float32 (rows, hidden_size), and the seconds that they
        took; one that was submitted while another ran took as long as it ran alone.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and len(batch) == 1 and batch[0] is ahead.tokens:
            return self._ran(ahead.run)
        submitted = self._compute.submit(self._submit, encoder, batch)
        self._begin()
        return self._computed(submitted)

    def start(
        self, encoder: Encoder, text: Text
    ) -> tuple[asyncio.Future[list[Found]], asyncio.Future[Computed | None]]:
        """Tokenize one text on the compute thread, at once, and run it there: no other thread has to be woken between the two. What
        the model is given, and then what it gives; `encode` of these very tokens is this run, if it comes next.
        """
        found: Future[list[Found]] = Future()
        run = asyncio.wrap_future(self._compute.submit(self._tokenize_and_run, encoder, text, found))
        self._begin()
        run.add_done_callback(self._ran_ahead)
        self._ahead = ahead = _Ahead(run)
        tokenized = asyncio.wrap_future(found)

        def note(tokenized: asyncio.Future[list[Found]]) -> None:
            if not tokenized.cancelled() and tokenized.exception() is None:
                (ahead.tokens,) = tokenized.result()

        tokenized.add_done_callback(note)
        return tokenized, run

    def _begin(self) -> None:
        self._running += 1
        self._idle.clear()
        self._busy.set()

    def _end(self) -> None:
        self._running -= 1
        if not self._running:
            self._idle.set()
            self._busy.clear()

    def _ran_ahead(self, run: asyncio.Future[Computed | None]) -> None:
        if not run.cancelled():
            run.exception()  # it is for whoever waits for the vectors, if anybody does
        self._end()

    async def _ran(self, run: asyncio.Future[Computed | None]) -> Computed:
        computed = await run
        if computed is None:
            raise RuntimeError("a text without tokens was run. This is a bug.")
        return computed

    async def _computed(self, submitted: Future[Computed | Future[Computed]]) -> Computed:
        try:
            found = await asyncio.wrap_future(submitted)
            return await asyncio.wrap_future(found) if isinstance(found, Future) else found
        finally:
            self._end()

    async def busy(self, within_s: float) -> None:
        """Return once a micro-batch is under way, of whichever alias, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._busy.wait()

    async def idle(self, within_s: float) -> None:
        """Return once no micro-batch is under way, of whichever alias, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()

    async def between_batches(self, work: Callable[[], Returned]) -> Returned:
        """What `work` returns on the compute thread: while a CUDA graph is captured, no other thread may ask the device."""
        return await asyncio.wrap_future(self._compute.submit(work))

    async def take_floor(self) -> None:
        """Return when this alias may change its model: one at a time, since each counts with the memory that is free, and holds
        all jobs for its swap."""
        await self._floor.acquire()
        heaps.keep_little()

    async def leave_floor(self) -> None:
        """Let others change theirs. What this change has freed, its own loads and trials too, is the system's again."""
        heaps.keep_for_reuse()
        self._floor.release()
        await asyncio.to_thread(heaps.give_back)

    async def leave(self, loaded: Loaded, *, keep: bool) -> None:
        """An alias does not use this model any more; it is freed, or stays for the one that comes back to it."""
        await self._free(self.residents.leave(loaded, time.monotonic(), keep=keep))

    async def make_room(self, wanted: int) -> None:
        """Free `wanted` bytes of models that nobody uses, the least recently used first."""
        going = self.residents.make_room(wanted)
        for one in going:
            log.info("model_let_go", path=str(one.path), bytes=one.encoder.weight_bytes)
        await self._free(going)

    def free_late(self, encoder: Encoder) -> None:
        """Free a model that nobody waited for. Any thread may call this."""
        log.warning("late_load_freed", model_version=encoder.model_version)
        with suppress(RuntimeError):  # the threads are closed, and so the process ends
            self._compute.submit(encoder.close)

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. A micro-batch that runs longer than this is left behind, as is a load."""
        until = time.monotonic() + within_s
        for threads in (self._compute, self._results):
            threads.close(until - time.monotonic())

    async def _free(self, going: Iterable[Loaded]) -> None:
        for one in going:
            begin, longest_s, left = time.monotonic(), 0.0, True
            while left:
                left, seconds = await self.between_batches(partial(_timed, one.encoder.close_some))
                longest_s = max(longest_s, seconds)
            log.debug(
                "model_freed", seconds=round(time.monotonic() - begin, 4), longest_step_s=round(longest_s, 4)
            )
            await asyncio.to_thread(heaps.give_back)

    def _submit(self, encoder: Encoder, batch: Sequence[Tokens]) -> Computed | Future[Computed]:
        submitted = time.monotonic()
        pending = encoder.submit(batch)
        result = partial(self._result, encoder, batch, pending, submitted)
        if pending.ready:  # another thread to wait for it would have to be woken
            return result()
        # From this thread, because the event loop may be busy: the vectors must not wait for it.
        return self._results.submit(result)

    def _tokenize_and_run(self, encoder: Encoder, text: Text, found: Future[list[Found]]) -> Computed | None:
        if not found.set_running_or_notify_cancel():
            return None
        try:
            tokens = encoder.tokenize([text])
        except BaseException as error:  # noqa: BLE001  it is raised where the tokens are needed
            found.set_exception(error)
            return None
        found.set_result([*tokens])
        batch = [each for each in tokens if isinstance(each, Tokens)]
        if not batch:
            return None
        submitted = time.monotonic()
        return self._result(encoder, batch, encoder.submit(batch), submitted)

    def _result(
        self, encoder: Encoder, batch: Sequence[Tokens], pending: Pending, submitted: float
    ) -> Computed:
        vectors = pending.result()
        begin, self._last_result = max(submitted, self._last_result), time.monotonic()
        seconds = self._last_result - begin
        if _micro_batches.isEnabledFor(logging.DEBUG):  # when the device worked, and for which model
            tokens = sum(text.cost for text in batch)
            log.debug(
                "micro_batch",
                model_version=encoder.model_version,
                texts=len(batch),
                tokens=tokens,
                seconds=round(seconds, 6),
            )
        return vectors, seconds


def _timed(step: Callable[[], Returned]) -> tuple[Returned, float]:
    """What a step returns, and the seconds that it took."""
    begin = time.monotonic()
    return step(), time.monotonic() - begin
