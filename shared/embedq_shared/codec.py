"""Bytes to messages and back, for both content types.

Decoding a job raises one exception, `BadJob`, whatever is wrong with the bytes. Its message is written here and never
taken from the decoder, which may quote the value.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any, Final, Literal

import msgspec

from embedq_shared.messages import (
    DEFAULT_MAX_INPUTS,
    MAX_ID_LENGTH,
    MAX_INSTRUCTION_BYTES,
    MAX_METADATA_BYTES,
    MAX_NESTING,
    MAX_VERSION_LENGTH,
    MIN_CHUNK_TOKENS,
    MIN_DIMENSIONS,
    NULL,
    Control,
    ErrorBody,
    ErrorCode,
    Failure,
    Job,
    Result,
    Split,
    Status,
)
from embedq_shared.topics import JSON, MSGPACK, MSGPACK_TYPES

Format = Literal["json", "msgpack"]

CONTENT_TYPES: Final[dict[Format, str]] = {"json": JSON, "msgpack": MSGPACK}
_LARGEST: Final = int(sys.float_info.max)
"""JSON has no largest number, but most of its readers have a double."""
_NIL: Final = msgspec.Raw(b"\xc0")
ABSENT: Final = msgspec.Raw()

EXPECTED: Final[dict[str, str]] = {
    "input": "a string or a non-empty list of strings",
    "id": f"a string of 1 to {MAX_ID_LENGTH} characters",
    "model": "a string",
    "model_version": f"a string of 1 to {MAX_VERSION_LENGTH} characters, such as `sha256:` and 64 hex digits",
    "dimensions": f"an integer from {MIN_DIMENSIONS} to the model's hidden size",
    "dtype": "one of float32, float16, int8, binary",
    "encoding_format": "one of float, base64",
    "input_type": "one of query, document",
    "instruction": f"a string of at most {MAX_INSTRUCTION_BYTES} bytes of UTF-8",
    "truncate": "one of error, start, end",
    "chunk": "an object with `mode` and optionally `tokens`",
    "metadata": f"an object of at most {MAX_METADATA_BYTES} bytes, with finite numbers and string keys",
    "user": "any JSON value",
}
"""What each field of a job must be, for error messages."""
_EXPECTED_IN_CHUNK: Final[dict[str, str]] = {
    "mode": "one of late, mean",
    "tokens": f"an integer of at least {MIN_CHUNK_TOKENS}",
}


class BadJob(Exception):
    """A record that is not a valid job. `envelope` holds what could still be read."""

    def __init__(
        self, code: ErrorCode, message: str, param: str | None = None, *, envelope: Envelope | None = None
    ) -> None:
        super().__init__(message)
        self.error = ErrorBody.of(code, message, param)
        self.envelope = envelope or Envelope()


class Envelope(msgspec.Struct, frozen=True):
    """What a result repeats of its job. Read leniently, so that a job with one bad field still gets a result with its id."""

    id: str | None = None
    model: str | None = None
    metadata: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class _LooseEnvelope(msgspec.Struct):
    id: Any = None
    model: Any = None
    metadata: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


def format_of(content_type: bytes | None) -> Format | None:
    """The format that a `content-type` header names; JSON without one, None for one that is not supported."""
    if content_type is None:
        return "json"
    media_type = content_type.split(b";", 1)[0].strip().lower()
    if media_type == JSON.encode():
        return "json"
    return "msgpack" if media_type.decode("latin-1") in MSGPACK_TYPES else None


_decoders: Final[dict[Format, msgspec.json.Decoder[Job] | msgspec.msgpack.Decoder[Job]]] = {
    "json": msgspec.json.Decoder(Job),
    "msgpack": msgspec.msgpack.Decoder(Job),
}
_loose: Final[
    dict[Format, msgspec.json.Decoder[_LooseEnvelope] | msgspec.msgpack.Decoder[_LooseEnvelope]]
] = {
    "json": msgspec.json.Decoder(_LooseEnvelope),
    "msgpack": msgspec.msgpack.Decoder(_LooseEnvelope),
}
_anything: Final[dict[Format, msgspec.json.Decoder[Any] | msgspec.msgpack.Decoder[Any]]] = {
    "json": msgspec.json.Decoder(),
    "msgpack": msgspec.msgpack.Decoder(),
}
_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
_IN_CHUNK: Final = " - at `$.chunk`"
# At the end, since the text before may quote the value.
_AT: Final = re.compile(r" - at `\$\.(\w+)((?:\[\d+\]|\.\w+)?)[^`]*`\Z")
_WHERE: Final = re.compile(r"\((?:byte|char) (\d+)\)")
_TOKENS: Final = re.compile(r"got `(?:int|array)`")
"""In `input`: OpenAI's clients may send a text as the numbers of its tokens, or several such lists."""


