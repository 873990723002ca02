"""One batch, from wherever it is to its end. Whoever is killed here loses no result that was counted, and counts none twice."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Final, Protocol

import msgspec

from embedq_gateway.batches.batch import Batch, FileFault, Segment, WrongStatus
from embedq_gateway.batches.files import Files
from embedq_gateway.batches.identities import result_file_id
from embedq_gateway.batches.register import Register
from embedq_gateway.batches.running.lines import (
    Answer,
    InputLine,
    LineTooLong,
    Request,
    Validation,
    answered,
    destination,
    read_request,
    split,
    text_count,
    unfinished,
)
from embedq_gateway.batches.running.segment_buffer import FULL_BYTES, SegmentBuffer, Written
from embedq_shared.backoff import backoff
from embedq_shared.weighted_semaphore import WeightedSemaphore

_FIRST_PAUSE_S: Final = 0.5
_LINES_PER_TURN: Final = 256
"""After so many lines other tasks have their turn: a chunk of a file holds thousands."""
_LONGEST_PAUSE_S: Final = 30.0
"""While Kafka is away a line is tried so often; each try waits for Kafka by itself."""


class TryAgain(Exception):
    """A line could not be run now, through no fault of its own: Kafka is away, or this gateway has too much in hand."""


class RunLine(Protocol):
    """Runs the body of a line, as a request of its endpoint would be."""

    async def __call__(self, batch: Batch, body: bytes, timeout: float) -> Answer:
        """`timeout`: seconds until the batch's time is over.

        Raises:
            TryAgain.
        """


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch is run."""

    most_lines: int = 50_000
    """Of an input file: OpenAI's own bound."""
    in_flight_texts: int = 1024
    """Of one batch. It keeps a few replicas busy; what is in flight at a kill is computed again."""
    in_flight_bytes: int = 16 << 20
    beat_s: float = 5.0
    """Between two signs of life."""


class _Stopped(Exception):
    """No line shall be run any more: the batch is cancelled, or this gateway ends."""


class _InputGone(Exception):
    """The input file is not there."""


class _Outgoing(msgspec.Struct, frozen=True):
    """Results that are being written. Their name stays the same until they count, however often they are written."""

    name: str
    written: Written


async def clear_away(batch: Batch, register: Register, files: Files) -> None:
    """After a batch's end: what killed or late writers left of it, and its place among those that run."""
    await files.delete_other_pieces(batch.owner, batch.id, (*batch.outputs, *batch.failures))
    await register.leave_active(batch)


