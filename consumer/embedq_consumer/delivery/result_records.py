"""Results as records: whole or in parts, failures, dead letters. Pure but for the time in a dead letter; results of jobs are encoded in a thread."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np
import orjson

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.intake.admission import DeletedRow, Rejection
from embedq_consumer.intake.jobs import InputVector, JobState, Request, Spans
from embedq_consumer.intake.records import Death, Record
from embedq_consumer.intake.result_sizes import fixed_bytes
from embedq_consumer.retries import HEALS, Attempt, RetryPolicy, RetryTiers, Tier, headers_of
from embedq_consumer.retries.past import HISTORY, history_of
from embedq_consumer.shapes import Answer, BatchAnswer, FlatAnswer
from embedq_shared import codec
from embedq_shared.codec import Envelope, Format
from embedq_shared.headers import Header, JobHeaders
from embedq_shared.messages import Datum, Dtype, ErrorBody, Failure, ResultStatus, Timings, Usage
from embedq_shared.topics import CONTENT_TYPE, MODEL_VERSION, STATUS, Topics
from embedq_shared.vectors import NUMPY

_DATUM_SEPARATOR: Final = 1
_CONNECT_STAGES: Final = {
    "invalid_header": b"HEADER_CONVERTER",
    "result_too_large": b"KAFKA_PRODUCE",
    "crashed": b"TASK_PUT",
}
"""Where a sink of Kafka Connect would have failed, by error code; everything else is in the value."""


class EncodedResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """A `messages.Result` whose data are encoded already, one by one, or shall be with it; the same fields in the same order."""

    id: str
    model: str
    model_version: str
    dimensions: int
    dtype: Dtype
    data: Sequence[msgspec.Raw | Datum]
    usage: Usage
    timings: Timings
    metadata: msgspec.Raw
    part: int
    parts: int


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """The job is run again instead of being answered. `otherwise` is the answer, if the tier's topic does not take it."""

    tier: int
    reason: str
    """The error's code."""
    otherwise: Reply


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer to one record: what to publish, in order, what to count, and what any answer to it repeats."""

    record: Record
    headers: JobHeaders
    format: Format
    envelope: Envelope
    outgoing: list[Outgoing]
    status: ResultStatus
    errors: tuple[ErrorBody, ...] = ()
    dead_letter: ErrorBody | None = None
    deaths: tuple[Death, ...] = ()
    """The processes that the record killed."""
    model_version: str | None = None
    """The model that the job was accepted for, where it came that far."""
    answer: Answer | None = None
    """How a mapping has the record answered."""
    retry: Retry | None = None
    """`outgoing` is the record for a retry topic then, and not an answer."""


class ResultEncoder:
    """Turns what became of jobs into records.

    `group` is the service's consumer group and `replica` its name, for dead letters. Each result record is kept within `max_result_bytes`:
    results are split between vectors, and admission has made sure that one vector fits. `retries` says which jobs are run again.
    """

    def __init__(
        self,
        topics: Topics,
        group: str,
        max_result_bytes: int,
        *,
        replica: str = "",
        retries: RetryPolicy | None = None,
    ) -> None:
        self._topics = topics
        self._group = group
        self._replica = replica
        self._limit = max_result_bytes
        self._retries = retries or RetryPolicy(RetryTiers())

    @property
    def dead_letters(self) -> str:
        """The topic of the dead letters."""
        return self._topics.dead_letters

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The retry tiers in use."""
        return self._retries.tiers.tiers

    def of_job(self, job: JobState) -> Reply:
        """The result of a job whose every input has its outcome."""
        request = job.request
        envelope = Envelope(request.id, request.model, request.metadata)
        version = job.encoder.model_version
        errors = tuple([outcome for outcome in job.outcomes if isinstance(outcome, ErrorBody)])
        if errors and (error := job.failure() or _failure_of_line(job)) is not None:
            return self._failure(
                job.record,
                job.headers,
                request.format,
                envelope,
                error,
                model_version=version,
                answer=request.answer,
            )
        status: ResultStatus = (
            "ok" if not errors else "partial" if len(errors) < len(job.outcomes) else "error"
        )
        return Reply(
            record=job.record,
            headers=job.headers,
            format=request.format,
            envelope=envelope,
            outgoing=self._parts(job, status)
            if request.answer is None
            else [self._whole(job, request.answer)],
            status=status,
            errors=errors,
            model_version=version,
            answer=request.answer,
        )

    def _parts(self, job: JobState, status: ResultStatus) -> list[Outgoing]:
        """The result, in as many records as it needs."""
        request, version = job.request, job.encoder.model_version
        parts: Sequence[Sequence[msgspec.Raw | Datum]]
        if len(data := _data(job)) == 1:  # which has been admitted, so that it fits: the usual case
            parts = [data]
        else:
            limit = self._limit - fixed_bytes(job.record, job.headers, request)
            parts = _split(_encoded(data, request.format), limit)
        usage, timings = _usage(job), Timings(job.queue_s, job.tokenize_s, job.compute_s, job.device_s)
        outgoing = []
        for number, part in enumerate(parts):
            result = EncodedResult(
                id=request.id,
                model=request.model,
                model_version=version,
                dimensions=request.dimensions,
                dtype=request.dtype,
                data=part,
                usage=usage,
                timings=timings,
                metadata=request.metadata,
                part=number,
                parts=len(parts),
            )
            value = codec.encode(result, request.format)
            headers = _headers(job.headers, request.format, status, version)
            outgoing.append(self._addressed(job.record, job.headers, request.id, value, headers))
        return outgoing

    def _whole(self, job: JobState, answer: Answer) -> Outgoing:
        """The result as its mapping wants it, in one record: admission has made sure that it fits."""
        version = job.encoder.model_version
        if isinstance(answer, BatchAnswer):
            value = answer.value(_all_data(job), job.request.model, version, _usage(job))
        else:
            [outcome] = [one for one in job.outcomes if isinstance(one, InputVector)]
            value = answer.value(outcome.vector, version, truncated=outcome.truncated is not None)
        own = _headers(job.headers, "json", "ok", version)
        return self._mapped(answer.output.topic, job.headers, answer.key, value, own)

    def of_rejection(self, record: Record, rejection: Rejection) -> Reply:
        """The error result of a record that is not a job that can run here."""
        return self._failure(
            record,
            rejection.headers if rejection.reply else _unaddressed(rejection.headers),
            rejection.format,
            rejection.envelope,
            rejection.error,
            model_version=rejection.model_version,
            dead_letter=rejection.dead_letter,
            deaths=rejection.deaths,
            answer=rejection.answer,
        )

    def of_deleted(self, record: Record, row: DeletedRow) -> Reply:
        """A tombstone for the result of a row that is gone."""
        removal = row.removal
        outgoing = self._mapped(
            removal.mapping.output.topic, row.headers, removal.key, None, [*row.headers.echo, (STATUS, b"ok")]
        )
        return Reply(
            record=record,
            headers=row.headers,
            format="json",
            envelope=Envelope(removal.id),
            outgoing=[outgoing],
            status="ok",
        )

    def of_undeliverable(self, reply: Reply, error: ErrorBody) -> Reply:
        """What is left to say when the brokers refuse a result at its reply address: the error, on the results topic."""
        headers = _unaddressed(reply.headers)
        return self._failure(
            reply.record,
            headers,
            reply.format,
            reply.envelope,
            error,
            model_version=reply.model_version,
            dead_letter=True,
            answer=reply.answer,
        )

    def or_retry(self, reply: Reply) -> Reply:
        """The same; or its job's way to the next retry tier, if its answer would be an error that may heal.

        A job that was run again and still fails by such an error is for a person to look at: its answer goes out, and a copy
        to the dead letters.
        """
        if not reply.errors:
            return reply
        error = next((one for one in reply.errors if one.code in HEALS), None)
        record, now_ms = reply.record, time.time() * 1000
        if error is None or reply.status != "error" or reply.retry is not None or record.value is None:
            return reply
        if record.ordered:  # a later row of its key must not be answered before it
            return reply
        codes = [one.code for one in reply.errors]
        tier = self._retries.tier_for(record.ticket, record.lane, codes, reply.headers.deadline_ms, now_ms)
        if tier is None:
            exhausted = record.past is not None and reply.dead_letter is None
            return msgspec.structs.replace(reply, dead_letter=error) if exhausted else reply
        attempt = Attempt(at=int(now_ms), replica=self._replica, code=error.code, message=error.message)
        due_ms = int(now_ms + tier.delay_s * 1000)
        waiting = Outgoing(
            topic=tier.topic,
            # Not by the key: a job need not have one, and no order is promised.
            partition=record.ticket.partition.partition % tier.partitions,
            key=record.key,
            value=record.value,
            headers=headers_of(record.headers, record.origin.failed(attempt), due_ms),
            anywhere=True,
        )
        return msgspec.structs.replace(
            reply,
            outgoing=[waiting],
            dead_letter=None,
            retry=Retry(tier=tier.number, reason=error.code, otherwise=reply),
        )

    def dead_letter(self, reply: Reply, partition: int | None) -> Outgoing:
        """The record as it came, and headers of Spring, Kafka Connect and ours that say why; ours come last.

        One with neither key nor value gets its position for a key, since aiokafka sends no record without both.
        """
        record = reply.record
        key = record.name.encode() if record.key is None and record.value is None else record.key
        return Outgoing(
            topic=self._topics.dead_letters,
            partition=partition,
            key=key,
            value=record.value,
            headers=[*record.headers, *_about(reply, self._group, self._replica)],
            timestamp_ms=record.timestamp_ms if record.timestamp_ms >= 0 else None,
        )

    def bare_dead_letter(self, reply: Reply, partition: int | None) -> Outgoing:
        """The same without the record's own content, for one that the brokers do not take: its position for a key."""
        return msgspec.structs.replace(
            self.dead_letter(reply, partition),
            key=reply.record.name.encode(),
            value=None,
            headers=_about(reply, self._group, self._replica),
        )

    def _failure(
        self,
        record: Record,
        headers: JobHeaders,
        format: Format,
        envelope: Envelope,
        error: ErrorBody,
        *,
        model_version: str | None = None,
        dead_letter: bool = False,
        deaths: tuple[Death, ...] = (),
        answer: Answer | None = None,
    ) -> Reply:
        """An error result. The caller's own key, headers and metadata are left out where they make even that too large.

        Of a mapped row it goes to the results topic, since a sink that stores flat results could make nothing of it, and a copy
        of the record to the dead letters. A batch line's is a line itself.
        """
        if isinstance(answer, FlatAnswer):
            error = answer.explained(error)
        id = envelope.id if envelope.id is not None else record.name
        metadata = envelope.metadata if bytes(envelope.metadata) else codec.null(format)
        failure = Failure(
            id=id, model=envelope.model, model_version=model_version, error=error, metadata=metadata
        )
        value = codec.encode(failure, format)
        own = _headers(headers, format, "error", model_version)
        if isinstance(answer, BatchAnswer):
            line = answer.failure(error)
            outgoing = self._mapped(answer.output.topic, headers, answer.key, line, own)
        else:
            outgoing = self._addressed(record, headers, id, value, own)
        if _size(outgoing) > self._limit:
            bare = msgspec.structs.replace(failure, metadata=codec.null(format))
            outgoing = msgspec.structs.replace(outgoing, key=id.encode(), value=codec.encode(bare, format))
        if _size(outgoing) > self._limit:
            silent = _headers(JobHeaders(), format, "error", model_version)
            outgoing = msgspec.structs.replace(outgoing, headers=silent)
        return Reply(
            record=record,
            headers=headers,
            format=format,
            envelope=envelope,
            outgoing=[outgoing],
            status="error",
            errors=(error,),
            dead_letter=error if dead_letter or isinstance(answer, FlatAnswer) else None,
            deaths=deaths,
            model_version=model_version,
            answer=answer,
        )

    def _mapped(
        self, topic: str, headers: JobHeaders, key: bytes, value: bytes | None, own: list[Header]
    ) -> Outgoing:
        """A mapped record's answer: at the caller's address if there is one, else on the mapping's topic, by its key."""
        called = headers.reply_topic is not None or headers.reply_partition is not None
        return Outgoing(
            topic=(headers.reply_topic or self._topics.results) if called else topic,
            partition=headers.reply_partition,
            key=key,
            value=value,
            headers=own,
            by_key=not called,
        )

    def _addressed(
        self, record: Record, headers: JobHeaders, id: str, value: bytes, own: list[Header]
    ) -> Outgoing:
        key = record.key if record.key is not None else id.encode()
        return Outgoing(
            topic=headers.reply_topic or self._topics.results,
            partition=headers.reply_partition,
            key=key,
            value=value,
            headers=own,
            express=record.lane == "interactive",
        )