def decode_job(value: bytes | None, format: Format, *, max_inputs: int = DEFAULT_MAX_INPUTS) -> Job:
    """One job from a record's value.

    Raises:
        BadJob: `malformed`, `unknown_field`, `invalid_value` or `too_many_inputs`, with the field in `param`.
    """
    if value is None:
        raise BadJob("malformed", "expected a job, got a null value")
    try:
        job = _decoders[format].decode(value)
    except msgspec.ValidationError as error:
        repaired = _last_wins(value, format)
        if repaired is None:
            raise _explain(error, value, format) from None
        job = repaired
    except _UNDECODABLE as error:
        raise _malformed(error, format) from None
    try:
        _check_extras(job, format)
        _check_job(job, format, max_inputs)
    except BadJob as bad:
        bad.envelope = _envelope(value, format) or bad.envelope
        raise
    return job


def envelope_of(job: Job) -> Envelope:
    """What a result repeats of a job that was decoded and then refused. No alias is longer than an id may be."""
    known = job.model is not None and len(job.model) <= MAX_ID_LENGTH
    return Envelope(job.id, job.model if known else None, job.metadata)


def _last_wins(value: bytes, format: Format) -> Job | None:
    """The job in a value whose only fault is a wrong field that a later occurrence of the same key corrects.

    The typed decoder checks every occurrence of a key, but only the last one counts.
    """
    try:
        return _decoders[format].decode(_encoders[format].encode(_anything[format].decode(value)))
    except (*_UNDECODABLE, TypeError, ValueError, OverflowError):
        return None


def _check_job(job: Job, format: Format, max_inputs: int) -> None:
    """Check the rules that no type can express."""
    if job.dimensions is not None and job.dimensions > _LARGEST:
        raise _too_large_number("dimensions")
    if job.chunk is not None and job.chunk.tokens is not None and job.chunk.tokens > _LARGEST:
        raise _too_large_number("chunk.tokens")
    if isinstance(job.input, list):
        if not job.input:
            raise _invalid("input")
        if len(job.input) > max_inputs:
            raise BadJob(
                "too_many_inputs",
                f"`input`: expected at most {max_inputs} inputs, got {len(job.input)}",
                "input",
            )
    if job.dtype == "binary" and job.dimensions is not None and job.dimensions % 8:
        raise BadJob(
            "invalid_value", "`dimensions`: expected a multiple of 8 for `dtype` binary", "dimensions"
        )
    if job.instruction is not None and len(job.instruction.encode()) > MAX_INSTRUCTION_BYTES:
        raise _invalid("instruction")
    if job.instruction is not None and job.input_type == "document":
        raise BadJob(
            "invalid_value",
            "`instruction`: expected no value with `input_type` document, since documents take no instruction",
            "instruction",
        )
    if job.chunk is not None and job.truncate not in (None, "error"):
        raise BadJob(
            "invalid_value",
            "`truncate`: expected error or no value with `chunk`, which cuts nothing off",
            "truncate",
        )
    if format == "msgpack" and job.encoding_format is not None:
        raise BadJob(
            "invalid_value",
            "`encoding_format`: expected no value in MessagePack, where vectors are raw bytes",
            "encoding_format",
        )


def _check_extras(job: Job, format: Format) -> None:
    """Check `metadata` and `user`, which were decoded as raw bytes, by the same rules as the rest."""
    if job.metadata == ABSENT and job.user == ABSENT:
        return
    for name, raw in (("metadata", job.metadata), ("user", job.user)):
        data = bytes(raw)
        if not data or data in (b"null", b"\xc0"):
            continue
        try:
            found = _anything[format].decode(data)
        except msgspec.ValidationError:  # a number out of range, a MessagePack key that is not a string
            raise BadJob("malformed", f"expected valid {format} with finite numbers", name) from None
        except _UNDECODABLE as error:
            raise _malformed(error, format) from None
        if name == "metadata" and (not isinstance(found, dict) or len(data) > MAX_METADATA_BYTES):
            raise _invalid(name)
        _check_value(found, name, depth=2)


