"""Whether a record is a job that this replica can run. Pure: model, time and the broker's topics are arguments."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Mapping as Map
from typing import Final

import msgspec

from embedq_consumer.engine import Encoder
from embedq_consumer.engine.text.prompts import prompt_for
from embedq_consumer.intake.jobs import JobState, Request, input_param
from embedq_consumer.intake.records import Death, Record
from embedq_consumer.intake.result_sizes import datum_bytes, fixed_bytes
from embedq_consumer.shapes import (
    MAPPING_HEADER,
    Answer,
    BadLine,
    BadRow,
    BatchAnswer,
    Embeddable,
    Mapping,
    Mappings,
    Message,
    NoRegistry,
    Removal,
    Schemas,
    Unknown,
    Want,
    hint,
    read,
)
from embedq_shared import codec
from embedq_shared.codec import BadJob, Envelope, Format
from embedq_shared.headers import JobHeaders, parse, value_of
from embedq_shared.messages import DEFAULT_ALIAS, DEFAULT_CHUNK_TOKENS, Chunking, ErrorBody, Job
from embedq_shared.topics import CONTENT_TYPE, MSGPACK_TYPES, Topics, is_reserved

PartitionCount = Callable[[str], int | None]
ShareOf = Callable[[str, str, Collection[str] | None], str | None]
"""The alias that the job of an alias and an id belongs to, of these alone where it may; None where the alias is no split."""


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """Why a record is answered with an error.

    `dead_letter`: a result alone is not enough to answer the record, so it is copied to the dead-letter topic too.
    `reply`: whether the error goes to the reply address, or to the results topic instead.
    """

    error: ErrorBody
    format: Format
    headers: JobHeaders
    envelope: Envelope
    dead_letter: bool = False
    reply: bool = True
    deaths: tuple[Death, ...] = ()
    """The processes that it killed."""
    model_version: str | None = None
    """The one that the job's alias has, where the job asks for another."""
    answer: Answer | None = None
    """How a mapping has the record answered, where that is known."""


class DeletedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is gone: nothing is computed, and its result's key gets a tombstone."""

    removal: Removal
    headers: JobHeaders


class UnknownSchema(msgspec.Struct, frozen=True):
    """The record can be admitted once the Schema Registry has said what this is."""

    want: Want


class UnknownAddress(msgspec.Struct, frozen=True):
    """The reply topic, or its partition, is not among those last seen: ask the broker before rejecting the job.

    `error` is the job's result if the broker does not know it either.
    """

    headers: JobHeaders
    error: ErrorBody


Admitted = JobState | Rejection | UnknownAddress | UnknownSchema | DeletedRow


def _nobody_asks(alias: str, asked: object) -> None:
    """Nobody wants to know."""


def _no_split(alias: str, id: str, among: Collection[str] | None) -> str | None:
    """There are no splits."""
    return None


def _no_pools(alias: str, id: str) -> str | None:
    """There is one pool."""
    return None


