"""The path of a job: admitted, looked up, tokenized, queued for a micro-batch, computed, published, finished."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec
import structlog

from embedq_consumer.batching.batcher import Batcher
from embedq_consumer.batching.single_flight import Identity, Item, SingleFlight, Waiter, Window
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.batching.windows import Vectors
from embedq_consumer.cache.vector_cache import CachedVector, VectorCache, cache_key
from embedq_consumer.delivery import postprocess as outcomes
from embedq_consumer.delivery.publisher import Outgoing, Publisher
from embedq_consumer.delivery.result_records import Reply, ResultEncoder
from embedq_consumer.engine import Chunked, DeviceLost, OutOfMemory, Tokens
from embedq_consumer.intake.admission import AdmissionPolicy, Rejection, UnknownAddress
from embedq_consumer.intake.jobs import InputVector, JobState, Outcome
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import held_bytes
from embedq_consumer.lifecycle.model_slot import ModelSlot
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import Envelope
from embedq_shared.headers import JobHeaders
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import LANES, Lane
from embedq_shared.weighted_semaphore import WeightedSemaphore

log = structlog.get_logger()

_TEXTS_A_CALL: Final = 256
_CHARACTERS_A_CALL: Final = 1_000_000
"""What is tokenized in one call: the first micro-batch of a large poll need not wait for the last text, and a
tokenizer needs many bytes for each character."""
_JOBS_A_CALL: Final = 64

Returned = TypeVar("Returned")
Finish = Callable[[Record], None]


class Pipeline:
    """Takes polled records and answers each of them, whatever it holds.

    Every record given to `take` is handed to `finish` exactly once, and only after the broker has its answer. Work goes
    on in tasks of `tasks`, so a failure here ends the process, and the records are read again by the next one.
    """

    def __init__(
        self,
        *,
        rules: AdmissionPolicy,
        answers: ResultEncoder,
        slot: ModelSlot,
        cache: VectorCache,
        batcher: Batcher[Item],
        publisher: Publisher,
        metrics: Metrics,
        tasks: asyncio.TaskGroup,
        finish: Finish,
        room: WeightedSemaphore,
        budget: TokenBudget,
    ) -> None:
        self._rules = rules
        self._answers = answers
        self._slot = slot
        self._cache = cache
        self._batcher = batcher
        self._publisher = publisher
        self._metrics = metrics
        self._tasks = tasks
        self._finish = finish
        self._room = room
        self._budget = budget
        self._flights = SingleFlight()
        self._queue_seconds = {lane: metrics.queue.labels(lane) for lane in LANES}
        self._job_seconds = {lane: metrics.job.labels(lane) for lane in LANES}
        # Apart, since an answer that waited for its turn behind texts to be tokenized would hold its place in flight.
        self._tokenizing = TokenizerPool()
        self._answering = ThreadPoolExecutor(max_workers=2, thread_name_prefix="answer")

    def close(self) -> None:
        """End the threads."""
        self._tokenizing.close()
        self._answering.shutdown(wait=True, cancel_futures=True)

    # -- from the poll to the micro-batch ---------------------------------------------------------------------------

    def take(self, records: Sequence[Record]) -> None:
        """Start on these records. Returns at once."""
        self._spawn(self._take(records), "take")

    async def _take(self, records: Sequence[Record]) -> None:
        jobs, refusals, unknown = self._admit(records)
        if refusals:
            self._spawn(self._refuse(refusals), "refuse")
        if unknown:
            self._spawn(self._ask_for_topics(unknown), "ask_for_topics")
        if jobs:
            await self._start(jobs)

    def _admit(
        self, records: Iterable[Record]
    ) -> tuple[list[JobState], list[tuple[Record, Rejection]], list[tuple[Record, UnknownAddress]]]:
        encoder = self._slot.loaded.encoder
        now_ms = time.time() * 1000
        jobs: list[JobState] = []
        refusals: list[tuple[Record, Rejection]] = []
        unknown: list[tuple[Record, UnknownAddress]] = []
        for record in records:
            match self._rules.admit(record, encoder, now_ms, self._publisher.topics.partitions):
                case JobState() as job:
                    jobs.append(job)
                case Rejection() as refusal:
                    refusals.append((record, refusal))
                case UnknownAddress() as address:
                    unknown.append((record, address))
        return jobs, refusals, unknown

    def take_unreadable(self, record: Record, error: Exception) -> None:
        """Answer for a record that the client could not hand out: by its position, which is all there is."""
        reason = ErrorBody.of(
            "malformed", f"expected a record that the Kafka client can read ({type(error).__name__})"
        )
        refusal = Rejection(
            error=reason, format="json", headers=JobHeaders(), envelope=Envelope(), dead_letter=True
        )
        self._spawn(self._refuse([(record, refusal)]), "refuse")

    async def _ask_for_topics(self, waiting: Sequence[tuple[Record, UnknownAddress]]) -> None:
        """Jobs whose reply topic or partition is not known: it may be new. They alone wait for the broker's answer."""
        await self._publisher.refresh_topics()
        jobs, refusals, unknown = self._admit(record for record, _ in waiting)
        refusals += [(record, self._rules.unknown_address(record, address)) for record, address in unknown]
        await self._refuse(refusals)
        await self._start(jobs)

    async def _refuse(self, refusals: Sequence[tuple[Record, Rejection]]) -> None:
        await self._publish([self._answers.of_refusal(record, refusal) for record, refusal in refusals])

    async def _start(self, jobs: Sequence[JobState]) -> None:
        """Start on jobs, as many at a time as there is room for their results."""
        for portion, weight in _portions(jobs):
            await self._room.acquire(weight)
            await self._look_up(portion)

    async def _look_up(self, jobs: Sequence[JobState]) -> None:
        """Answer from the cache what it holds; the rest is tokenized and waits for a micro-batch."""
        inputs = [(job, index) for job in jobs for index in range(len(job.request.texts))]
        refused = [(job, index, self._rules.check_text(job.request, index)) for job, index in inputs]
        self._settle((job, index, error) for job, index, error in refused if error is not None)
        inputs = [(job, index) for job, index, error in refused if error is None]
        kept = [(job, index) for job, index in inputs if not job.request.late]
        found = await self._cache.get_many([_key(job, index) for job, index in kept])
        hits, misses = [], [(job, index) for job, index in inputs if job.request.late]
        for (job, index), entry in zip(kept, found, strict=True):
            answer = _from_cache(job, entry)
            if answer is None:
                misses.append((job, index))
            else:
                hits.append((job, index, answer))
        self._settle(hits)
        first = [
            (job, index) for job, index in misses if self._flights.join(Identity.of(job, index), (job, index))
        ]
        self._metrics.deduplicated.inc(len(misses) - len(first))
        for lane in LANES:
            for call in _calls([(job, index) for job, index in first if job.record.lane == lane]):
                await self._tokenize(lane, call)

    async def _tokenize(self, lane: Lane, inputs: Sequence[tuple[JobState, int]]) -> None:
        encoder = inputs[0][0].encoder  # one for all: a swap waits until nothing is in flight
        texts = [job.request.text(index) for job, index in inputs]
        started = time.monotonic()
        tokens = await self._tokenizing.run(lane, encoder, texts)
        now = time.monotonic()
        self._metrics.tokenize.observe(now - started)
        items: list[Item] = []
        errors: list[tuple[JobState, int, ErrorBody]] = []
        for (job, index), found in zip(inputs, tokens, strict=True):
            job.tokenize_s = now - started
            identity = Identity.of(job, index)
            refusal = outcomes.refusal_of(found, job.request, self._budget.longest)
            if refusal is not None:
                waiters = self._flights.land(identity)
                errors += [(other, at, refusal(other.request, at)) for other, at in waiters]
            elif isinstance(found, Chunked):
                items += [
                    Item(identity, window, now, Window(found, number))
                    for number, window in enumerate(found.windows)
                ]
            elif isinstance(found, Tokens):
                items.append(Item(identity, found, now))
        self._batcher.put(items)
        self._settle(errors)

    # -- the micro-batch --------------------------------------------------------------------------------------------

    async def run_batch(self, batch: Sequence[Item]) -> None:
        """Compute one micro-batch and send its outcomes on their way."""
        now_ms, now = time.time() * 1000, time.monotonic()
        live: list[Item] = []
        waiters: list[Waiter] = []
        for item in batch:
            waiting = self._flights.waiting(item.identity)
            if any(job.expired(now_ms) for job, _ in waiting):
                expired = self._flights.leave(item.identity, lambda waiter: waiter[0].expired(now_ms))
                self._settle((job, index, outcomes.EXPIRED_WAITING) for job, index in expired)
                waiting = self._flights.waiting(item.identity)
            if waiting:
                live.append(item)
                waiters += waiting
        if live:
            computing = self._tasks.create_task(self._compute(live), name="compute")
            await asyncio.sleep(0)  # on its way to the device before anything is counted
            self._note_queue(waiters, now)
            await computing

    def _note_queue(self, waiters: Iterable[Waiter], now: float) -> None:
        """How long jobs waited for their first micro-batch, which began `now`."""
        for job, _ in waiters:
            if job.queue_s is None:
                job.queue_s = now - job.record.polled_at
                self._queue_seconds[job.record.lane].observe(job.queue_s)

    async def _compute(self, batch: Sequence[Item]) -> None:
        """Run it; if it fails, in halves, until the text that fails is alone."""
        try:
            vectors, seconds = await self._slot.encode(
                batch[0].identity.encoder, [item.text for item in batch]
            )
        except DeviceLost:
            raise  # no text's fault, and the next one would fail too: the next process repeats what is unfinished
        except Exception as error:  # noqa: BLE001
            # Whatever else the model raises is the input's fault until it has failed alone.
            log.warning("batch_failed", items=len(batch), reason=type(error).__name__)
            if isinstance(error, OutOfMemory) and len(batch) > 1:
                self._budget.ran_out(sum(item.cost for item in batch))
            if len(batch) == 1:
                waiters = self._flights.land(batch[0].identity)
                self._settle((job, index, outcomes.failed(job, index)) for job, index in waiters)
                return
            self._metrics.batch_splits.inc()
            middle = len(batch) // 2
            await self._compute(batch[:middle])
            await self._compute(batch[middle:])
            return
        self._metrics.compute.observe(seconds)
        self._metrics.tokens.inc(sum(item.cost for item in batch))
        waiting = [job for item in batch for job, _ in self._flights.waiting(item.identity)]
        for job in {id(job): job for job in waiting}.values():
            job.compute_s = (job.compute_s or 0.0) + seconds
        if any(item.window is not None for item in batch):
            batch, vectors = self._land_windows(batch, vectors)
        landed = [(item, self._flights.land(item.identity)) for item in batch]
        if landed:
            self._spawn(self._conclude(outcomes.outcomes_of, landed, vectors), "finish_batch")

    def _land_windows(self, batch: Sequence[Item], vectors: Vectors) -> tuple[list[Item], Vectors]:
        """Gather the windows of chunked texts and finish the texts that are whole; the other texts, with their vectors."""
        whole, plain, rows = [], [], []
        begin = 0
        for item in batch:
            end = begin + item.text.rows
            if item.window is None:
                plain.append(item)
                rows.append(begin)
            elif (found := self._flights.gather(item, vectors[begin:end])) is not None:
                whole.append((item, found, self._flights.land(item.identity)))
            begin = end
        if whole:
            self._spawn(self._conclude(outcomes.chunked_outcomes_of, whole), "finish_chunked")
        return plain, vectors[rows]

    async def _conclude(self, work: Callable[..., list[tuple[JobState, int, Outcome]]], *args: Any) -> None:
        self._settle(await _run(self._answering, work, *args))

    # -- the answer -------------------------------------------------------------------------------------------------

    def _settle(self, found: Iterable[tuple[JobState, int, Outcome]]) -> None:
        """Note outcomes; jobs that have all of theirs are answered."""
        complete = [job for job, index, outcome in found if job.settle(index, outcome)]
        for start in range(0, len(complete), _JOBS_A_CALL):
            self._spawn(self._complete(complete[start : start + _JOBS_A_CALL]), "complete")

    async def _complete(self, jobs: Sequence[JobState]) -> None:
        if fresh := [entry for job in jobs for entry in _cacheable(job)]:
            self._spawn(
                self._cache.put_many(fresh), "cache_write"
            )  # beside the publishing, which it must not delay
        replies = await _run(self._answering, lambda: [self._answers.of_job(job) for job in jobs])
        await self._publish(replies)
        self._room.release(sum(map(_weight, jobs)))
        self._count(jobs)

    async def _publish(self, replies: Sequence[Reply]) -> None:
        """Send answers, and what could not be answered fully to the dead letters; then the records are finished."""
        started = time.monotonic()
        outgoing = [record for reply in replies for record in reply.outgoing]
        refused = iter(await self._publisher.publish(outgoing))
        undeliverable = []
        for reply in replies:
            reasons = [reason for reason in (next(refused) for _ in reply.outgoing) if reason is not None]
            if reasons:
                undeliverable.append(self._answers.of_undeliverable(reply, _undeliverable(reasons[0])))
        again = {reply.record.ticket for reply in undeliverable}
        answered = [reply for reply in replies if reply.record.ticket not in again]
        if undeliverable:
            log.warning("results_undeliverable", jobs=len(undeliverable))
            again_refused = await self._publisher.publish(
                [record for reply in undeliverable for record in reply.outgoing]
            )
            undeliverable = [
                reply if reason is None else msgspec.structs.replace(reply, outgoing=[])
                for reply, reason in zip(undeliverable, again_refused, strict=True)
            ]
        await self._bury([reply for reply in (*answered, *undeliverable) if reply.dead_letter is not None])
        self._metrics.publish.observe(time.monotonic() - started)
        now = time.monotonic()
        done = [*answered, *undeliverable]
        for (lane, status), count in Counter((reply.record.lane, reply.status) for reply in done).items():
            self._metrics.jobs.labels(lane, status).inc(count)
        for reply in done:
            for error in reply.errors:
                self._metrics.errors.labels(error.code).inc()
            self._job_seconds[reply.record.lane].observe(now - reply.record.polled_at)
            self._finish(reply.record)

    async def _bury(self, replies: Sequence[Reply]) -> None:
        """Copy records to the dead letters; one that does not fit there goes by its position alone."""
        letters: list[Outgoing] = []
        count = self._publisher.topics.partitions(self._rules.topics.dead_letters) or 0
        for reply in replies:
            assert reply.dead_letter is not None
            origin = reply.record.ticket.partition.partition
            letters.append(
                self._answers.dead_letter(
                    reply.record,
                    reply.dead_letter,
                    partition=origin if origin < count else None,
                    result_sent=bool(reply.outgoing),
                )
            )
            self._metrics.dead_letters.labels(reply.dead_letter.code).inc()
        refused = await self._publisher.publish(letters) if letters else []
        positions = [
            msgspec.structs.replace(
                letter, value=None, key=reply.record.name.encode(), headers=letter.headers[-_LETTER_HEADERS:]
            )
            for letter, reply, reason in zip(letters, replies, refused, strict=True)
            if reason is not None
        ]
        if positions:
            await self._publisher.publish(positions)

    def _count(self, jobs: Iterable[JobState]) -> None:
        answered: Counter[Lane] = Counter()
        cut = 0
        for job in jobs:
            for outcome in job.outcomes:
                answered[job.record.lane] += not isinstance(outcome, ErrorBody)
                cut += isinstance(outcome, InputVector) and outcome.truncated is not None
        for lane, count in answered.items():
            self._metrics.inputs.labels(lane).inc(count)
        self._metrics.truncated.inc(cut)

    # -- plumbing ---------------------------------------------------------------------------------------------------

    def _spawn(self, work: Any, name: str) -> None:
        self._tasks.create_task(work, name=name)


