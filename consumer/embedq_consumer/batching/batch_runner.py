"""One micro-batch through the model: what expired is left out, what fails is halved, windows become whole texts again."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.batching import input_errors
from embedq_consumer.batching.single_flight import JobInput, QueuedText, Settled, SingleFlight
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.batching.windows import Vectors
from embedq_consumer.engine import DeviceLost, Encoder, OutOfMemory, Tokens
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import Lane

log = structlog.get_logger()

ComputedText = tuple[QueuedText, list[JobInput]]
"""A text that ran, and all inputs that waited for its vector."""
AssembledText = tuple[QueuedText, Vectors, list[JobInput]]
"""The last window of a text that ran in windows, all of the text's vectors, and the inputs that waited for them."""


class Device(Protocol):
    """What computes."""

    def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Awaitable[tuple[Vectors, float]]:
        """Submit one micro-batch, at once. Its vectors, float32 (rows, hidden_size), and the seconds that they took.

        Raises:
            OutOfMemory: a smaller micro-batch may fit.
            DeviceLost: nothing runs on this device any more.
        """

    def note_failed(self, encoder: Encoder) -> None:
        """A text has got no vector of this model, even alone."""

    def note_out_of_memory(self, encoder: Encoder) -> None:
        """A micro-batch of this model, within its budget, found too little memory."""


class Results(Protocol):
    """Where the runner hands on its results, each input exactly once. The methods return at once."""

    def settle(self, outcomes: Iterable[Settled]) -> None:
        """Inputs that get no vector."""

    def computed(self, texts: Sequence[ComputedText], vectors: Vectors) -> None:
        """Texts that ran whole; `vectors` is float32 (texts, hidden_size), not yet normalized."""

    def assembled(self, texts: Sequence[AssembledText]) -> None:
        """Texts whose last window ran."""