class AdmissionPolicy(msgspec.Struct, frozen=True):
    """The settings that decide what is accepted. `schemas` is what the Schema Registry has said so far."""

    topics: Topics
    max_inputs: int
    max_text_bytes: int
    max_result_bytes: int
    reply_patterns: tuple[str, ...]
    mappings: Mappings = Mappings()
    schemas: Schemas = NoRegistry()
    note_dimensions: Callable[[str, int], None] = _nobody_asks
    """Hears of the `dimensions` that an admitted job of an alias names."""
    share_of: ShareOf = _no_split
    """Whose job one of an alias is that no model serves by itself."""
    pool_of: Callable[[str, str], str | None] = _no_pools
    """The pool that runs an alias's job; None for the default one, and where nothing is known."""
    note_use: Callable[[str, Job], None] = _nobody_asks
    """Hears of each job of the interactive lane that is admitted for an alias."""

    def admit(
        self, record: Record, models: Map[str, Encoder], now_ms: float, partitions: PartitionCount
    ) -> Admitted:
        """The job of one record, or why it is rejected. Raises nothing, whatever the record holds. `models` are those that serve, by alias."""
        headers = self._headers_of(record)
        if (mapping := self._mapping_of(record)) is not None:
            return self._admit_mapped(mapping, record, headers, models, now_ms)
        format = codec.format_of(headers.content_type)
        address = self._check_address(headers, partitions)
        if isinstance(address, UnknownAddress):
            return address
        if address is not None:
            return self._reject_address(record, headers, format, address)
        if (name := value_of(record.headers, MAPPING_HEADER)) is not None:
            named = self.mappings.named(name.decode("utf-8", "replace"))
            if named is None:
                return _unknown_mapping(self.mappings.names, headers, format)
            return self._admit_mapped(named, record, headers, models, now_ms)
        if format is None:
            known = ", ".join(["application/json", *sorted(MSGPACK_TYPES)])
            error = ErrorBody.of(
                "unsupported_content_type",
                f"header `{CONTENT_TYPE}`: expected one of {known}{hint(record.value, record.headers)}",
                CONTENT_TYPE,
            )
            return Rejection(
                error=error, format="json", headers=headers, envelope=Envelope(), dead_letter=True
            )
        try:
            job = codec.decode_job(record.value, format, max_inputs=self.max_inputs)
        except BadJob as bad:
            # A value that does not decode is kept, so that its producer can be debugged.
            return Rejection(
                error=_with_hint(bad.error, record),
                format=format,
                headers=headers,
                envelope=bad.envelope,
                dead_letter=bad.error.code == "malformed",
            )
        return self._accept(record, headers, job, format, models, now_ms)

    # More than six parameters: what a decoded record is made of; two callers.
    def _accept(
        self,
        record: Record,
        headers: JobHeaders,
        job: Job,
        format: Format,
        models: Map[str, Encoder],
        now_ms: float,
        answer: Answer | None = None,
    ) -> JobState | Rejection:
        """A job that was read, or why it cannot run here."""
        if (error := _check_deadline(headers, now_ms)) is not None:
            return _refused(error, headers, job, format, answer)
        alias = served = DEFAULT_ALIAS if job.model is None else job.model
        if (encoder := models.get(alias)) is None:
            served = (
                self.share_of(alias, job.id or record.name, _of_version(models, job.model_version)) or alias
            )
            if (encoder := models.get(served)) is None:
                error = _unknown_model(alias, served, models, _elsewhere(self, alias, job, record))
                return _refused(error, headers, job, format, answer)
        if job.model_version is not None and job.model_version != encoder.model_version:
            error = _other_version(served, encoder)
            return _refused(error, headers, job, format, answer, encoder.model_version)
        request = self._request(record, headers, job, format, encoder, answer)
        if isinstance(request, ErrorBody):
            return _refused(request, headers, job, format, answer)
        if job.dimensions is not None:
            self.note_dimensions(served, job.dimensions)
        if record.lane == "interactive":
            self.note_use(served, job)
        return JobState(record, headers, request, encoder, served)

    def _admit_mapped(
        self,
        mapping: Mapping,
        record: Record,
        headers: JobHeaders,
        models: Map[str, Encoder],
        now_ms: float,
    ) -> Admitted:
        """The same for a record that a mapping reads."""
        message = Message(
            key=record.key,
            value=record.value,
            headers=record.headers,
            name=record.name,
            max_inputs=self.max_inputs,
        )
        try:
            found = read(mapping, message, self.schemas)
        except BadRow as bad:
            error = ErrorBody.of(bad.code, f"mapping {mapping.name}: {bad}", bad.param)
            return Rejection(
                error=error, format="json", headers=headers, envelope=Envelope(bad.id), dead_letter=True
            )
        match found:
            case Unknown(want):
                return UnknownSchema(want)
            case Removal():
                return DeletedRow(removal=found, headers=headers)
            case BadLine(why, answer):
                envelope = Envelope(answer.custom_id, why.envelope.model, why.envelope.metadata)
                return Rejection(
                    error=why.error, format="json", headers=headers, envelope=envelope, answer=answer
                )
            case Embeddable(job, answer):
                return self._accept(record, headers, job, "json", models, now_ms, answer)

    def condemn(self, record: Record, deaths: Sequence[Death], partitions: PartitionCount) -> Rejection:
        """The rejection of a record that killed processes. Its value is not looked at: decoding it may be what kills."""
        headers = self._headers_of(record)
        error = ErrorBody.of(
            "crashed",
            f"expected a job that the service survives; {len(deaths)} processes ended while it ran, the last ones while it ran alone",
        )
        return Rejection(
            error=error,
            format=codec.format_of(headers.content_type) or "json",
            headers=headers,
            envelope=Envelope(),
            dead_letter=True,
            reply=self._check_address(headers, partitions) is None,
            deaths=tuple(deaths),
        )

    def check_text(self, request: Request, index: int) -> ErrorBody | None:
        """Why one text is rejected before it is tokenized: tokenizing takes time and memory in proportion to its bytes."""
        text = request.texts[index]
        # A character is 1 to 4 bytes of UTF-8: count only where the limit is near.
        if len(text) * 4 <= self.max_text_bytes or len(text.encode()) <= self.max_text_bytes:
            return None
        param = input_param(request, index)
        return ErrorBody.of(
            "text_too_long", f"`{param}`: expected at most {self.max_text_bytes} bytes of UTF-8", param
        )

    def _mapping_of(self, record: Record) -> Mapping | None:
        """The mapping that reads the record's topic."""
        return self.mappings.of_topic(record.origin.topic) if self.mappings else None

    def _headers_of(self, record: Record) -> JobHeaders:
        headers = parse(record.headers)
        if self._mapping_of(record) is None:
            return headers
        # Rows have no caller: who copied a reply address along with them waits for nothing.
        return JobHeaders(content_type=headers.content_type, echo=headers.echo)

    def _check_address(
        self, headers: JobHeaders, partitions: PartitionCount
    ) -> ErrorBody | UnknownAddress | None:
        """Why no result can be sent to the reply address, so that the job need not be computed; None if one can."""
        if headers.bad_address is not None:
            return headers.bad_address
        topic = headers.reply_topic
        if topic is None:
            if headers.reply_partition is None:
                return None
            topic = self.topics.results
        elif not self._is_allowed(topic):
            return _bad_address(
                headers.topic_header,
                f"`{self.topics.replies}`, `{self.topics.results}` or a topic that the service's setting `reply_topics` allows",
            )
        count = partitions(topic)
        if count is None:
            return UnknownAddress(headers, _bad_address(headers.address_header, "a topic that exists"))
        if headers.reply_partition is not None and headers.reply_partition >= count:
            expected = f"a number less than {count}, the number of partitions of its topic"
            return UnknownAddress(headers, _bad_address(headers.partition_header, expected))
        return None

    def _is_allowed(self, topic: str) -> bool:
        """Our own topics for answers, and what the setting allows: reserved names only where they stand in full."""
        if topic in (self.topics.replies, self.topics.results):
            return True
        if self.topics.is_internal(topic):
            return False
        if topic in self.reply_patterns:
            return True
        return not is_reserved(topic) and any(
            fnmatch.fnmatchcase(topic, pattern) for pattern in self.reply_patterns
        )

    def unknown_address(self, record: Record, address: UnknownAddress) -> Rejection:
        """The rejection of a job whose reply address does not exist on the broker either."""
        format = codec.format_of(address.headers.content_type)
        return self._reject_address(record, address.headers, format, address.error)

    def _reject_address(
        self, record: Record, headers: JobHeaders, format: Format | None, error: ErrorBody
    ) -> Rejection:
        """The error goes to the results topic, with what can be read of the job's id and metadata."""
        rejection = self.given_up(record, error)
        return msgspec.structs.replace(rejection, headers=headers, format=format or "json", reply=False)

    def given_up(self, record: Record, error: ErrorBody) -> Rejection:
        """The rejection of a job that was accepted and is not answered, with what can be read of its id and metadata."""
        headers = self._headers_of(record)
        format = codec.format_of(headers.content_type) or "json"
        try:
            envelope = codec.envelope_of(codec.decode_job(record.value, format, max_inputs=self.max_inputs))
        except BadJob as bad:
            envelope = bad.envelope
        return Rejection(error=error, format=format, headers=headers, envelope=envelope, dead_letter=True)

    def _request(
        self,
        record: Record,
        headers: JobHeaders,
        job: Job,
        format: Format,
        encoder: Encoder,
        answer: Answer | None = None,
    ) -> Request | ErrorBody:
        """The job with every default filled in, or the first rule of the model and the service that it breaks."""
        dimensions = encoder.hidden_size if job.dimensions is None else job.dimensions
        if dimensions > encoder.hidden_size:
            return ErrorBody.of(
                "invalid_value",
                f"`dimensions`: expected an integer from 32 to {encoder.hidden_size}, the model's hidden size",
                "dimensions",
            )
        dtype = job.dtype or "float32"
        if dtype == "binary" and dimensions % 8:
            return ErrorBody.of(
                "invalid_value",
                f"`dimensions`: expected a multiple of 8 where `dtype` is binary; the default, the model's hidden size, is {dimensions}",
                "dimensions",
            )
        if job.chunk is not None and job.chunk.mode == "late" and not encoder.late_chunks:
            return ErrorBody.of(
                "invalid_value",
                "`chunk.mode`: expected mean; this model takes its vector from the first token, so spans have no vectors",
                "chunk.mode",
            )
        listed = not isinstance(job.input, str)
        texts = [job.input] if isinstance(job.input, str) else job.input
        request = Request(
            id=job.id if job.id is not None else record.name,
            model=DEFAULT_ALIAS if job.model is None else job.model,
            texts=texts,
            listed=listed,
            prompt=prompt_for(job, encoder),
            dimensions=dimensions,
            dtype=dtype,
            encoding=job.encoding_format or "float",
            truncate=job.truncate or "error",
            chunk=_chunking(job, encoder),
            max_spans=self.max_inputs,
            metadata=codec.null(format) if job.metadata == codec.ABSENT else job.metadata,
            format=format,
            answer=answer,
        )
        fixed = fixed_bytes(record, headers, request)
        if isinstance(answer, BatchAnswer):
            return self._whole(request, fixed)
        if fixed + datum_bytes(request) > self.max_result_bytes:
            return ErrorBody.of(
                "result_too_large",
                f"expected a result of at most {self.max_result_bytes} bytes; the job's key, headers, id, metadata and "
                f"one vector take {fixed + datum_bytes(request)}",
            )
        return request

    def _whole(self, request: Request, fixed: int) -> Request | ErrorBody:
        """The request, if its whole result fits one record: lines of a batch have no parts."""
        several = request.max_spans if request.late else len(request.texts)
        most = fixed + several * datum_bytes(request)
        if most <= self.max_result_bytes:
            return request
        return ErrorBody.of(
            "result_too_large",
            f"`body.input`: expected a line whose result is at most {self.max_result_bytes} bytes, got up to {most}; fewer inputs "
            "a line, `dimensions`, or `encoding_format` base64 make it smaller",
            "body.input",
        )