class BatchRun:
    """Runs a batch that this process holds the lease of.

    Invariants:
        - The document is changed only while the lease is ours, so of two processes that think they run a batch only one does.
        - A result counts once its bytes are in the storage and the document names them; until then its line is to be run.
        - A line is answered by one job or by its repeat as a whole, so one model makes all vectors of a line.
    """

    def __init__(
        self,
        batch: Batch,
        holder: str,
        register: Register,
        files: Files,
        run_line: RunLine,
        options: RunOptions,
    ) -> None:
        self.batch = batch
        """As it was last read or written."""
        self._holder = holder
        self._register = register
        self._files = files
        self._run_line = run_line
        self._options = options
        self._stop = asyncio.Event()
        self._leaving = False
        self._look_now = asyncio.Event()
        self._changing = asyncio.Lock()
        self._began = 0.0
        self._buffer = SegmentBuffer(0.0)
        self._outgoing: _Outgoing | None = None
        self._writing = asyncio.Lock()
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    def leave(self) -> None:
        """This gateway ends: write down what is there, and let another one go on."""
        self._leaving = True
        self._stop.set()

    def look(self) -> None:
        """The document was changed by somebody else, such as by a cancellation."""
        self._look_now.set()

    async def run(self) -> None:
        """Run it until it has ended, or until `leave`.

        Raises:
            LeaseLost, BatchGone, StorageError, several of them in an exception group.
        """
        self._began = asyncio.get_running_loop().time()
        self._buffer = SegmentBuffer(self._began)
        async with asyncio.TaskGroup() as tasks:
            beats = tasks.create_task(self._beat(), name="embedq-batch-beat")
            await self._work()
            beats.cancel()

    async def fail(self, fault: FileFault) -> None:
        """It cannot be brought to its end. What was done remains."""
        await self._publish()
        await self._change(lambda batch: batch.refused([fault], self._now()))
        await clear_away(self.batch, self._register, self._files)

    # -- the steps ----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        steps = {
            "validating": self._validate,
            "in_progress": self._run_lines,
            "finalizing": self._close,
            "cancelling": self._close,
        }
        while not self.batch.ended and not self._leaving:
            input_gone = False
            try:
                await steps[self.batch.status]()
            except* WrongStatus:
                pass  # it was cancelled in between, and `batch` says so
            except* _InputGone:
                input_gone = True
            if input_gone:
                await self.fail(
                    FileFault(code="input_file_missing", message="expected the input file to be there")
                )
        if not self.batch.ended:
            await self._change(lambda batch: batch.released(self._holder))

    async def _validate(self) -> None:
        check = Validation(self.batch.endpoint, self._options.most_lines)
        try:
            async with aclosing(self._lines()) as lines:
                async for line in lines:
                    if self._stop.is_set():
                        return
                    check.add(line)
                    if check.enough:
                        break
        except LineTooLong as error:
            check.too_long(error)
        if faults := check.end():
            await self._change(lambda batch: batch.refused(faults, self._now()))
            await clear_away(self.batch, self._register, self._files)
        else:
            await self._change(lambda batch: batch.validated(check.total, self._now()))

    async def _run_lines(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._time_left()):
                try:
                    await self._pump()
                except* _Stopped:
                    pass
        await self._write_all()
        if not self._leaving:
            await self._change(lambda batch: batch.finalizing(self._now()))

    async def _pump(self) -> None:
        """Run the lines that are left, a bounded number at a time, and write their results down."""
        window = WeightedSemaphore(self._options.in_flight_texts, self._options.in_flight_bytes)
        async with asyncio.TaskGroup() as helpers:
            stopper = helpers.create_task(self._raise_when_stopped())
            writer = helpers.create_task(self._write_when_due())
            async with asyncio.TaskGroup() as running, aclosing(self._lines()) as lines:
                async for line in lines:
                    if line.number in self.batch.done:
                        continue
                    request = read_request(line)
                    weight = (text_count(request.body), len(line.data))
                    await window.acquire(*weight)
                    task = running.create_task(self._run_one(line.number, request))
                    task.add_done_callback(partial(_release, window, weight))
            stopper.cancel()
            writer.cancel()

    async def _close(self) -> None:
        """Say of each line that is left that it was not run, and make the files."""
        if len(self.batch.done) < self.batch.total:
            async with aclosing(self._lines()) as lines:
                async for line in lines:
                    if line.number in self.batch.done:
                        continue
                    request = read_request(line)
                    text = unfinished(self.batch.id, line.number, request.custom_id, self.batch.unfinished)
                    self._buffer.add(line.number, text, "failures", self._began, unrun=True)
                    if self._buffer.size >= FULL_BYTES:
                        await self._write_all()
            await self._write_all()
        await self._publish()
        await self._change(lambda batch: batch.end(self._now()))
        await clear_away(self.batch, self._register, self._files)

    # -- lines --------------------------------------------------------------------------------------------------------

    async def _lines(self) -> AsyncGenerator[InputLine, None]:
        file = await self._files.get(self.batch.owner, self.batch.input_file_id, in_use=True)
        if file is None:
            raise _InputGone
        async with aclosing(self._files.read(file)) as chunks, aclosing(split(chunks)) as lines:
            async for line in lines:
                if line.number % _LINES_PER_TURN == 0:
                    await asyncio.sleep(0)
                yield line

    async def _run_one(self, number: int, request: Request) -> None:
        answer = await self._answer(bytes(request.body))
        while self._buffer.size >= 2 * FULL_BYTES:
            self._room.clear()
            await self._room.wait()
        self._buffer.add(
            number,
            answered(self.batch.id, number, request.custom_id, answer),
            destination(answer),
            asyncio.get_running_loop().time(),
            tokens=answer.tokens,
            model_version=answer.model_version,
        )
        self._news.set()

    async def _answer(self, body: bytes) -> Answer:
        attempt = 0
        while True:
            try:
                return await self._run_line(self.batch, body, max(0.001, self._time_left()))
            except TryAgain:
                await asyncio.sleep(backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
                attempt += 1

    async def _raise_when_stopped(self) -> None:
        await self._stop.wait()
        raise _Stopped

    # -- what is written ----------------------------------------------------------------------------------------------

    async def _write_when_due(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            wait = self._buffer.due_in(clock())
            if wait is not None and wait <= 0:
                await self._write()
                continue
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()

    async def _write_all(self) -> None:
        while self._outgoing is not None or len(self._buffer):
            await self._write()

    async def _write(self) -> None:
        """Write results down, and count them. Where this is interrupted, the next call does the same once more."""
        async with self._writing:
            if self._outgoing is None:
                if not len(self._buffer):
                    return
                name = f"{len(self.batch.done):08d}-{os.urandom(6).hex()}"
                self._outgoing = _Outgoing(name, self._buffer.written())
                self._buffer = SegmentBuffer(self._began)
                self._room.set()
            segment = await self._put(self._outgoing)
            await self._change(lambda batch: batch.advanced(segment))
            self._outgoing = None

    async def _put(self, outgoing: _Outgoing) -> Segment:
        owner, name, written = self.batch.owner, self.batch.id, outgoing.written
        output = failures = None
        if written.output:
            output = await self._files.put_piece(owner, name, f"{outgoing.name}.output", written.output)
        if written.failures:
            failures = await self._files.put_piece(owner, name, f"{outgoing.name}.errors", written.failures)
        return Segment(
            lines=written.lines,
            output=output,
            failures=failures,
            completed=written.completed,
            failed=written.failed,
            unrun=written.unrun,
            tokens=written.tokens,
            model_versions=written.model_versions,
        )

    async def _publish(self) -> None:
        """Make the files of what was written, which `end` then names."""
        batch = self.batch
        for which, pieces in (("output", batch.outputs), ("errors", batch.failures)):
            if pieces:
                file = self._files.made_of(
                    batch.owner,
                    result_file_id(batch.id, which),
                    pieces,
                    f"{batch.id}_{which}.jsonl",
                    batch.output_seconds,
                )
                await self._files.publish(file)

    # -- the document -------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.beat_s):
                    await self._look_now.wait()
            self._look_now.clear()
            await self._change(lambda batch: batch)

    async def _change(self, change: Callable[[Batch], Batch]) -> None:
        """Change the document as the lease's holder. When its status does not allow that, `batch` is up to date, too."""

        def checked(batch: Batch) -> Batch:
            self.batch = batch.beaten(self._holder)
            return change(self.batch)

        async with self._changing:
            try:
                self.batch = await self._register.change(self.batch.owner, self.batch.id, checked)
            finally:
                if self.batch.status == "cancelling":
                    self._stop.set()

    def _now(self) -> int:
        return int(self._register.now())

    def _time_left(self) -> float:
        return max(0.0, self.batch.expires_at - self._register.now())


def _release(window: WeightedSemaphore, weight: tuple[int, int], task: asyncio.Task[None]) -> None:
    """A line's task has ended, in whatever way, even before it began."""
    window.release(*weight)
