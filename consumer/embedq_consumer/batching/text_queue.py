"""From inputs to queued texts: equal ones join, the first of them is tokenized and waits for a micro-batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from embedq_consumer.batching.batcher import Batcher
from embedq_consumer.batching.head_start import HeadStart
from embedq_consumer.batching.input_errors import EXPIRED_IN_QUEUE, error_of
from embedq_consumer.batching.single_flight import (
    Identity,
    JobInput,
    QueuedText,
    Settled,
    SingleFlight,
    Window,
)
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.batching.tokenizer_pool import CALLS, TokenizerPool
from embedq_consumer.engine import Chunked, Encoder, Found, Text, Tokens
from embedq_consumer.fairness import FairQueue
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_consumer.threads import CLOSE_S
from embedq_shared.topics import LANES

_TEXTS_A_CALL: Final = 256
_CHARACTERS_A_CALL: Final = 256_000
"""Limits of one call of the tokenizer: some 50 ms. The first micro-batch of a large poll need not wait for the last text, nor
a text that comes for more than that, and a tokenizer needs many bytes for each character."""
_TURNS_A_CALL: Final = 8
"""A client's turn at the tokenizer is an eighth of a call, and a text."""

First = tuple[Identity, JobState]
"""The first of equal inputs: its identity, and the job that it is an input of."""
Start = Callable[[Encoder, Text], asyncio.Future[list[Found]]]
"""Tokenizes one text and runs it, at once: what the model is given. A micro-batch of these very tokens is that run."""


class Early(msgspec.Struct):
    """A call of the tokenizer that began before its texts were known to be needed."""

    identities: Sequence[Identity]
    began: float
    found: asyncio.Future[list[Found]]
    runs: bool = False
    """Whether the device runs the text as well."""
    seconds: float = 0.0
    """How long it took, once it is over."""