def _check_value(found: Any, name: str, depth: int) -> None:
    """Allow only what JSON can express, nested at most `MAX_NESTING` levels deep; the job itself is level 1."""
    if isinstance(found, (dict, list)):
        if depth > MAX_NESTING:
            raise BadJob("malformed", f"expected nesting of at most {MAX_NESTING} levels", name)
        if isinstance(found, dict):
            if not all(isinstance(key, str) for key in found):
                raise _invalid(name)
            found = found.values()
        for item in found:
            _check_value(item, name, depth + 1)
    elif isinstance(found, float):
        if not math.isfinite(found):
            raise BadJob("malformed", "expected finite numbers, got NaN or Infinity", name)
    elif isinstance(found, int):
        if not -_LARGEST <= found <= _LARGEST:
            raise _too_large_number(name)
    elif not isinstance(found, (str, type(None))):
        raise _invalid(name)


def _invalid(field: str, suffix: str = "", *, envelope: Envelope | None = None) -> BadJob:
    if field == "chunk" and suffix:
        expected = _EXPECTED_IN_CHUNK[suffix.removeprefix(".")]
    else:
        expected = "a string" if suffix else EXPECTED[field]
    return BadJob(
        "invalid_value", f"`{field}{suffix}`: expected {expected}", f"{field}{suffix}", envelope=envelope
    )


def _too_large_number(name: str) -> BadJob:
    return BadJob("malformed", "expected numbers that a double can hold", name)


def _malformed(error: Exception, format: Format) -> BadJob:
    where = _WHERE.search(str(error))
    name = "JSON object in UTF-8 without BOM" if format == "json" else "MessagePack map"
    position = f", broken at byte {where[1]}" if where else ""
    return BadJob("malformed", f"expected one valid {name}{position}")


def _explain(error: msgspec.ValidationError, value: bytes, format: Format) -> BadJob:
    """The error for a value that can be decoded but is not a job: which field is wrong."""
    message = str(error)
    envelope = _envelope(value, format)
    if envelope is None:
        return _malformed(error, format)
    if message.endswith(_IN_CHUNK) and (missing := _MISSING.match(message)):
        return _invalid("chunk", f".{missing[1]}", envelope=envelope)
    unknown = _UNKNOWN.match(message)
    if unknown and message.endswith(_IN_CHUNK) and not _has_field(value, format, unknown[1]):
        # The name of such a field is part of a value, and values are never repeated.
        message = f"unknown field in `chunk`; it has: {', '.join(_EXPECTED_IN_CHUNK)}"
        return BadJob("unknown_field", message, "chunk", envelope=envelope)
    if unknown:
        name = unknown[1] if len(unknown[1]) <= 64 else unknown[1][:64] + "…"
        return BadJob(
            "unknown_field",
            f"unknown field `{name}`; a job has: {', '.join(EXPECTED)}",
            name,
            envelope=envelope,
        )
    if missing := _MISSING.match(message):
        return _invalid(missing[1], envelope=envelope)
    if at := _AT.search(message):
        if at[1] == "input" and at[2] and _TOKENS.search(message):
            return BadJob(
                "invalid_value",
                f"`input{at[2]}`: expected a string, got token ids; they are of another model's vocabulary: send the text "
                "(LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False)",
                f"input{at[2]}",
                envelope=envelope,
            )
        return _invalid(at[1], at[2], envelope=envelope)
    return BadJob("malformed", "expected an object at the top level", envelope=envelope)


def _has_field(value: bytes, format: Format, name: str) -> bool:
    """Whether the job itself has a field of this name. A name may look like a path."""
    try:
        return name in _anything[format].decode(value)
    except _UNDECODABLE:
        return False


