"""What a caller may ask for, checked before anything is sent."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypedDict, get_args

import msgspec

from embedq_sdk.errors import InvalidArgument
from embedq_shared.codec import CONTENT_TYPES, Format, encode
from embedq_shared.grouping import batched_by
from embedq_shared.headers import MAX_CLIENT_BYTES
from embedq_shared.messages import (
    DEFAULT_CHUNK_TOKENS,
    DEFAULT_MAX_INPUTS,
    MAX_ID_LENGTH,
    MAX_INSTRUCTION_BYTES,
    MAX_INTEGER,
    MAX_METADATA_BYTES,
    MAX_VERSION_LENGTH,
    MIN_CHUNK_TOKENS,
    MIN_DIMENSIONS,
    Chunking,
    ChunkMode,
    Dtype,
    InputType,
    Job,
    Truncate,
)
from embedq_shared.topics import Lane

Errors = Literal["raise", "return"]
"""What becomes of texts that failed: an exception, or an entry in what is returned."""

MAX_JOB_BYTES: Final = 900_000
"""Kafka's default limit of a record is 1 MB; the rest is for the job's other fields and headers."""
_TRACE_LIMIT: Final = 512
"""Characters: a W3C traceparent has 55; anything far longer is a mistake."""


def late(tokens: int = DEFAULT_CHUNK_TOKENS) -> Chunking:
    """Late chunking: the model reads the whole text, and each span of at most `tokens` tokens gets a vector."""
    return Chunking("late", checked_count("tokens", tokens, MIN_CHUNK_TOKENS))


def mean(tokens: int | None = None) -> Chunking:
    """One vector for a text of any length: the mean over windows of at most `tokens` tokens, by default the model's limit."""
    return Chunking("mean", None if tokens is None else checked_count("tokens", tokens, MIN_CHUNK_TOKENS))


class JobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks of a job, the same for all its texts. None means the service's default.

    `chunk` is `late(…)` or `mean(…)`. `lane` is "interactive" unless given, and "bulk" for submitted jobs. `trace` is a
    W3C traceparent. `model_version` is the one that must answer, such as that of stored vectors; where the alias has another one,
    the call fails with UnknownModelVersion. `client_id` says whose the job is, where one client works for several: clients take turns.

    Raises:
        InvalidArgument: an option is wrong by itself or does not go with another one.
    """

    model: str | None = None
    model_version: str | None = None
    dimensions: int | None = None
    dtype: Dtype | None = None
    input_type: InputType | None = None
    instruction: str | None = None
    truncate: Truncate | None = None
    chunk: Chunking | None = None
    metadata: Mapping[str, Any] | None = None
    lane: Lane = "interactive"
    trace: str | None = None
    client_id: str | None = None

    def __post_init__(self) -> None:
        for name in _STRINGS:
            value = getattr(self, name)
            if isinstance(value, str) and type(value) is not str:
                msgspec.structs.force_setattr(self, name, plain(value))
        _text("model", self.model, 1)
        _text("model_version", self.model_version, 1)
        if self.model_version is not None and len(self.model_version) > MAX_VERSION_LENGTH:
            raise InvalidArgument(
                argument="model_version",
                expected=f"a string of at most {MAX_VERSION_LENGTH} characters, such as `sha256:` and 64 hex digits",
                got=f"{len(self.model_version)} characters",
            )
        _choice("dtype", self.dtype, get_args(Dtype))
        _choice("input_type", self.input_type, get_args(InputType))
        _choice("truncate", self.truncate, get_args(Truncate))
        _chunking(self.chunk)
        if self.chunk is not None and self.truncate not in (None, "error"):
            raise InvalidArgument(
                argument="truncate", expected="error, or no value, with chunk", got=repr(self.truncate)
            )
        _choice("lane", self.lane, get_args(Lane), optional=False)
        _text("instruction", self.instruction)
        _text("trace", self.trace, 1)
        if self.client_id is not None:
            checked_client_id(self.client_id)
        if self.dimensions is not None:
            step = 8 if self.dtype == "binary" else 1
            fits = type(self.dimensions) is int and MIN_DIMENSIONS <= self.dimensions <= MAX_INTEGER
            if not fits or self.dimensions % step:
                expected = f"an integer of at least {MIN_DIMENSIONS}"
                if step == 8:
                    expected += " and a multiple of 8 for dtype 'binary'"
                raise _wrong("dimensions", expected, self.dimensions)
        if self.instruction is not None and self.input_type == "document":
            raise InvalidArgument(
                argument="instruction", expected="no value with input_type 'document'", got="one"
            )
        if self.instruction is not None and len(self.instruction.encode()) > MAX_INSTRUCTION_BYTES:
            raise InvalidArgument(
                argument="instruction",
                expected=f"at most {MAX_INSTRUCTION_BYTES:,} bytes of UTF-8",
                got=f"{len(self.instruction.encode()):,}",
            )
        if self.metadata is not None:
            self._raw_metadata("msgpack")

    @property
    def late(self) -> bool:
        """Whether a text gets several vectors."""
        return self.chunk is not None and self.chunk.mode == "late"

    def encode(self, texts: str | list[str], id: str | None, format: Format = "msgpack") -> bytes:
        """One job's bytes."""
        return encode(
            Job(
                input=texts,
                id=id,
                model=self.model,
                model_version=self.model_version,
                dimensions=self.dimensions,
                dtype=self.dtype,
                input_type=self.input_type,
                instruction=self.instruction,
                truncate=self.truncate,
                chunk=self.chunk,
                metadata=_NONE if self.metadata is None else self._raw_metadata(format),
            ),
            format,
        )

    def _raw_metadata(self, format: Format) -> msgspec.Raw:
        expected = f"a mapping of at most {MAX_METADATA_BYTES} bytes as JSON, with string keys"
        if not isinstance(self.metadata, Mapping):
            raise _wrong("metadata", expected, self.metadata)
        try:
            # The contract's metadata is what JSON can say, whatever carries it.
            as_json = msgspec.json.encode(dict(self.metadata))
            plain = msgspec.json.decode(as_json)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise InvalidArgument(argument="metadata", expected=expected, got=str(error)) from None
        raw = as_json if format == "json" else msgspec.msgpack.encode(plain)
        if max(len(as_json), len(raw)) > MAX_METADATA_BYTES:
            raise InvalidArgument(argument="metadata", expected=expected, got=f"{len(as_json)} bytes")
        return msgspec.Raw(raw)


class JobArguments(TypedDict, total=False):
    """The fields of `JobOptions` as keyword arguments, for `Unpack` in the signatures of the client's methods.

    A test holds that both have the same names and types.
    """

    model: str | None
    model_version: str | None
    dimensions: int | None
    dtype: Dtype | None
    input_type: InputType | None
    instruction: str | None
    truncate: Truncate | None
    chunk: Chunking | None
    metadata: Mapping[str, Any] | None
    lane: Lane
    trace: str | None
    client_id: str | None


_NONE: Final = msgspec.Raw()
_STRINGS: Final = (
    "model",
    "model_version",
    "dtype",
    "input_type",
    "instruction",
    "truncate",
    "lane",
    "trace",
    "client_id",
)


def _wrong(argument: str, expected: str, value: object) -> InvalidArgument:
    """An error that names a value's type, and shows the value only if it is a number, a bool or None."""
    shown = repr(value) if isinstance(value, (bool, int, float, type(None))) else type(value).__name__
    return InvalidArgument(argument=argument, expected=expected, got=shown)


def _choice(name: str, value: object, allowed: tuple[str, ...], *, optional: bool = True) -> None:
    if not ((value is None and optional) or (isinstance(value, str) and value in allowed)):
        shown = repr(value[:40]) if isinstance(value, str) else type(value).__name__
        raise InvalidArgument(argument=name, expected=f"one of {', '.join(allowed)}", got=shown)


def _chunking(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Chunking):
        raise _wrong("chunk", "late(…) or mean(…)", value)
    _choice("chunk", value.mode, get_args(ChunkMode), optional=False)
    if value.tokens is not None:
        checked_count("tokens", value.tokens, MIN_CHUNK_TOKENS)


