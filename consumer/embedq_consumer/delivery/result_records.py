"""Answers as records: results whole or in parts, failures, dead letters. Pure, and run in a thread for large jobs."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np
import orjson

from embedq_consumer.delivery.publisher import Outgoing
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.jobs import InputVector, JobState, Outcome, Request, Spans
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import fixed_bytes
from embedq_shared import codec
from embedq_shared.codec import Envelope, Format
from embedq_shared.headers import Header, JobHeaders
from embedq_shared.messages import Datum, ErrorBody, Failure, Result, ResultStatus, Timings, Usage
from embedq_shared.topics import CONTENT_TYPE, MODEL_VERSION, STATUS, Topics
from embedq_shared.vectors import NUMPY

_DATUM_SEPARATOR: Final = 1


class Reply(msgspec.Struct, frozen=True):
    """The whole answer to one record: its records, in order, what to count, and what any answer to it repeats."""

    record: Record
    headers: JobHeaders
    format: Format
    envelope: Envelope
    outgoing: list[Outgoing]
    status: ResultStatus
    errors: tuple[ErrorBody, ...] = ()
    dead_letter: ErrorBody | None = None


class ResultEncoder:
    """Turns what became of jobs into records."""

    def __init__(self, topics: Topics, group: str, max_result_bytes: int) -> None:
        self._topics = topics
        self._group = group
        self._limit = max_result_bytes

    def of_job(self, job: JobState) -> Reply:
        """The result of a job whose every input has its outcome."""
        error = job.failure()
        request = job.request
        envelope = Envelope(request.id, request.model, request.metadata)
        version = job.encoder.model_version
        if error is not None:
            return self._failure(job.record, job.headers, request.format, envelope, error, version)
        data = [
            datum for index, outcome in enumerate(job.outcomes) for datum in _data(request, index, outcome)
        ]
        tokens = sum(outcome.tokens for outcome in job.outcomes if isinstance(outcome, InputVector | Spans))
        errors = tuple(outcome for outcome in job.outcomes if isinstance(outcome, ErrorBody))
        status: ResultStatus = (
            "ok" if not errors else "partial" if len(errors) < len(job.outcomes) else "error"
        )
        parts = list(_split(data, self._limit - fixed_bytes(job.record, job.headers, request)))
        outgoing = []
        for number, part in enumerate(parts):
            result = Result(
                id=request.id,
                model=request.model,
                model_version=version,
                dimensions=request.dimensions,
                dtype=request.dtype,
                data=part,  # type: ignore[arg-type]  # already encoded, one by one
                usage=Usage(tokens, tokens),
                timings=Timings(job.queue_s, job.tokenize_s, job.compute_s),
                metadata=request.metadata,
                part=number,
                parts=len(parts),
            )
            value = codec.encode(result, request.format)
            headers = self._headers(job.headers, request.format, status, version)
            outgoing.append(self._addressed(job.record, job.headers, request.id, value, headers))
        return Reply(job.record, job.headers, request.format, envelope, outgoing, status, errors)

    def of_refusal(self, record: Record, refusal: Rejection) -> Reply:
        """The error result of a record that is no job of ours."""
        headers = refusal.headers if refusal.reply else _unaddressed(refusal.headers)
        return self._failure(
            record,
            headers,
            refusal.format,
            refusal.envelope,
            refusal.error,
            None,
            refusal.error if refusal.dead_letter else None,
        )

    def of_undeliverable(self, job_reply: Reply, error: ErrorBody) -> Reply:
        """What is left to say when the broker refuses a result at its reply address: the error, on the results topic."""
        headers = _unaddressed(job_reply.headers)
        return self._failure(
            job_reply.record, headers, job_reply.format, job_reply.envelope, error, None, dead_letter=error
        )

    def dead_letter(
        self, record: Record, error: ErrorBody, *, partition: int | None, result_sent: bool
    ) -> Outgoing:
        """The record as it came, with Spring's, Kafka Connect's and our headers about it. Ours come last.

        One with neither key nor value gets its position for a key, since aiokafka sends no record without both.
        """
        origin = record.ticket.partition
        key = record.name.encode() if record.key is None and record.value is None else record.key
        text = error.message.encode()
        about: list[Header] = [
            ("kafka_dlt-original-topic", origin.topic.encode()),
            ("kafka_dlt-original-partition", struct.pack(">i", origin.partition)),
            ("kafka_dlt-original-offset", struct.pack(">q", record.ticket.offset)),
            ("kafka_dlt-original-timestamp", struct.pack(">q", record.timestamp_ms)),
            (
                "kafka_dlt-original-timestamp-type",
                b"LogAppendTime" if record.timestamp_type else b"CreateTime",
            ),
            ("kafka_dlt-original-consumer-group", self._group.encode()),
            ("kafka_dlt-exception-fqcn", f"embedq.{error.code}".encode()),
            ("kafka_dlt-exception-message", text),
            ("__connect.errors.topic", origin.topic.encode()),
            ("__connect.errors.partition", str(origin.partition).encode()),
            ("__connect.errors.offset", str(record.ticket.offset).encode()),
            ("__connect.errors.stage", b"VALUE_CONVERTER"),
            ("__connect.errors.class.name", b"embedq_consumer"),
            ("__connect.errors.exception.class.name", f"embedq.{error.code}".encode()),
            ("__connect.errors.exception.message", text),
            ("embedq-error-code", error.code.encode()),
            ("embedq-error-message", text),
            ("embedq-attempts", b"1"),
            ("embedq-result-sent", b"true" if result_sent else b"false"),
        ]
        return Outgoing(
            topic=self._topics.dead_letters,
            partition=partition,
            key=key,
            value=record.value,
            headers=[*record.headers, *about],
            timestamp_ms=record.timestamp_ms if record.timestamp_ms >= 0 else None,
        )

    def _failure(
        self,
        record: Record,
        headers: JobHeaders,
        format: Format,
        envelope: Envelope,
        error: ErrorBody,
        version: str | None,
        dead_letter: ErrorBody | None = None,
    ) -> Reply:
        """An error result. A caller's own key, headers and metadata may leave no room even for that: then they stay out."""
        id = envelope.id if envelope.id is not None else record.name
        metadata = envelope.metadata if bytes(envelope.metadata) else codec.null(format)
        failure = Failure(id=id, model=envelope.model, model_version=version, error=error, metadata=metadata)
        value = codec.encode(failure, format)
        outgoing = self._addressed(
            record, headers, id, value, self._headers(headers, format, "error", version)
        )
        if _size(outgoing) > self._limit:
            bare = msgspec.structs.replace(failure, metadata=codec.null(format))
            outgoing = msgspec.structs.replace(outgoing, key=id.encode(), value=codec.encode(bare, format))
        if _size(outgoing) > self._limit:
            silent = self._headers(JobHeaders(), format, "error", version)
            outgoing = msgspec.structs.replace(outgoing, headers=silent)
        return Reply(record, headers, format, envelope, [outgoing], "error", (error,), dead_letter)

    def _headers(
        self, headers: JobHeaders, format: Format, status: ResultStatus, version: str | None
    ) -> list[Header]:
        found = [
            *headers.echo,
            (CONTENT_TYPE, codec.CONTENT_TYPES[format].encode()),
            (STATUS, status.encode()),
        ]
        if version is not None:
            found.append((MODEL_VERSION, version.encode()))
        return found

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
        )