class TextQueue:
    """Where inputs wait for their vectors: `join`, then `next_call` and `tokenize` as long as there is a call.

    The batch runner resolves what joined here: both are given the same `SingleFlight`.

    Invariants:
        - A text waits for `CALLS` calls of the tokenizer and its client's turn, interactive ones before bulk ones; a call is
          short (`_TEXTS_A_CALL`).
        - No text is tokenized for which nobody waits any more, but for a few early ones.
    """

    def __init__(
        self,
        flights: SingleFlight,
        batcher: Batcher[QueuedText],
        budget: TokenBudget,
        metrics: Metrics,
        head_start: HeadStart | None = None,
        start: Start | None = None,
    ) -> None:
        """`start`: of what may run before it is known to be needed, as far as `head_start` goes; None: nothing may."""
        self._head_start = head_start or HeadStart()
        self._start = start
        self._flights = flights
        self._batcher = batcher
        self._budget = budget
        self._metrics = metrics
        self._tokenizers = TokenizerPool()
        self._waiting = {lane: FairQueue[bytes, First](_CHARACTERS_A_CALL // _TURNS_A_CALL) for lane in LANES}
        self._calls = 0
        self._early: Early | None = None  # of texts that joined, and are not taken by a call yet

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds since when the oldest call of the tokenizer runs; None while none does."""
        return self._tokenizers.busy_since

    @property
    def idle(self) -> bool:
        """Whether no text is on its way to the device, or runs there."""
        return not self._calls and not any(self._waiting.values()) and self._batcher.idle

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the tokenizer's threads. A call that runs longer than this is left behind."""
        self._tokenizers.close(within_s)

    def begin_early(self, inputs: Sequence[JobInput], *, alone: bool = False) -> Early | None:
        """Begin to tokenize these few inputs while the cache is asked for them, if the tokenizer has nothing else to do, and to run a
        lone short one, if it is `alone`: nothing else is under way, on the device neither.

        One that `runs` has joined; if the cache has its vector it is to be withdrawn, and `answered` says so. For others `join` is
        given what this returns.
        """
        if self._calls or not self._head_start.pays:
            return None
        identities = [Identity.of(job, index) for job, index in inputs]
        if any(map(self._flights.waiters, identities)):
            return None
        texts = [one.text for one in identities]
        if not self._head_start.begin(texts):
            return None
        self._calls += 1
        encoder, began = inputs[0][0].encoder, time.monotonic()
        runs = alone and identities[0].lane == "interactive" and self._head_start.may_run(texts)
        if runs and self._start is not None:
            early = Early(identities, began, self._start(encoder, texts[0]), runs=True)
        else:
            early = Early(identities, began, self._tokenizers.start(encoder, texts))

        def ended(found: asyncio.Future[list[Found]]) -> None:
            self._calls -= 1
            early.seconds = time.monotonic() - early.began
            if not found.cancelled():
                found.exception()  # whoever needs the texts raises it

        early.found.add_done_callback(ended)
        if early.runs:
            self._join(inputs, early)
        return early

    def withdraw(self, job: JobState, index: int) -> bool:
        """The cache has the vector of this input, which runs early. Whether the input waited for its own until now."""
        return bool(self._flights.abandon(Identity.of(job, index), lambda waiter: waiter == (job, index)))

    def answered(self, *, lacked: bool) -> None:
        """Whether the cache lacked an input that runs early."""
        if lacked:
            self._head_start.lacked()

    def join(self, inputs: Sequence[JobInput], early: Early | None = None) -> None:
        """Let each input wait for its vector, and those whose text their client has not under way for the tokenizer.

        `early`: what `begin_early` returned, if it was asked for these inputs, of which the cache may have had some.
        """
        self._head_start.lacked()
        self._join(inputs, early)

    def _join(self, inputs: Sequence[JobInput], early: Early | None) -> None:
        shared = 0
        firsts: list[Identity] = []
        for job, index in inputs:
            identity = Identity.of(job, index)
            if self._flights.join(identity, (job, index)):
                firsts.append(identity)
                first = (identity, job)
                self._waiting[identity.lane].put(job.client, first, _cost(first))
            else:
                shared += 1
            if job.copies:
                shared += len(job.copies.get(index, ()))
        self._metrics.deduplicated.inc(shared)
        self._early = early if early is not None and firsts == early.identities else None

    def next_call(self) -> list[First] | None:
        """Texts for `tokenize`, of one lane; None if none wait, or if enough calls are under way: ask again after one."""
        if self._calls >= CALLS:
            return None
        waiting = next((queue for queue in self._waiting.values() if queue), None)
        if waiting is None:
            return None
        texts = [waiting.pop()]
        left = _CHARACTERS_A_CALL - _cost(texts[0])
        while (text := waiting.pop_within(left)) is not None:
            texts.append(text)
            left -= _cost(text)
        self._calls += 1
        return texts

    async def tokenize(self, call: Sequence[First]) -> list[Settled]:
        """Queue these texts for a micro-batch. Returned is what is already settled: the inputs of texts that cannot run."""
        try:
            settled, texts = self._unexpired(call)
            if texts:
                settled += await self._tokenize(texts)
        finally:
            self._calls -= 1
        return settled

    def _unexpired(self, call: Sequence[First]) -> tuple[list[Settled], list[First]]:
        """What the jobs that expired until now get, and the texts for which others wait."""
        now_ms = time.time() * 1000
        settled: list[Settled] = []
        texts: list[First] = []
        for first in call:
            identity, job = first
            if job.expired(
                now_ms
            ):  # else it waits itself, and the others are asked when the micro-batch begins
                waiters, expired = self._flights.unexpired(identity, now_ms)
                settled += [(waiter, index, EXPIRED_IN_QUEUE) for waiter, index in expired]
                if not waiters:
                    continue
            texts.append(first)
        return settled, texts

    async def _tokenize(self, first: Sequence[First]) -> list[Settled]:
        encoder = first[0][0].encoder  # one for all: a swap waits until nothing is in flight
        early, self._early = self._early, None
        if early is not None and [identity for identity, _ in first] == early.identities:
            found = await early.found
            now, took = time.monotonic(), early.seconds
        else:
            started = time.monotonic()
            found = await self._tokenizers.run(encoder, [identity.text for identity, _ in first])
            now = time.monotonic()
            took = now - started
        self._metrics.tokenize.observe(took)
        queued: list[QueuedText] = []
        errors: list[Settled] = []
        for (identity, job), text in zip(first, found, strict=True):
            job.tokenize_s = took
            error = error_of(text, job.request, self._budget.longest)
            if error is not None:
                waiters = self._flights.resolve(identity)
                errors += [(waiter, index, error(waiter.request, index)) for waiter, index in waiters]
            else:
                queued += _queued(identity, job, text, now)
        others = self._calls > 1 or any(self._waiting.values())
        self._batcher.put(queued, followed=others)
        return errors


def _cost(entry: First) -> int:
    """A text's characters, but at least its place in a call."""
    text = entry[0].text
    return max(len(text.text) + len(text.prompt), _CHARACTERS_A_CALL // _TEXTS_A_CALL)


def _queued(identity: Identity, job: JobState, found: Found, now: float) -> Iterable[QueuedText]:
    """One text, or its windows."""
    client, number = job.client, job.number
    if isinstance(found, Tokens):
        return (QueuedText(identity=identity, tokens=found, arrived=now, client=client, job=number),)
    if isinstance(found, Chunked):
        return [
            QueuedText(
                identity=identity,
                tokens=window,
                arrived=now,
                window=Window(found, at),
                client=client,
                job=number,
            )
            for at, window in enumerate(found.windows)
        ]
    raise RuntimeError("a text that cannot run was queued. This is a bug.")