def _unknown_mapping(names: Iterable[str], headers: JobHeaders, format: Format | None) -> Rejection:
    known = ", ".join(names) or "none, since the setting `EMBEDQ_MAPPINGS` is empty"
    error = ErrorBody.of(
        "invalid_header",
        f"header `{MAPPING_HEADER}`: expected the name of a mapping: {known}",
        MAPPING_HEADER,
    )
    return Rejection(
        error=error, format=format or "json", headers=headers, envelope=Envelope(), dead_letter=True
    )


EXPIRED: Final = ErrorBody.of(
    "expired", "header `deadline`: expected a time in the future when the job is read", "deadline"
)


def _with_hint(error: ErrorBody, record: Record) -> ErrorBody:
    """An error of the strict contract, which says what mapping would read such a record."""
    if error.code not in ("malformed", "unknown_field", "invalid_value"):
        return error
    more = hint(record.value, record.headers, unknown_field=error.code == "unknown_field")
    return msgspec.structs.replace(error, message=error.message + more)


_OPENAI: Final = ("text-embedding-", "text-similarity-", "text-search-")


def _of_openai(alias: str) -> str:
    """What to do about OpenAI's model names, which clients send unless told otherwise."""
    if not alias.startswith(_OPENAI):
        return ""
    return "; OpenAI's model names mean nothing here: leave `model` out, or set a mapping with `options: {model: …}`"


