"""Results leave: jobs become records, records are published, and only then is the job's own record finished."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Final, Protocol, TypeVar, TypeVarTuple

import msgspec
import structlog

from embedq_consumer.delivery.broker_errors import meaning_of, name_of
from embedq_consumer.delivery.destination import Parcel, Settled, Undelivered, Urgent
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import Reply, ResultEncoder
from embedq_consumer.fairness import BulkTurns, InteractiveTraffic, Turns, TurnsByPlace
from embedq_consumer.intake.admission import DeletedRow, Rejection
from embedq_consumer.intake.jobs import InputVector, JobState
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import cost_of, datum_bytes
from embedq_consumer.retries import HEALS
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.headers import JobHeaders
from embedq_shared.kafka import TOO_LARGE
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import LANES, Lane

log = structlog.get_logger()

_LARGE_BYTES: Final = 1024 * 1024
"""Results that take some 10 ms to encode, as long as a micro-batch."""
_LARGE_ON_THE_WAY: Final = 2
"""Large results that are with the producers at once for one place, so that what comes behind them there waits for these and
not for a client's whole flood: one is encoded while one is sent. A large result is some 10 MB, a tenth of a second."""
_THREADS: Final = 2
"""While a large result is encoded, the small ones after it go on."""
FEW_INPUTS: Final = 2
"""The outcomes of so few inputs are made on the event loop: some 30 µs each, where waking a thread and being woken by it
takes more, and on a busy machine much more."""
_AT_ONCE: Final = 64
"""Jobs that are encoded and published together: the first answers of a large poll need not wait for the last."""
_AT_ONCE_BESIDE: Final = 32
"""Bulk jobs, while interactive ones come."""
_QUICK_INPUTS: Final = 64
_QUICK_BYTES: Final = 256 * 1024
"""Results of no more inputs and bytes are encoded on the event loop, in a millisecond or two: 64 of 384 floats as base64, 32 as decimals.
A thread would hold Python's lock as long, and take what it needs from one core's cache to another's and back."""
_ERROR_S: Final = 5.0
"""For an error in place of a result that could not be delivered: its dead letter tells of it anyway."""

Finish = Callable[[*tuple[Record, ...]], None]
"""Says that records need no more work: from here on their offsets may be committed."""
WhenFirst = Callable[[Record, Callable[[bool], None]], None]
"""Calls the function once a record's answer may go out, after those of earlier records of its key; with False if it never may."""
Args = TypeVarTuple("Args")
Returned = TypeVar("Returned")


class Partitions(Protocol):
    """The topics that the brokers have, as far as is known."""

    def partitions(self, topic: str) -> int | None:
        """How many partitions a topic had when last seen, None for an unknown topic."""


class Sink(Protocol):
    """What takes records to the brokers."""

    @property
    def topics(self) -> Partitions:
        """The topics when last seen."""

    async def refresh_topics(self) -> None:
        """Look for topics that were made since."""

    def send(self, parcels: Sequence[Parcel]) -> None:
        """Send records; what each has for `settled` is called once, later, with None or with why the brokers will not have it.

        Without a time-out that is only an error of the record itself: otherwise it waits. One that is `urgent` waits no longer
        for a place that fails.
        """


class Transactional(Protocol):
    """What publishes answers together with the offsets that they answer."""

    def hold(self, replies: Sequence[Reply], concluded: Callable[[Reply, bool], None]) -> None:
        """Publish these, each once; `concluded` hears of each: False if another replica answers it."""


class DeliveryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long a result may wait for its reply address while that takes nothing."""

    reply_timeout_s: float
    holds_back: Callable[[Record], bool] = lambda record: False
    """Whether others of its partition wait soon, since none behind a record may be committed: then it waits no longer."""


class Deliverer:
    """Answers jobs and rejected records, each by itself: one that waits for its reply address delays no other.

    Invariants:
        - A record is finished exactly once, and only after the brokers have all that is said about it: every part of its
          result, and its copy among the dead letters if there is to be one; or its copy in a retry topic instead of both.
        - A result that the brokers refuse at its reply address, or do not take there within the limits, becomes an
          error on the results topic. If that cannot be delivered either, the dead letter alone tells of the job.
        - A result without a reply address and a dead letter wait for as long as it takes.
        - Large results are encoded one at a time, and at most two of them are with the producers for one place; their clients
          take turns. So small ones never wait for more than these.
        - Answers of ordered records of one key go out in their order, each after the one before it was acknowledged. In a
          transaction all of a partition's do.
    """

    # More than six parameters: what every answer passes, handed in once by `service.py`.
    def __init__(
        self,
        encoder: ResultEncoder,
        sink: Sink,
        finish: Finish,
        metrics: Metrics,
        limits: DeliveryLimits,
        *,
        bulk: Transactional | None = None,
        when_first: WhenFirst = lambda record, go: go(True),
        bulk_turns: BulkTurns | None = None,
    ) -> None:
        """`bulk` takes the answers of the bulk lane, if they are not to go out by themselves."""
        self._bulk_turns = bulk_turns or BulkTurns(InteractiveTraffic())
        self._when_first = when_first
        self._encoder = encoder
        self._sink = sink
        self._finish = finish
        self._metrics = metrics
        self._limits = limits
        self._bulk = bulk
        for tier, code in product(encoder.tiers, HEALS):
            metrics.retries.labels(tier.number, code)  # begins at 0
        # Threads of their own: results must not wait for the tokenizer, nor interactive ones for what bulk has queued.
        self._threads = {
            lane: ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix=f"deliver_{lane}")
            for lane in LANES
        }
        self._encoding = Turns()
        self._on_the_way = TurnsByPlace(_LARGE_ON_THE_WAY)

    def close(self) -> None:
        """End the threads."""
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)

    def partitions(self, topic: str) -> int | None:
        """How many partitions a topic had when last seen, None for an unknown topic."""
        return self._sink.topics.partitions(topic)

    async def refresh_topics(self) -> None:
        """Look for topics that were made since."""
        await self._sink.refresh_topics()

    async def in_thread(self, lane: Lane, work: Callable[[*Args], Returned], *args: *Args) -> Returned:
        """Run work on a lane's results off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[lane], work, *args)

    def takes_turns(self, lane: Lane) -> bool:
        """Whether work on a lane's results comes in small pieces now: bulk's does while interactive work comes."""
        return lane == "bulk" and self._bulk_turns.needed

    def at_once(self, lane: Lane) -> int:
        """How many jobs of a lane are to be delivered together."""
        return _AT_ONCE_BESIDE if self.takes_turns(lane) else _AT_ONCE

    async def turn(self, lane: Lane) -> None:
        """Wait until some milliseconds of work on a lane's results may run on the event loop: bulk's has to wait its turn."""
        if lane == "bulk":
            await self._bulk_turns.turn()

    async def deliver(self, jobs: Sequence[JobState]) -> None:
        """Answer jobs of one lane whose every input has its outcome, and finish their records. A `large` one comes alone."""
        if large(jobs[0]):
            await self._deliver_large(jobs[0])
            return
        lane = jobs[0].record.lane
        if _quick(jobs):
            replies = self._encode(jobs)
        else:
            replies = await self.in_thread(lane, self._encode, jobs)
            await self.turn(lane)
        self._count_inputs(jobs)
        await self._send(replies)

    async def _deliver_large(self, job: JobState) -> None:
        """Encode it when its place has room for it, and keep that until the brokers have it.

        What goes out in a transaction gives its room back at once: there an answer waits for those before it in its
        partition, and one of these might wait for the room.
        """
        client, size, headers = job.client, cost_of(job).result_bytes, job.headers
        place = (headers.reply_topic, headers.reply_partition)
        async with self._on_the_way.turn(place, client, size):
            async with self._encoding.turn(client, size):
                replies = await self.in_thread(job.record.lane, self._encode, [job])
            self._count_inputs([job])
            await self._send(replies)

    async def reject(self, rejections: Sequence[tuple[Record, Rejection]]) -> None:
        """Answer records that are no jobs of ours, and finish them."""
        await self._send([self._encoder.of_rejection(record, rejection) for record, rejection in rejections])

    async def remove(self, deleted: Sequence[tuple[Record, DeletedRow]]) -> None:
        """Answer rows that are gone with tombstones, and finish their records."""
        await self._send([self._encoder.of_deleted(record, row) for record, row in deleted])

    def _encode(self, jobs: Sequence[JobState]) -> list[Reply]:
        return [self._encoder.of_job(job) for job in jobs]

    async def _send(self, replies: Sequence[Reply]) -> None:
        """Send results, those of ordered records each in its turn."""
        at_once = [reply for reply in replies if not reply.record.ordered or self._bulk is not None]
        if len(at_once) == len(replies):
            await self._send_now(replies)
            return
        async with asyncio.TaskGroup() as tasks:
            for reply in replies:
                if reply.record.ordered:
                    tasks.create_task(self._send_in_turn(reply))
            if at_once:
                await self._send_now(at_once)

    async def _send_in_turn(self, reply: Reply) -> None:
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def go(ours: bool) -> None:
            if not turn.done():  # whoever waited may be gone
                turn.set_result(ours)

        self._when_first(reply.record, go)
        if await turn:
            await self._send_now([reply])
        else:  # its partition is another replica's, whose answers may be newer than this one
            self._finish(reply.record)

    async def _send_now(self, replies: Sequence[Reply]) -> None:
        """Send results and finish each record as soon as the brokers have all of its own.

        One that needs more than its result, an error in its place or a dead letter, goes on in a task of its own.
        """
        started = time.monotonic()
        replies = [self._encoder.or_retry(reply) for reply in replies]

        def conclude(done: Sequence[Reply]) -> None:
            self._metrics.publish.observe(time.monotonic() - started)
            self._conclude(done)

        async def conclude_later(reply: Reply, reason: Exception | None) -> None:
            if reason is not None and reply.retry is not None:
                log.warning("retry_refused", tier=reply.retry.tier, reason=name_of(reason))
                reply = reply.retry.otherwise
                reason = await self._sent_whole(reply)
            if reason is not None:
                reply = await self._answer_with_error(reply, reason)
            await self._bury(reply)
            conclude([reply])

        def concluded(reply: Reply, published: bool) -> None:
            if published:
                if reply.dead_letter is not None:
                    self._metrics.dead_letters.labels(reply.dead_letter.code).inc()
                conclude([reply])
            else:
                self._finish(reply.record)

        if self._bulk is not None:
            self._bulk.hold([reply for reply in replies if reply.record.lane == "bulk"], concluded)
            replies = [reply for reply in replies if reply.record.lane != "bulk"]
        batch = _Batch(self._sink, replies, self._timeout_s, self._urgency)
        async with asyncio.TaskGroup() as tasks:
            while settled := await batch.settled():
                done = [reply for reply, reason in settled if reason is None and reply.dead_letter is None]
                if done:
                    conclude(done)
                for reply, reason in settled:
                    if reason is not None or reply.dead_letter is not None:
                        tasks.create_task(conclude_later(reply, reason))

    def _timeout_s(self, reply: Reply) -> float | None:
        """How long its result may wait: without end where the address is ours, and no caller's. A retry has another way out."""
        headers = reply.headers
        addressed = headers.reply_topic is not None or headers.reply_partition is not None
        return self._limits.reply_timeout_s if addressed or reply.retry is not None else None

    def _urgency(self, reply: Reply) -> Urgent:
        """Whether others wait for it soon."""
        return lambda: self._limits.holds_back(reply.record)

    async def _answer_with_error(self, reply: Reply, reason: Exception) -> Reply:
        """Run a job again whose result could not be delivered, or say so on the results topic; the reply that is left."""
        log.warning("result_undeliverable", reason=name_of(reason))
        error = self._encoder.of_undeliverable(reply, undeliverable(reason, reply.headers))
        again = self._encoder.or_retry(error)
        if again.retry is not None and await self._sent_whole(again) is None:
            return again
        outcomes = [await self._sent(record, _ERROR_S) for record in error.outgoing]
        delivered = all(outcome is None for outcome in outcomes)
        return error if delivered else msgspec.structs.replace(error, outgoing=[])

    async def _bury(self, reply: Reply) -> None:
        """Copy a record that needs it to the dead letters, as it is as far as the brokers take that."""
        if reply.dead_letter is None:
            return
        self._metrics.dead_letters.labels(reply.dead_letter.code).inc()
        partition = self._dead_letter_partition(reply)
        whole = msgspec.structs.replace(self._encoder.dead_letter(reply, partition), anywhere=True)
        bare = msgspec.structs.replace(
            self._encoder.bare_dead_letter(reply, partition), anywhere=True, timestamp_ms=None
        )
        # The record's own timestamp may be older than the topic takes; its position and what was wrong are never too large.
        reasons: list[str] = []
        for letter in (whole, msgspec.structs.replace(whole, timestamp_ms=None), bare):
            if (reason := await self._sent(letter, None)) is None:
                return
            reasons.append(name_of(reason))
        log.error("dead_letter_refused", record=reply.record.name, reasons=reasons)

    async def _sent_whole(self, reply: Reply) -> Exception | None:
        """Send all of a reply and wait: None, or why the brokers will not have some of it."""
        timeout_s = self._timeout_s(reply)
        reasons = [await self._sent(record, timeout_s) for record in reply.outgoing]
        return next((reason for reason in reasons if reason is not None), None)

    async def _sent(self, record: Outgoing, timeout_s: float | None) -> Exception | None:
        """Send one record and wait: None, or why the brokers will not have it."""
        outcome: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

        def settle(reason: Exception | None) -> None:
            if not outcome.done():  # whoever waited may be gone
                outcome.set_result(reason)

        self._sink.send([Parcel(record, settle, timeout_s)])
        return await outcome

    def _dead_letter_partition(self, reply: Reply) -> int | None:
        """The partition that the record came from, where the dead-letter topic has it."""
        origin = reply.record.ticket.partition.partition
        return origin if origin < (self.partitions(self._encoder.dead_letters) or 0) else None

    def _conclude(self, replies: Sequence[Reply]) -> None:
        """Count what was answered or is run again, and finish the records: here their offsets become free to be committed."""
        now = time.monotonic()
        answers = [reply for reply in replies if reply.retry is None]
        for (lane, status), count in Counter((reply.record.lane, reply.status) for reply in answers).items():
            self._metrics.jobs.labels(lane, status).inc(count)
        for lane in LANES:
            if seconds := [now - reply.record.polled_at for reply in answers if reply.record.lane == lane]:
                self._metrics.job.observe(lane, seconds)
        for reply in answers:
            for error in reply.errors:
                self._metrics.errors.labels(error.code).inc()
        for reply in replies:
            if reply.retry is not None:
                self._metrics.retries.labels(reply.retry.tier, reply.retry.reason).inc()
        self._finish(*[reply.record for reply in replies])

    def _count_inputs(self, jobs: Sequence[JobState]) -> None:
        """Of jobs of one lane."""
        vectors = cut = 0
        for job in jobs:
            for outcome in job.outcomes:
                if not isinstance(outcome, ErrorBody):
                    vectors += 1
                    cut += isinstance(outcome, InputVector) and outcome.truncated is not None
        self._metrics.inputs.labels(jobs[0].record.lane).inc(vectors)
        self._metrics.truncated.inc(cut)