def _unaddressed(headers: JobHeaders) -> JobHeaders:
    """The same, for an answer on the results topic."""
    return msgspec.structs.replace(headers, reply_topic=None, reply_partition=None)


def _size(outgoing: Outgoing) -> int:
    headers = sum(len(name) + len(value) + 8 for name, value in outgoing.headers)
    return len(outgoing.value or b"") + len(outgoing.key or b"") + headers


def _data(request: Request, index: int, outcome: Outcome | None) -> Iterator[msgspec.Raw]:
    """One input's outcome, encoded: a datum, or one for each of its spans."""
    if isinstance(outcome, Spans):
        for span in outcome.spans:
            yield _encoded(
                request,
                Datum(
                    index=index,
                    embedding=_embedding(request, span.vector),
                    tokens=span.tokens,
                    truncated=False,
                    cached=False,
                    scale=msgspec.UNSET if span.scale is None else span.scale,
                    span=(span.start, span.end),
                ),
            )
    elif isinstance(outcome, InputVector):
        yield _encoded(
            request,
            Datum(
                index=index,
                embedding=_embedding(request, outcome.vector),
                tokens=outcome.tokens,
                truncated=outcome.truncated is not None,
                cached=outcome.cached,
                scale=msgspec.UNSET if outcome.scale is None else outcome.scale,
            ),
        )
    elif outcome is not None:
        yield _encoded(request, Datum(index=index, embedding=None, error=outcome))
    else:
        raise RuntimeError(f"input {index} has no outcome. This is a bug.")


def _encoded(request: Request, datum: Datum) -> msgspec.Raw:
    return msgspec.Raw(codec.encode(datum, request.format))


def _embedding(request: Request, vector: bytes) -> bytes | str | msgspec.Raw:
    if request.format == "msgpack":
        return vector
    if request.encoding == "base64":
        return b64encode(vector).decode("ascii")
    # orjson writes a float32 with the fewest digits that read back the same; msgspec knows float64 alone.
    numbers = np.frombuffer(vector, dtype=NUMPY[request.dtype])
    return msgspec.Raw(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY))


def _split(data: list[msgspec.Raw], room: int) -> list[list[msgspec.Raw]]:
    """Parts in order, each within `room` bytes; an item over it stands alone (admission has made sure that one fits)."""
    parts: list[list[msgspec.Raw]] = [[]]
    left = room
    for datum in data:
        size = len(bytes(datum)) + _DATUM_SEPARATOR
        if size > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(datum)
        left -= size
    return parts