_LETTER_HEADERS: Final = 19
"""What `ResultEncoder.dead_letter` adds behind the record's own headers."""


async def _run(pool: ThreadPoolExecutor, work: Callable[..., Returned], *args: Any) -> Returned:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


_PORTION_BYTES: Final = 16 * 1024 * 1024
"""Results that are started on at once, of those that there is room for."""


def _weight(job: JobState) -> int:
    """Bytes that a job's results may take."""
    return held_bytes(job.request, job.encoder.hidden_size)


def _portions(jobs: Sequence[JobState]) -> Iterator[tuple[list[JobState], int]]:
    """Jobs in order, with the weight of each portion."""
    portion: list[JobState] = []
    total = 0
    for job in jobs:
        weight = _weight(job)
        if portion and total + weight > _PORTION_BYTES:
            yield portion, total
            portion, total = [], 0
        portion.append(job)
        total += weight
    if portion:
        yield portion, total


def _calls(inputs: Sequence[tuple[JobState, int]]) -> Iterator[list[tuple[JobState, int]]]:
    """Inputs in order, in portions for one call of the tokenizer."""
    call: list[tuple[JobState, int]] = []
    total = 0
    for job, index in inputs:
        characters = len(job.request.texts[index]) + len(job.request.prompt)
        if call and (len(call) == _TEXTS_A_CALL or total + characters > _CHARACTERS_A_CALL):
            yield call
            call, total = [], 0
        call.append((job, index))
        total += characters
    if call:
        yield call


def _undeliverable(reason: BaseException) -> ErrorBody:
    if "TooLarge" in type(reason).__name__:
        return ErrorBody.of(
            "result_too_large", "expected a result that the reply topic takes; its broker refused the size"
        )
    return ErrorBody.of(
        "invalid_header",
        "header `reply-topic`: expected a topic that takes results from this service",
        "reply-topic",
    )


def _key(job: JobState, index: int) -> bytes:
    request = job.request
    return cache_key(job.encoder.model_version, request.text(index), request.dimensions, request.dtype)


def _from_cache(job: JobState, entry: CachedVector | None) -> InputVector | None:
    """The cached answer, unless its text was cut in another way than this job wants."""
    if entry is None or entry.truncated not in ("", job.request.truncate):
        return None
    return InputVector(entry.vector, entry.tokens, entry.truncated or None, entry.scale, cached=True)


def _cacheable(job: JobState) -> Iterable[tuple[bytes, CachedVector]]:
    for index, outcome in enumerate(job.outcomes):
        if isinstance(outcome, InputVector) and not outcome.cached:
            entry = CachedVector(outcome.tokens, outcome.truncated or "", outcome.scale, outcome.vector)
            yield _key(job, index), entry
