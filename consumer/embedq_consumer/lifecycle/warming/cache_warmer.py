"""The most used texts run through a model that is about to serve, beside the one that serves, and their vectors go into the cache."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from embedq_consumer.cache import CachedVector, cache_key
from embedq_consumer.engine import Encoder, OutOfMemory, Text, Tokens
from embedq_consumer.engine.text.prompts import prompt_for
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.model_slot import Computed, ModelSlot
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.lifecycle.warming.most_used import MostUsed, Wanted, wanted_of
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.grouping import batched_by
from embedq_shared.messages import Job
from embedq_shared.vectors import cut_and_normalize, quantize

__all__ = ["CacheWarmer", "WarmOptions", "longest_wait"]

log = structlog.get_logger()

_AT_ONCE: Final = 128
"""Texts that are looked up, and tokenized, together: making their keys takes a millisecond on the event loop."""
_PART: Final = 16
"""A micro-batch of these is a sixteenth of a full one: so much longer an interactive text waits at most."""
_FEW: Final = 64
"""Texts of a micro-batch at most: making their vectors takes a millisecond on the event loop."""
_SHARE: Final = 10
"""While the device is never idle, warming takes an eleventh of its time."""

Run = Callable[[Sequence[Tokens]], Awaitable[Computed]]
"""Vectors of one micro-batch of the new model, float32 (texts, hidden_size), and the seconds that they took."""


class WarmOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How much is kept in mind, and how long warming may take."""

    texts: int
    seconds: float


class Cache(Protocol):
    """Remembers vectors as well as it can. Its methods never raise."""

    async def get_many(self, keys: Sequence[bytes], *, counted: bool = True) -> list[CachedVector | None]:
        """The entry of each key, in order, or None."""

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> int:
        """Keep these entries; how many were taken."""


class _Entry(msgspec.Struct, frozen=True):
    """One vector to keep, of a text that may be kept in several forms."""

    key: bytes
    dimensions: int
    wanted: Wanted


_Texts = list[tuple[Text, list[_Entry]]]


class CacheWarmer:
    """Keeps the most used texts of the interactive lane in mind, and warms the cache with them. They are never written anywhere.

    Invariants:
        - An entry is made by the model that its key names. What is in the cache already is not computed again.
        - A micro-batch runs when no other is under way; or when the device is never idle, for an eleventh of the time. Each is a
          sixteenth of a full one, or one text.
        - It ends after `seconds`, and it never decides about a model, but for a tokenizer that hangs and a lost device.
    """

    def __init__(
        self,
        options: WarmOptions,
        cache: Cache,
        slot: ModelSlot,
        reporter: StatusReporter,
        metrics: Metrics,
    ) -> None:
        self._options = options
        self._cache = cache
        self._slot = slot
        self._reporter = reporter
        self._metrics = metrics
        self._used = MostUsed(options.texts)

    def note(self, job: Job) -> None:
        """An interactive job asks for its texts."""
        now = time.monotonic()
        for wanted in wanted_of(job):
            self._used.use(wanted, now)

    async def warm(self, encoder: Encoder, run: Run, tokens: int) -> None:
        """Compute what is used most with this model, as far as time allows. `tokens` is the budget of a full micro-batch.

        Raises:
            ModelRejected: its tokenizer hangs.
            DeviceLost, Superseded: as `run` does.
        """
        begin = time.monotonic()
        wanted = self._used.top()
        if not wanted:
            return
        warming = _Warming(begin + self._options.seconds, tokens)
        await self._reporter.show_warmed(0)
        ready = 0
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            if not warming.goes_on(time.monotonic()):
                self._count("left", len(some))
                continue
            ready += await self._warm(encoder, run, some, warming)
            await self._reporter.show_warmed(ready)
        log.info(
            "cache_warmed",
            model_version=encoder.model_version,
            texts=len(wanted),
            ready=ready,
            seconds=round(time.monotonic() - begin, 3),
        )

    async def _warm(self, encoder: Encoder, run: Run, some: Sequence[Wanted], warming: _Warming) -> int:
        """How many of these the cache has in the end."""
        entries = [entry for wanted in some if (entry := _entry(wanted, encoder)) is not None]
        found = await self._cache.get_many([entry.key for entry in entries], counted=False)
        missing = [entry for entry, held in zip(entries, found, strict=True) if held is None]
        ready = len(entries) - len(missing)
        self._count("found", ready)
        self._count("failed", len(some) - len(entries))
        texts = _by_text(missing, encoder)
        tokenized = await self._tokenize(encoder, [text for text, _ in texts])
        runnable = [(text, each) for text, each in zip(texts, tokenized, strict=True) if each is not None]
        self._count("failed", _entries_of(texts) - _entries_of([text for text, _ in runnable]))
        for batch in batched_by(runnable, lambda each: each[1].cost, warming.tokens, most=_FEW):
            count = _entries_of([text for text, _ in batch])
            if warming.goes_on(time.monotonic()):
                await self._slot.idle(longest_wait(warming.last_s))
            if not warming.goes_on(time.monotonic()):
                self._count("left", count)
                continue
            try:
                vectors, warming.last_s = await run([each for _, each in batch])
            except (OutOfMemory, ModelRejected) as error:  # the trial is over, and this one stood it
                log.warning("cache_not_warmed", texts=count, reason=type(error).__name__)
                warming.off = isinstance(error, OutOfMemory)
                self._count("failed", count)
                continue
            made = list(_made(batch, vectors))
            kept = await self._cache.put_many(made)
            warming.off = bool(made) and not kept  # the cache is away
            self._count("computed", kept)
            self._count("failed", count - kept)
            ready += kept
        return ready

    async def _tokenize(self, encoder: Encoder, texts: Sequence[Text]) -> list[Tokens | None]:
        """Tokens of each text, None where it has none that may run."""
        try:
            found = await self._slot.apart("tokenize", partial(encoder.tokenize, texts))
        except ModelRejected:
            raise
        except Exception as error:  # noqa: BLE001  # as in the queue: the texts' fault, not the model's
            log.warning("cache_not_warmed", texts=len(texts), reason=type(error).__name__)
            return [None] * len(texts)
        return [each if isinstance(each, Tokens) else None for each in found]

    def _count(self, outcome: str, texts: int) -> None:
        if texts:
            self._metrics.cache_warmed.labels(outcome).inc(texts)