def _about(reply: Reply, group: str, replica: str) -> list[Header]:
    """The headers of a dead letter that say where the record came from and what was wrong with it."""
    record, error = reply.record, reply.dead_letter
    if error is None:
        raise RuntimeError("a reply without an error went to the dead letters. This is a bug.")
    origin = record.origin
    text = error.message.encode()
    return [
        ("kafka_dlt-original-topic", origin.topic.encode()),
        ("kafka_dlt-original-partition", struct.pack(">i", origin.partition)),
        ("kafka_dlt-original-offset", struct.pack(">q", origin.offset)),
        ("kafka_dlt-original-timestamp", struct.pack(">q", origin.timestamp_ms)),
        (
            "kafka_dlt-original-timestamp-type",
            b"LogAppendTime" if origin.timestamp_type else b"CreateTime",
        ),
        ("kafka_dlt-original-consumer-group", group.encode()),
        ("kafka_dlt-exception-fqcn", f"embedq.{error.code}".encode()),
        ("kafka_dlt-exception-message", text),
        ("__connect.errors.topic", origin.topic.encode()),
        ("__connect.errors.partition", str(origin.partition).encode()),
        ("__connect.errors.offset", str(origin.offset).encode()),
        ("__connect.errors.connector.name", group.encode()),
        ("__connect.errors.stage", _CONNECT_STAGES.get(error.code, b"VALUE_CONVERTER")),
        ("__connect.errors.class.name", b"embedq_consumer"),
        ("__connect.errors.exception.class.name", f"embedq.{error.code}".encode()),
        ("__connect.errors.exception.message", text),
        ("embedq-error-code", error.code.encode()),
        ("embedq-error-message", text),
        ("embedq-attempts", str(len(origin.attempts) + (len(reply.deaths) or 1)).encode()),
        ("embedq-result-sent", b"true" if reply.outgoing else b"false"),
        ("embedq-replica", replica.encode()),
        ("embedq-first-seen", str(_first_seen_ms(reply)).encode()),
        *([("embedq-history", _history(reply.deaths))] if reply.deaths else []),
        *([(HISTORY, history_of(origin))] if origin.attempts else []),
        *([(MODEL_VERSION, reply.model_version.encode())] if reply.model_version else []),
    ]


