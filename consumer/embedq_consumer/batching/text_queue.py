"""From inputs to queued texts: equal ones join, the first of them is tokenized and waits for a micro-batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

from embedq_consumer.batching.batcher import Batcher
from embedq_consumer.batching.input_errors import error_of
from embedq_consumer.batching.single_flight import (
    Identity,
    JobInput,
    QueuedText,
    Settled,
    SingleFlight,
    Window,
)
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.engine import Chunked, Failed, TextTooLong, Tokens
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_consumer.threads import CLOSE_S
from embedq_shared.grouping import batched_by
from embedq_shared.topics import LANES, Lane

_TEXTS_A_CALL: Final = 256
_CHARACTERS_A_CALL: Final = 1_000_000
"""Limits of one call of the tokenizer: the first micro-batch of a large poll need not wait for the last text, and a
tokenizer needs many bytes for each character."""

First = tuple[Identity, JobState]
"""The first of equal inputs: its identity, and the job that it is an input of."""


class TextQueue:
    """Where inputs wait for their vectors. `join`, then `tokenize` each group that `join` returned.

    The batch runner resolves what joined here: both are given the same `SingleFlight`.
    """

    def __init__(
        self, flights: SingleFlight, batcher: Batcher[QueuedText], budget: TokenBudget, metrics: Metrics
    ) -> None:
        self._flights = flights
        self._batcher = batcher
        self._budget = budget
        self._metrics = metrics
        self._tokenizers = TokenizerPool()

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds since when the oldest call of the tokenizer runs; None while none does."""
        return self._tokenizers.busy_since

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the tokenizer's threads. A call that runs longer than this is left behind."""
        self._tokenizers.close(within_s)

    def join(self, inputs: Sequence[JobInput]) -> list[tuple[Lane, list[First]]]:
        """Let each input wait for its vector. Those whose text is not under way yet, in groups for `tokenize`."""
        first: list[First] = []
        for job, index in inputs:
            identity = Identity.of(job, index)
            if self._flights.join(identity, (job, index)):
                first.append((identity, job))
        self._metrics.deduplicated.inc(len(inputs) - len(first))
        return [
            (lane, group)
            for lane in LANES
            for group in batched_by(
                [entry for entry in first if entry[0].lane == lane],
                _characters,
                _CHARACTERS_A_CALL,
                most=_TEXTS_A_CALL,
            )
        ]

    async def tokenize(self, lane: Lane, first: Sequence[First]) -> list[Settled]:
        """Queue these texts for a micro-batch. Returned is what is already settled: the inputs of texts that cannot run."""
        encoder = first[0][0].encoder  # one for all: a swap waits until nothing is in flight
        started = time.monotonic()
        found = await self._tokenizers.run(lane, encoder, [identity.text for identity, _ in first])
        now = time.monotonic()
        self._metrics.tokenize.observe(now - started)
        queued: list[QueuedText] = []
        errors: list[Settled] = []
        for (identity, job), text in zip(first, found, strict=True):
            job.tokenize_s = now - started
            error = error_of(text, job.request, self._budget.longest)
            if error is not None:
                waiters = self._flights.resolve(identity)
                errors += [(waiter, index, error(waiter.request, index)) for waiter, index in waiters]
            else:
                queued += _queued(identity, text, now)
        self._batcher.put(queued)
        return errors


def _characters(entry: First) -> int:
    text = entry[0].text
    return len(text.text) + len(text.prompt)


def _queued(
    identity: Identity, found: Tokens | Chunked | TextTooLong | Failed, now: float
) -> Iterable[QueuedText]:
    """One text, or its windows."""
    if isinstance(found, Tokens):
        return (QueuedText(identity=identity, tokens=found, arrived=now),)
    if isinstance(found, Chunked):
        return [
            QueuedText(identity=identity, tokens=window, arrived=now, window=Window(found, number))
            for number, window in enumerate(found.windows)
        ]
    raise RuntimeError("a text that cannot run was queued. This is a bug.")