# More than six parameters: all that a rejection repeats; one caller.
def _refused(
    error: ErrorBody,
    headers: JobHeaders,
    job: Job,
    format: Format,
    answer: Answer | None,
    model_version: str | None = None,
) -> Rejection:
    return Rejection(
        error=error,
        format=format,
        headers=headers,
        envelope=codec.envelope_of(job),
        answer=answer,
        model_version=model_version,
    )


def _unknown_model(
    alias: str, share: str, models: Map[str, Encoder], elsewhere: str | None = None
) -> ErrorBody:
    """`share` is whose job it is, if the alias is a split; `elsewhere` the job topic of another pool, if that runs it."""
    served = list(models)
    expected = f"{served[0]!r}, the only model alias served here"
    if len(served) > 1:
        expected = f"one of the model aliases served here, {', '.join(map(repr, served))}"
    if share != alias:
        expected += "; the split that it names has one that is not"
    if elsewhere is not None:
        expected += f"; another pool serves this one: its jobs go to the topic {elsewhere}"
    return ErrorBody.of("unknown_model", f"`model`: expected {expected}{_of_openai(alias)}", "model")


def _elsewhere(policy: AdmissionPolicy, alias: str, job: Job, record: Record) -> str | None:
    """The job topic of another pool that runs a job; None where none is known to."""
    pool = policy.pool_of(alias, job.id or record.name)
    other = pool is not None and pool != policy.topics.pool
    return policy.topics.of(pool).lane(record.lane) if other else None