def _envelope(value: bytes, format: Format) -> Envelope | None:
    """What can be read of a job that was refused; None if even its syntax is broken."""
    try:
        found = _loose[format].decode(value)
    except msgspec.ValidationError as error:
        # Not an object: there is nothing to repeat. A number out of range or a bad key breaks the syntax.
        return Envelope() if "Expected `object`" in str(error) and " - at " not in str(error) else None
    except _UNDECODABLE:
        return None
    metadata = msgspec.Raw()
    try:
        _check_extras(Job(input="", metadata=found.metadata), format)
        metadata = found.metadata
    except BadJob:
        pass  # the metadata itself is what was refused: a result cannot repeat it
    usable = isinstance(found.id, str) and 1 <= len(found.id) <= MAX_ID_LENGTH
    return Envelope(
        id=found.id if usable else None,
        model=found.model if isinstance(found.model, str) and len(found.model) <= MAX_ID_LENGTH else None,
        metadata=metadata,
    )


# -- results, control, status -----------------------------------------------------------------------------------------

_encoders: Final[dict[Format, msgspec.json.Encoder | msgspec.msgpack.Encoder]] = {
    "json": msgspec.json.Encoder(),
    "msgpack": msgspec.msgpack.Encoder(),
}
_Reply = Result | Failure
_replies: Final[dict[Format, msgspec.json.Decoder[_Reply] | msgspec.msgpack.Decoder[_Reply]]] = {
    "json": msgspec.json.Decoder(_Reply),
    "msgpack": msgspec.msgpack.Decoder(_Reply),
}
_control: Final = msgspec.json.Decoder(Control)
_split: Final = msgspec.json.Decoder(Split)
UNDECODABLE: Final = _UNDECODABLE
"""What reading a record of the control or the status topic raises."""
_status: Final = msgspec.json.Decoder(Status)


def encode(message: msgspec.Struct, format: Format = "json") -> bytes:
    """A message's bytes. Raw members must already be in the same format."""
    if isinstance(message, Job):
        # Empty raw bytes would be written as nothing at all, which leaves a key without a value.
        empty = {name: null(format) for name in ("metadata", "user") if not bytes(getattr(message, name))}
        message = msgspec.structs.replace(message, **empty)
    return _encoders[format].encode(message)


def null(format: Format) -> msgspec.Raw:
    """What absent metadata is in a result."""
    return NULL if format == "json" else _NIL


def decode_result(value: bytes, format: Format = "json") -> Result | Failure:
    """A result or a failure, read as strictly as the contract is written: the other half of `encode`.

    For tests and benchmarks, and for a reader that wants exactly this version of the contract. The SDK has structs of
    its own, which are more lenient, so that it can also read a newer service.

    Raises:
        msgspec.DecodeError: it is neither.
    """
    return _replies[format].decode(value)


def encode_record(record: Control | Split | Status) -> bytes:
    """A control or status record's value, in JSON."""
    return _encoders["json"].encode(record)


def decode_control(value: bytes) -> Control:
    """A control record.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is not one.
    """
    return _control.decode(value)


def read_command(key: bytes | None, value: bytes | None, alias: str) -> Control | None:
    """The command for an alias in a record of the control topic; None if it is for another one. Replicas and the command
    line read the topic by this one rule: compaction goes by the key, so the key says for which alias a record is.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: the record has the alias's key and is no command for it.
    """
    if key != alias.encode():
        return None
    command = decode_control(value or b"")
    if command.alias != alias:
        raise msgspec.ValidationError("the record's key and its alias differ")
    return command


def read_split(key: bytes, value: bytes) -> Split:
    """The split in a record of the control topic.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is none, or not that of the alias which the key names.
    """
    split = _split.decode(value)
    if key != split.alias.encode():
        raise msgspec.ValidationError("the record's key and its alias differ")
    return split


def status_key(replica: str, alias: str, *, first: bool) -> bytes:
    """The key of a replica's status: compaction keeps the last one of each. `first` is the alias whose key is the name alone, as
    that of a replica of one alias is."""
    return (replica if first else f"{replica}/{alias}").encode()


def decode_status(value: bytes) -> Status:
    """A status record.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is not one.
    """
    return _status.decode(value)


def read_status(key: bytes | None, value: bytes) -> Status:
    """The status in a record of the status topic.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is none, or not that of the replica, or of the replica's alias,
            which the key names.
    """
    status = decode_status(value)
    if key not in [status_key(status.replica, status.alias, first=first) for first in (True, False)]:
        raise msgspec.ValidationError("the record's key and its replica differ")
    return status