def _headers(headers: JobHeaders, format: Format, status: ResultStatus, version: str | None) -> list[Header]:
    return [*headers.echo, *_own_headers(format, status, version)]


@lru_cache(maxsize=256)
def _own_headers(format: Format, status: ResultStatus, version: str | None) -> tuple[Header, ...]:
    known = (CONTENT_TYPE, codec.CONTENT_TYPES[format].encode()), (STATUS, status.encode())
    return known if version is None else (*known, (MODEL_VERSION, version.encode()))


def _failure_of_line(job: JobState) -> ErrorBody | None:
    """The first error of a batch line: OpenAI's requests fail whole."""
    if not isinstance(job.request.answer, BatchAnswer):
        return None
    return next((one for one in job.outcomes if isinstance(one, ErrorBody)), None)


def _data(job: JobState) -> list[Datum]:
    """Every input's outcome: a datum, or one for each of its spans.

    Equal inputs of a job have one outcome: `made` keeps its vectors' decimals, which cost most.
    """
    request = job.request
    made: dict[int, msgspec.Raw] = {}
    data: list[Datum] = []
    for index, outcome in enumerate(job.outcomes):
        if isinstance(outcome, InputVector):
            data.append(
                Datum(
                    index=index,
                    embedding=_embedding(request, outcome.vector, made),
                    tokens=outcome.tokens,
                    truncated=outcome.truncated is not None,
                    cached=outcome.cached,
                    scale=msgspec.UNSET if outcome.scale is None else outcome.scale,
                )
            )
        elif isinstance(outcome, Spans):
            data += [
                Datum(
                    index=index,
                    embedding=_embedding(request, span.vector, made),
                    tokens=span.tokens,
                    truncated=False,
                    cached=False,
                    scale=msgspec.UNSET if span.scale is None else span.scale,
                    span=(span.start, span.end),
                )
                for span in outcome.spans
            ]
        elif outcome is not None:
            data.append(Datum(index=index, embedding=None, error=outcome))
        else:
            raise RuntimeError(f"input {index} has no outcome. This is a bug.")
    return data