class BatchRunner:
    """Runs micro-batches. Several may be under way at once.

    Invariants:
        - No input runs whose job expired before its micro-batch began.
        - A text whose vector is not finite runs again alone: where a text is not finite, a device may make it so for others
          beside it.
        - A text that several clients queued runs once in a micro-batch.
        - A text fails only after it failed alone: a micro-batch that fails is repeated in halves.
        - `DeviceLost` is no text's fault and ends the process: the next one repeats what is unfinished.
    """

    def __init__(
        self,
        flights: SingleFlight,
        device: Device,
        budget: TokenBudget,
        results: Results,
        metrics: Metrics,
    ) -> None:
        self._flights = flights
        self._device = device
        self._budget = budget
        self._results = results
        self._metrics = metrics

    async def run(self, batch: Sequence[QueuedText]) -> float | None:
        """Compute one micro-batch and hand on its results; done when the device is done with it. The seconds that the device took;
        None if it failed as a whole, or nobody waits for it any more."""
        now_ms, now = time.time() * 1000, time.monotonic()
        live: list[QueuedText] = []
        waiters: list[JobInput] = []
        for text in _once(batch):
            if waiting := self._waiters(text, now_ms):
                live.append(text)
                waiters += waiting
        return await self._compute(live, partial(self._note_queue, waiters, now)) if live else None

    def _waiters(self, text: QueuedText, now_ms: float) -> list[JobInput]:
        """Who still waits for this text, after those whose deadline has passed are settled."""
        waiters, expired = self._flights.unexpired(text.identity, now_ms)
        if expired:
            self._results.settle((job, index, input_errors.EXPIRED_IN_QUEUE) for job, index in expired)
        return waiters

    def _note_queue(self, waiters: Iterable[JobInput], now: float) -> None:
        """How long jobs waited for their first micro-batch, which began `now`."""
        waited: dict[Lane, list[float]] = {}
        for job, _ in waiters:
            if job.queue_s is None:
                job.queue_s = now - job.record.polled_at
                waited.setdefault(job.record.lane, []).append(job.queue_s)
        for lane, seconds in waited.items():
            self._metrics.queue.observe(lane, seconds)

    async def _compute(
        self, batch: Sequence[QueuedText], meanwhile: Callable[[], None] = lambda: None
    ) -> float | None:
        """Run it; if it fails, in halves, until the text that fails is alone. `meanwhile` is called while it runs."""
        try:
            computing = self._device.encode(batch[0].identity.encoder, [text.tokens for text in batch])
            meanwhile()
            vectors, seconds = await computing
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001
            # Anything else that the model raises is the input's fault until it has failed alone.
            log.warning("batch_failed", texts=len(batch), reason=type(error).__name__)
            if isinstance(error, OutOfMemory):
                self._device.note_out_of_memory(batch[0].identity.encoder)
            await self._halve(batch, out_of_memory=isinstance(error, OutOfMemory))
            return None
        self._metrics.compute.observe(seconds)
        self._metrics.tokens.inc(sum(text.cost for text in batch))
        self._note_compute(batch, seconds)
        finite = _finite(batch, vectors)
        if len(batch) == 1 or finite.all():
            if not finite.all():
                self._device.note_failed(batch[0].identity.encoder)
            self._hand_on(batch, vectors)
            return seconds
        sound, broken = (
            [text for text, is_finite in zip(batch, finite, strict=True) if is_finite == kind]
            for kind in (True, False)
        )
        log.warning("vectors_not_finite", texts=len(broken), of=len(batch))
        self._metrics.batch_splits.inc()
        self._hand_on(sound, vectors[np.repeat(finite, [text.tokens.rows for text in batch])])
        for text in broken:
            await self._compute([text])
        return seconds

    async def _halve(self, batch: Sequence[QueuedText], *, out_of_memory: bool) -> None:
        if len(batch) == 1:
            self._device.note_failed(batch[0].identity.encoder)
            waiters = self._flights.resolve(batch[0].identity)
            self._results.settle((job, index, input_errors.failed(job, index)) for job, index in waiters)
            return
        if out_of_memory:
            self._budget.ran_out(sum(text.cost for text in batch))
        self._metrics.batch_splits.inc()
        middle = len(batch) // 2
        await self._compute(batch[:middle])
        await self._compute(batch[middle:])

    def _note_compute(self, batch: Sequence[QueuedText], seconds: float) -> None:
        """A job's compute time is that of all micro-batches in which it had a text, each counted once; its device time is its part
        of each, by tokens. Those who wait for one text pay for it together."""
        a_token = seconds / max(1, sum(text.cost for text in batch))
        jobs: dict[int, JobState] = {}
        for text in batch:
            waiters = self._flights.waiters(text.identity)
            for job, _ in waiters:
                jobs[id(job)] = job
                job.device_s = (job.device_s or 0.0) + a_token * text.cost / len(waiters)
        for job in jobs.values():
            job.compute_s = (job.compute_s or 0.0) + seconds

    def _hand_on(self, batch: Sequence[QueuedText], vectors: Vectors) -> None:
        """Resolve the texts that are whole; `vectors` is float32 (rows of all texts, hidden_size)."""
        if any(text.window is not None for text in batch):
            batch, vectors = self._assemble(batch, vectors)
        if batch:
            self._results.computed([(text, self._flights.resolve(text.identity)) for text in batch], vectors)

    def _assemble(self, batch: Sequence[QueuedText], vectors: Vectors) -> tuple[list[QueuedText], Vectors]:
        """Keep the windows and hand on the texts that are whole with them; the texts without windows, and their vectors."""
        assembled: list[AssembledText] = []
        plain: list[QueuedText] = []
        rows: list[int] = []
        begin = 0
        for text in batch:
            end = begin + text.tokens.rows
            if text.window is None:
                plain.append(text)
                rows.append(begin)
            elif (whole := self._flights.assemble(text, vectors[begin:end])) is not None:
                assembled.append((text, whole, self._flights.resolve(text.identity)))
            begin = end
        if assembled:
            self._results.assembled(assembled)
        return plain, vectors[rows]


def _finite(batch: Sequence[QueuedText], vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Whether all values of a text are finite, for each text."""
    if math.isfinite(vectors.sum()):  # far cheaper than a look at each value, and true nearly always
        return np.ones(len(batch), dtype=np.bool_)
    rows = np.asarray(np.isfinite(vectors).all(axis=1))
    ends = np.cumsum([text.tokens.rows for text in batch])
    return np.array([part.all() for part in np.split(rows, ends[:-1])], dtype=np.bool_)


def _once(batch: Sequence[QueuedText]) -> Sequence[QueuedText]:
    """The texts of a micro-batch without those that another client queued too."""
    if len({text.client for text in batch}) == 1:
        return batch
    found = {(text.identity, text.window and text.window.number): text for text in batch}
    return list(found.values())