def _of_version(models: Map[str, Encoder], version: str | None) -> Collection[str] | None:
    """The aliases that have a version; None where any will do."""
    if version is None:
        return None
    return [alias for alias, encoder in models.items() if encoder.model_version == version]


def _other_version(alias: str, encoder: Encoder) -> ErrorBody:
    return ErrorBody.of(
        "unknown_model_version",
        f"`model_version`: expected {encoder.model_version}, which {alias!r} has now",
        "model_version",
    )


def _bad_address(header: str | None, expected: str) -> ErrorBody:
    """The error of a reply address that cannot be used, by the name under which it came."""
    return ErrorBody.of("invalid_header", f"header `{header}`: expected {expected}", header)


def _check_deadline(headers: JobHeaders, now_ms: float) -> ErrorBody | None:
    if headers.bad_deadline is not None:
        return headers.bad_deadline
    if headers.deadline_ms is not None and headers.deadline_ms <= now_ms:
        return EXPIRED
    return None


def _chunking(job: Job, encoder: Encoder) -> Chunking | None:
    """The job's chunking with its defaults filled in, so that jobs which mean the same have equal values."""
    if job.chunk is None:
        return None
    default = DEFAULT_CHUNK_TOKENS if job.chunk.mode == "late" else encoder.max_tokens
    return Chunking(job.chunk.mode, min(job.chunk.tokens or default, encoder.max_tokens))