def _text(name: str, value: object, shortest: int = 0) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    if len(value) < shortest or (name == "trace" and len(value) > _TRACE_LIMIT):
        expected = f"a string of 1 to {_TRACE_LIMIT} characters" if name == "trace" else "a non-empty string"
        raise InvalidArgument(argument=name, expected=expected, got=f"{len(value)} characters")
    if not value.isascii():
        _utf8_size(value, name)


def checked_timeout(name: str, value: object) -> float:
    """A positive, finite number of seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, "a number of seconds above 0", value)
    if not (math.isfinite(value) and value > 0):
        raise _wrong(name, "a finite number of seconds above 0", value)
    return float(value)


def checked_count(name: str, value: object, least: int = 1) -> int:
    """An integer of at least `least`, and one that a job can carry."""
    if type(value) is not int or not least <= value <= MAX_INTEGER:
        raise _wrong(name, f"an integer of at least {least}", value)
    return value


def checked_id(value: object) -> str:
    """A job id that the wire contract allows."""
    if not isinstance(value, str):
        raise _wrong("id", f"a string of 1 to {MAX_ID_LENGTH} characters", value)
    if not 1 <= len(value) <= MAX_ID_LENGTH:
        raise InvalidArgument(
            argument="id",
            expected=f"a string of 1 to {MAX_ID_LENGTH} characters",
            got=f"{len(value)} characters",
        )
    _utf8_size(value, "id")
    return plain(value)


def checked_client_id(value: object) -> bytes:
    """Whose jobs these are, as their header says it; None: a random name."""
    if value is None:
        return uuid.uuid4().hex.encode()
    if not isinstance(value, str):
        raise _wrong("client_id", f"a string of 1 to {MAX_CLIENT_BYTES} bytes of UTF-8", value)
    size = _utf8_size(value, "client_id")
    if not 1 <= size <= MAX_CLIENT_BYTES:
        raise InvalidArgument(
            argument="client_id",
            expected=f"a string of 1 to {MAX_CLIENT_BYTES} bytes of UTF-8",
            got=f"{size:,} bytes",
        )
    return value.encode()


def checked_format(value: object) -> Format:
    """A format of jobs and results."""
    if not isinstance(value, str) or value not in CONTENT_TYPES:
        raise InvalidArgument(
            argument="format", expected=f"one of {', '.join(CONTENT_TYPES)}", got=repr(value)
        )
    return value


def check_errors(value: object) -> None:
    """Check what is to become of texts that failed."""
    if not isinstance(value, str) or value not in get_args(Errors):
        raise InvalidArgument(argument="errors", expected="one of raise, return", got=repr(value))


def _utf8_size(text: str, name: str) -> int:
    """Bytes of a text as UTF-8."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            argument=name, expected="valid Unicode", got=f"a lone surrogate at position {error.start}"
        ) from None


class _ToList(Protocol):
    def to_list(self) -> Any: ...


class _Tolist(Protocol):
    def tolist(self) -> Any: ...


class _ToPylist(Protocol):
    def to_pylist(self) -> Any: ...


Column = _ToList | _Tolist | _ToPylist
"""A column of strings: of pandas or polars (Series, Index), numpy (one dimension) or pyarrow. None of them is needed."""


def listed_column(texts: Any, name: str) -> Any:
    """A column as a list of what it holds. What is no column comes back as it is.

    Raises:
        InvalidArgument: a whole table, which iterates over its names and not over its texts; an array of several
            dimensions.
    """
    kind = type(texts)
    if isinstance(texts, (str, bytes)):
        return texts
    if hasattr(kind, "columns") or hasattr(kind, "column_names"):
        raise InvalidArgument(
            argument=name,
            expected="one column, such as table['text']; a table has several",
            got=kind.__name__,
        )
    if getattr(texts, "ndim", 1) != 1:
        raise InvalidArgument(
            argument=name,
            expected="an array of one dimension, such as array.ravel()",
            got=f"{kind.__name__} of {texts.ndim}",
        )
    for to_list in ("to_pylist", "to_list", "tolist"):
        if hasattr(kind, to_list):
            return getattr(texts, to_list)()
    return texts


def plain(text: str) -> str:
    """The same as exactly a `str`, which is what encoders take: numpy's strings, enums and others are subclasses."""
    return text if type(text) is str else str.__str__(text)