def _all_data(job: JobState) -> list[msgspec.Raw]:
    """The same, encoded one by one."""
    return _encoded(_data(job), job.request.format)


def _encoded(data: Iterable[Datum], format: Format) -> list[msgspec.Raw]:
    return [msgspec.Raw(codec.encode(datum, format)) for datum in data]


def _usage(job: JobState) -> Usage:
    tokens = sum([outcome.tokens for outcome in job.outcomes if isinstance(outcome, InputVector | Spans)])
    return Usage(tokens, tokens)


def _unaddressed(headers: JobHeaders) -> JobHeaders:
    """The same, for an answer on the results topic."""
    return msgspec.structs.replace(headers, reply_topic=None, reply_partition=None)


def _first_seen_ms(reply: Reply) -> int:
    """When the service read the record for the first time, as far as is known, in epoch milliseconds."""
    now_ms = int((time.time() - time.monotonic() + reply.record.polled_at) * 1000)
    runs = (attempt.at for attempt in reply.record.origin.attempts)
    return min([now_ms, *(death.at_ms for death in reply.deaths), *runs])


def _history(deaths: Iterable[Death]) -> bytes:
    """The processes that a record killed: a JSON list, of at most 8 (`quarantine/custody.py`), and so of at most 1 KB."""
    return msgspec.json.encode([{"at": death.at_ms, "replica": death.replica} for death in deaths])