def large(job: JobState) -> bool:
    """Whether encoding a job's results takes so long that others should not wait for several such ones."""
    several = len(job.outcomes) > 1 or job.request.late
    return several and cost_of(job).result_bytes > _LARGE_BYTES


def _quick(jobs: Sequence[JobState]) -> bool:
    """Whether encoding their results takes a millisecond or two."""
    inputs = size = 0
    for job in jobs:
        inputs += len(job.outcomes)
        size += len(job.outcomes) * datum_bytes(job.request)
    return inputs <= _QUICK_INPUTS and size <= _QUICK_BYTES and not any(job.request.late for job in jobs)


class _Batch:
    """Replies that were sent together. Each is settled with its last record, and with the first error of any."""

    def __init__(
        self,
        sink: Sink,
        replies: Sequence[Reply],
        timeout_s: Callable[[Reply], float | None],
        urgency: Callable[[Reply], Urgent],
    ) -> None:
        self._open = len(replies)
        self._settled: list[tuple[Reply, Exception | None]] = []
        self._woken = asyncio.Event()
        parcels: list[Parcel] = []
        for reply in replies:
            settled = partial(self._note, reply) if len(reply.outgoing) == 1 else self._counting(reply)
            if (limit := timeout_s(reply)) is None:
                parcels += [Parcel(record, settled) for record in reply.outgoing]
            else:
                urgent = urgency(reply)
                parcels += [Parcel(record, settled, limit, urgent) for record in reply.outgoing]
        sink.send(parcels)

    async def settled(self) -> list[tuple[Reply, Exception | None]]:
        """Those that were settled since the last call, and why those failed that did; waits for one. Empty at the end."""
        if not self._open:
            return []
        await self._woken.wait()
        self._woken.clear()
        settled, self._settled = self._settled, []
        self._open -= len(settled)
        return settled

    def _note(self, reply: Reply, reason: Exception | None) -> None:
        self._settled.append((reply, reason))
        self._woken.set()

    def _counting(self, reply: Reply) -> Settled:
        """For each of a reply's several records."""
        left = len(reply.outgoing)
        failure: Exception | None = None

        def settled(reason: Exception | None) -> None:
            nonlocal left, failure
            left -= 1
            failure = failure or reason
            if not left:
                self._note(reply, failure)

        return settled


def undeliverable(reason: Exception, headers: JobHeaders) -> ErrorBody:
    """The error of a job whose result cannot be delivered, with what an operator should know of the address."""
    if isinstance(reason, TOO_LARGE):
        return ErrorBody.of(
            "result_too_large", "expected a result that the reply topic takes; its broker refused the size"
        )
    header = headers.address_header
    named = "the results topic" if header is None else f"header `{header}`"
    if isinstance(reason, Undelivered):
        return ErrorBody.of(
            "undeliverable",
            f"{named}: expected a topic and partition that take results; {reason.args[0]}",
            header,
        )
    return ErrorBody.of(
        "invalid_header",
        f"{named}: expected a topic that takes results from this service; the brokers "
        f"{meaning_of(reason).text} ({name_of(reason)})",
        header,
    )