def text_size(text: object, name: str, limit: int) -> int:
    """A text's bytes as UTF-8.

    Raises:
        InvalidArgument: it is not a string, not valid Unicode, or larger than `limit`, the most that one job carries.
    """
    if not isinstance(text, str):
        missing = text is None or isinstance(text, float) or type(text).__name__ == "NAType"
        raise _wrong(name, "a string; drop or fill missing values first" if missing else "a string", text)
    size = _utf8_size(text, name)
    if size > limit:
        raise InvalidArgument(
            argument=name,
            expected=f"at most {limit:,} bytes of UTF-8, the most that one job carries",
            got=f"{size:,}",
        )
    return size


def checked_texts(texts: object, limit: int, name: str = "texts") -> tuple[list[str], list[int]]:
    """The texts as a list, and the bytes of each as UTF-8."""
    if type(texts) is not list:
        texts = listed_column(texts, name)
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Sequence):
        expected = "a string or a sequence of strings"
        if isinstance(texts, Iterable) and not isinstance(texts, (bytes, Mapping)):
            expected += ", such as list(…) of it; embed_many and stream take any iterable"
        raise _wrong(name, expected, texts)
    if not texts:
        raise InvalidArgument(argument=name, expected="at least one text", got="none")
    if set(map(type, texts)) == {str}:
        try:
            sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        except UnicodeEncodeError:
            sizes = [limit + 1]  # which text it is, is said below
        if max(sizes) <= limit:
            return list(texts), sizes
    sizes = [text_size(text, f"{name}[{n}]", limit) for n, text in enumerate(texts)]
    return [plain(text) for text in texts], sizes


class JobInputs(msgspec.Struct, frozen=True):
    """The texts of one job, and their bytes as UTF-8 altogether."""

    texts: list[str]
    size: int


class JobLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The most that one job holds.

    Raises:
        InvalidArgument: a limit is not positive, or `max_job_bytes` is above MAX_JOB_BYTES.
    """

    max_inputs: int = DEFAULT_MAX_INPUTS
    max_job_bytes: int = MAX_JOB_BYTES

    def __post_init__(self) -> None:
        checked_count("max_inputs", self.max_inputs)
        if checked_count("max_job_bytes", self.max_job_bytes) > MAX_JOB_BYTES:
            raise InvalidArgument(
                argument="max_job_bytes",
                expected=f"at most {MAX_JOB_BYTES:,}",
                got=f"{self.max_job_bytes:,}",
            )

    def size(self, text: object, name: str) -> int:
        """The bytes of a text that one job can carry; see `text_size`."""
        return text_size(text, name, self.max_job_bytes)

    def split(self, texts: Sequence[str] | Column) -> list[JobInputs]:
        """The texts of a call as jobs, in order.

        Raises:
            InvalidArgument: there is no text, or one is wrong.
        """
        listed, sizes = checked_texts(texts, self.max_job_bytes)
        total = sum(sizes)
        if len(listed) <= self.max_inputs and total <= self.max_job_bytes:
            return [JobInputs(listed, total)]
        groups = batched_by(range(len(listed)), sizes.__getitem__, self.max_job_bytes, most=self.max_inputs)
        spans = [slice(group[0], group[-1] + 1) for group in groups]
        return [JobInputs(listed[span], sum(sizes[span])) for span in spans]

    def one_job(self, texts: str | Sequence[str] | Column) -> tuple[str | list[str], int]:
        """The texts of one job as they are sent, and their bytes.

        Raises:
            InvalidArgument: there is no text, one is wrong, or one job cannot carry them all.
        """
        if isinstance(texts, str):
            return plain(texts), self.size(texts, "texts")
        listed, sizes = checked_texts(texts, self.max_job_bytes)
        total = sum(sizes)
        if len(listed) > self.max_inputs or total > self.max_job_bytes:
            raise InvalidArgument(
                argument="texts",
                expected=f"at most {self.max_inputs:,} texts and {self.max_job_bytes:,} bytes, as in one job",
                got=f"{len(listed):,} texts and {total:,} bytes",
            )
        return listed, total