def _size(outgoing: Outgoing) -> int:
    headers = sum(len(name) + len(value) + 8 for name, value in outgoing.headers)
    return len(outgoing.value or b"") + len(outgoing.key or b"") + headers


def _embedding(request: Request, vector: bytes, made: dict[int, msgspec.Raw]) -> bytes | msgspec.Raw:
    """A vector as the result has it. All vectors of a job live as long as `made`, so that each has an address of its own."""
    if request.format == "msgpack" or request.encoding == "base64":
        return vector  # in JSON bytes are base64
    found = made.get(id(vector))
    if found is None:
        # orjson writes a float32 with the fewest digits that read back the same; msgspec knows float64 alone.
        numbers = np.frombuffer(vector, dtype=NUMPY[request.dtype])
        found = made[id(vector)] = msgspec.Raw(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY))
    return found


def _split(data: list[msgspec.Raw], limit: int) -> list[list[msgspec.Raw]]:
    """Parts in order, each within `limit` bytes; a larger item is a part of its own (admission has made sure that one fits)."""
    parts: list[list[msgspec.Raw]] = [[]]
    left = limit
    for datum in data:
        size = len(bytes(datum)) + _DATUM_SEPARATOR
        if size > left and parts[-1]:
            parts.append([])
            left = limit
        parts[-1].append(datum)
        left -= size
    return parts
