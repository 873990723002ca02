"""Results leave: jobs become records, records are published, and only then is the job's own record finished."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar, TypeVarTuple

import msgspec
import structlog

from embedq_consumer.delivery.publisher import Outgoing
from embedq_consumer.delivery.result_records import Reply, ResultEncoder
from embedq_consumer.fairness import Turns
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.jobs import InputVector, JobState
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import cost_of
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import TOO_LARGE
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import LANES, Lane

log = structlog.get_logger()

_LARGE_BYTES: Final = 1024 * 1024
"""Results that take some 10 ms to encode, as long as a micro-batch."""
_THREADS: Final = 2
"""While a large result is encoded, the small ones after it go on."""

Finish = Callable[[Record], None]
"""Says that a record needs no more work: from here on its offset may be committed."""
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

    async def publish(self, records: Sequence[Outgoing]) -> Sequence[Exception | None]:
        """Send all and wait until the brokers have them. For each record None, or why they will never take it."""


class Deliverer:
    """Answers jobs and rejected records.

    Invariants:
        - A record is finished exactly once, and only after the brokers have all that is said about it: every part of its
          result, and its copy among the dead letters if there is to be one.
        - A result that the brokers refuse at its reply address becomes an error on the results topic. If that is refused
          as well, the dead letter alone tells of the job.
        - Large results are encoded one at a time, and their clients take turns: small ones never wait for several of them.
    """

    def __init__(
        self,
        encoder: ResultEncoder,
        sink: Sink,
        finish: Finish,
        metrics: Metrics,
    ) -> None:
        self._encoder = encoder
        self._sink = sink
        self._finish = finish
        self._metrics = metrics
        self._job_seconds = {lane: metrics.job.labels(lane) for lane in LANES}
        # Threads of their own: results must not wait for the tokenizer.
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="deliver")
        self._large = Turns()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def partitions(self, topic: str) -> int | None:
        """How many partitions a topic had when last seen, None for an unknown topic."""
        return self._sink.topics.partitions(topic)

    async def refresh_topics(self) -> None:
        """Look for topics that were made since."""
        await self._sink.refresh_topics()

    async def in_thread(self, work: Callable[[*Args], Returned], *args: *Args) -> Returned:
        """Run work on results off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def deliver(self, jobs: Sequence[JobState]) -> None:
        """Answer jobs whose every input has its outcome, and finish their records. One that is `large` comes alone."""
        if large(jobs[0]):
            async with self._large.turn(jobs[0].client, cost_of(jobs[0]).result_bytes):
                replies = await self.in_thread(self._encode, jobs)
        else:
            replies = await self.in_thread(self._encode, jobs)
        await self._send(replies)
        self._count_inputs(jobs)

    async def reject(self, rejections: Sequence[tuple[Record, Rejection]]) -> None:
        """Answer records that are no jobs of ours, and finish them."""
        await self._send([self._encoder.of_rejection(record, rejection) for record, rejection in rejections])

    def _encode(self, jobs: Sequence[JobState]) -> list[Reply]:
        return [self._encoder.of_job(job) for job in jobs]

    async def _send(self, replies: Sequence[Reply]) -> None:
        """Send results, then errors in place of refused ones, then dead letters; then finish the records."""
        started = time.monotonic()
        sent, refused = await self._publish(replies)
        if refused:
            log.warning("results_undeliverable", jobs=len(refused))
            errors, refused_again = await self._publish(
                [self._encoder.of_undeliverable(reply, _undeliverable(reason)) for reply, reason in refused]
            )
            sent += errors
            sent += [msgspec.structs.replace(reply, outgoing=[]) for reply, _ in refused_again]
        await self._send_dead_letters(sent)
        self._metrics.publish.observe(time.monotonic() - started)
        self._conclude(sent)

    async def _publish(self, replies: Sequence[Reply]) -> tuple[list[Reply], list[tuple[Reply, Exception]]]:
        """Publish their records. Returns the replies that the brokers have, and those that they refused, with the reason."""
        outcomes = iter(await self._sink.publish([record for reply in replies for record in reply.outgoing]))
        sent: list[Reply] = []
        refused: list[tuple[Reply, Exception]] = []
        for reply in replies:
            reasons = [reason for reason in (next(outcomes) for _ in reply.outgoing) if reason is not None]
            if reasons:
                refused.append((reply, reasons[0]))
            else:
                sent.append(reply)
        return sent, refused

    async def _send_dead_letters(self, replies: Sequence[Reply]) -> None:
        """Copy records that need it to the dead letters; of one that is refused there, its position and what was wrong."""
        letters: list[tuple[Reply, Outgoing]] = []
        for reply in replies:
            if reply.dead_letter is not None:
                letters.append((reply, self._encoder.dead_letter(reply, self._dead_letter_partition(reply))))
                self._metrics.dead_letters.labels(reply.dead_letter.code).inc()
        if not letters:
            return
        outcomes = await self._sink.publish([letter for _, letter in letters])
        bare = [
            self._encoder.bare_dead_letter(reply, letter.partition)
            for (reply, letter), reason in zip(letters, outcomes, strict=True)
            if reason is not None
        ]
        if bare:
            outcomes = await self._sink.publish(bare)
            if lost := sum(reason is not None for reason in outcomes):
                log.error("dead_letters_refused", records=lost)

    def _dead_letter_partition(self, reply: Reply) -> int | None:
        """The partition that the record came from, where the dead-letter topic has it."""
        origin = reply.record.ticket.partition.partition
        return origin if origin < (self.partitions(self._encoder.dead_letters) or 0) else None

    def _conclude(self, replies: Sequence[Reply]) -> None:
        """Count what was answered, and finish the records: here their offsets become free to be committed."""
        now = time.monotonic()
        for (lane, status), count in Counter((reply.record.lane, reply.status) for reply in replies).items():
            self._metrics.jobs.labels(lane, status).inc(count)
        for reply in replies:
            for error in reply.errors:
                self._metrics.errors.labels(error.code).inc()
            self._job_seconds[reply.record.lane].observe(now - reply.record.polled_at)
            self._finish(reply.record)

    def _count_inputs(self, jobs: Iterable[JobState]) -> None:
        vectors: Counter[Lane] = Counter()
        cut = 0
        for job in jobs:
            for outcome in job.outcomes:
                vectors[job.record.lane] += not isinstance(outcome, ErrorBody)
                cut += isinstance(outcome, InputVector) and outcome.truncated is not None
        for lane, count in vectors.items():
            self._metrics.inputs.labels(lane).inc(count)
        self._metrics.truncated.inc(cut)


def large(job: JobState) -> bool:
    """Whether encoding a job's results takes so long that others should not wait for several such ones."""
    several = len(job.outcomes) > 1 or job.request.late
    return several and cost_of(job).result_bytes > _LARGE_BYTES


def _undeliverable(reason: Exception) -> ErrorBody:
    if isinstance(reason, TOO_LARGE):
        return ErrorBody.of(
            "result_too_large", "expected a result that the reply topic takes; its broker refused the size"
        )
    return ErrorBody.of(
        "invalid_header",
        "header `reply-topic`: expected a topic that takes results from this service",
        "reply-topic",
    )
