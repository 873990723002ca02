"""How many tokens a micro-batch and a single text may have: found by trial before a model serves, lowered if memory runs out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.batching.batcher import SHORT, Batcher
from embedq_consumer.engine import Encoder, Footprint, Memory, OutOfMemory, Tokens
from embedq_consumer.telemetry.metrics import Metrics

log = structlog.get_logger()

LEAST: Final = 256
"""Tokens. A device that cannot run this many at once cannot serve the model."""
_SHORT: Final = 16
"""Tokens of the short texts that are tried: many sequences cost memory of their own."""
_LOWEST_SHARE: Final = 8
"""A budget is lowered to an eighth of what was found and no further: another process may have taken the memory."""


class Budget(msgspec.Struct, frozen=True):
    """What fits into a device's memory in addition to a model: micro-batches of `tokens`, and a text of `longest` alone."""

    tokens: int
    longest: int


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """All that the result of a trial depends on, but for the memory that is free: under equal ones it finds the same. Compared as a whole."""

    footprint: Footprint
    tokens: int
    """What is wished for in a micro-batch."""
    max_items: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial has found."""

    budget: Budget
    conditions: Conditions | None = None
    """None where they are not known, or the device has no memory of its own: then it is no other model's."""
    takes: int = 0
    """Bytes that it took beside the weights, at most."""

    def is_for(self, conditions: Conditions, free: int) -> bool:
        """Whether a trial under these conditions would find the same, with so many bytes free: all that is wished for fits, and what
        that takes is there."""
        wished = Budget(conditions.tokens, conditions.footprint.max_tokens)
        return self.conditions == conditions and self.budget == wished and self.takes <= free


async def find_budget(
    encoder: Encoder,
    run: Callable[[Sequence[Tokens]], Awaitable[object]],
    ids: npt.NDArray[np.int32],
    *,
    tokens: int,
    max_items: int,
) -> Measured:
    """The largest budget up to `tokens` with which the device does not run out of memory, found by trial.

    `run` computes one micro-batch of `encoder`; `ids` is a text as long as the model takes. Where memory runs out, the
    longest text loses a quarter, and the micro-batch half of its tokens. A CPU has no memory of its own whose limit a
    trial could find: there one full micro-batch runs, to warm up.

    Raises:
        OutOfMemory: not even `LEAST` tokens fit.
    """
    longest, wished = len(ids), tokens
    before = encoder.memory()
    if before is not None:
        while not await _fits(run, [Tokens(ids[:longest], whole=True)], longest):
            longest = max(LEAST, longest * 3 // 4)
    while not await _all_fit(run, ids[: min(tokens, longest)], tokens, max_items):
        tokens = max(LEAST, tokens // 2)
    budget = Budget(tokens, encoder.max_tokens if longest == len(ids) else longest)
    after = encoder.memory()
    log.info(
        "batch_budget",
        tokens=budget.tokens,
        longest_text=budget.longest,
        free_bytes=before and before.free,
        peak_bytes=after and after.peak,
    )
    if before is None or after is None:
        return Measured(budget=budget)
    conditions = conditions_of(encoder, tokens=wished, max_items=max_items)
    return Measured(budget=budget, conditions=conditions, takes=_taken(before, after))


def conditions_of(encoder: Encoder, *, tokens: int, max_items: int) -> Conditions | None:
    """Of a trial of this model; None where the engine does not say what its memory depends on."""
    if encoder.footprint is None:
        return None
    return Conditions(footprint=encoder.footprint, tokens=tokens, max_items=max_items)


def _taken(before: Memory, after: Memory) -> int:
    """Bytes that runs took in between, at most: what was in use at the height of it, and what the device has less of since, where
    what was kept without being used counts as taken. The one leaves out what lies between tensors, the other what was given back."""
    kept = before.free - (before.total - before.used)
    return max(0, after.peak - (before.reserved - kept), after.used - before.used + kept)


async def part_fits(
    run: Callable[[Sequence[Tokens]], Awaitable[object]],
    ids: npt.NDArray[np.int32],
    budget: Budget,
    max_items: int,
) -> bool:
    """Whether micro-batches run of the size that bulk's have beside interactive texts: they delay others no more than those do. They warm up
    a model whose budget is known."""
    tokens = max(LEAST, budget.tokens // SHORT)
    try:
        return await _all_fit(run, ids[:tokens], tokens, max(1, max_items // SHORT))
    except OutOfMemory:
        return False


async def _all_fit(
    run: Callable[[Sequence[Tokens]], Awaitable[object]],
    ids: npt.NDArray[np.int32],
    tokens: int,
    max_items: int,
) -> bool:
    """Whether full micro-batches fit: one of the longest texts that it can hold, and one of short texts."""
    for length in (len(ids), min(len(ids), _SHORT)):
        count = max(1, min(tokens // max(1, length), max_items))
        if not await _fits(run, [Tokens(ids[:length], whole=True)] * count, tokens):
            return False
    return True


async def _fits(
    run: Callable[[Sequence[Tokens]], Awaitable[object]], batch: Sequence[Tokens], tokens: int
) -> bool:
    try:
        await run(batch)
    except OutOfMemory:
        if tokens <= LEAST:
            raise
        return False
    return True


class TokenBudget:
    """The budget in force: that of the model that serves, lowered while it serves whenever memory runs out.

    `tell` is called with the facts that the health page shows.
    """

    def __init__(
        self, batcher: Batcher[Any], metrics: Metrics, tell: Callable[[Mapping[str, object]], None]
    ) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._tell = tell
        self._found = Budget(batcher.max_tokens, batcher.max_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that fits, special tokens and prompt included."""
        return self._found.longest

    def serve(self, budget: Budget) -> None:
        """Another model serves from now on."""
        self._found = budget
        self._resize(budget.tokens)

    def ran_out(self, tokens: int) -> None:
        """A micro-batch of this many tokens did not fit after all."""
        now = self._batcher.max_tokens
        lower = min(now, max(self._found.tokens // _LOWEST_SHARE, tokens // 2))
        if lower < now:
            self._resize(lower)
            log.warning("batch_budget_lowered", tokens=lower)

    def _resize(self, tokens: int) -> None:
        self._batcher.resize(tokens)
        self._metrics.batch_budget.set(tokens)
        self._tell({"max_batch_tokens": tokens, "max_text_tokens": self._found.longest})