class _Warming:
    """One run of it: until when it goes on, and what its last micro-batch took, in seconds."""

    def __init__(self, until: float, tokens: int) -> None:
        self.tokens = max(1, tokens // _PART)
        self.last_s = 0.0
        self.off = False
        """Nothing more is of any use."""
        self._until = until

    def goes_on(self, now: float) -> bool:
        return not self.off and now < self._until


def longest_wait(last_s: float) -> float:
    """Seconds to wait at most for an idle device before the next micro-batch, if the last one took so long."""
    return _SHARE * last_s


def _entry(wanted: Wanted, encoder: Encoder) -> _Entry | None:
    """Where its vector belongs; None if this model gives none like it."""
    dimensions = encoder.hidden_size if wanted.dimensions is None else wanted.dimensions
    if dimensions > encoder.hidden_size or (wanted.dtype == "binary" and dimensions % 8):
        return None
    key = cache_key(encoder.model_version, _text(wanted, encoder), dimensions, wanted.dtype)
    return _Entry(key, dimensions, wanted)


def _text(wanted: Wanted, encoder: Encoder) -> Text:
    asked = Job(input=wanted.text, input_type=wanted.input_type, instruction=wanted.instruction)
    return Text(wanted.text, prompt_for(asked, encoder), wanted.truncate)


def _by_text(entries: Sequence[_Entry], encoder: Encoder) -> _Texts:
    """The texts to compute, each once, whatever its forms."""
    found: dict[Text, list[_Entry]] = {}
    for entry in entries:
        found.setdefault(_text(entry.wanted, encoder), []).append(entry)
    return list(found.items())


def _entries_of(texts: _Texts) -> int:
    return sum(len(entries) for _, entries in texts)


def _made(
    batch: Sequence[tuple[tuple[Text, list[_Entry]], Tokens]], vectors: npt.NDArray[np.float32]
) -> Iterator[tuple[bytes, CachedVector]]:
    """What the cache is to keep; nothing of a vector that is not finite."""
    for ((text, entries), tokens), vector in zip(batch, vectors, strict=True):
        if not math.isfinite(float(vector.sum())):
            continue
        cut = text.truncate if tokens.truncated and text.truncate != "error" else ""
        for entry in entries:
            raw, scale = quantize(cut_and_normalize(vector, entry.dimensions), entry.wanted.dtype)
            yield (
                entry.key,
                CachedVector(tokens=len(tokens.ids), truncated=cut, scale=scale, vector=raw),
            )
