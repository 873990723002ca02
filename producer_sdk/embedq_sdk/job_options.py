"""What a caller may ask for, checked at the door: nothing wrong is ever sent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict, get_args

import msgspec

from embedq_sdk.errors import InvalidArgument
from embedq_shared.codec import Format, encode
from embedq_shared.messages import (
    DEFAULT_CHUNK_TOKENS,
    MAX_ID_LENGTH,
    MAX_INSTRUCTION_BYTES,
    MAX_METADATA_BYTES,
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

_TRACE_LIMIT: Final = 512


def late(tokens: int = DEFAULT_CHUNK_TOKENS) -> Chunking:
    """Late chunking: the model reads the whole text, and each span of at most `tokens` tokens gets a vector."""
    return Chunking("late", checked_count("tokens", tokens, MIN_CHUNK_TOKENS))


def mean(tokens: int | None = None) -> Chunking:
    """One vector of a text of any length: the mean over windows of at most `tokens` tokens, None for as many as the model
    takes."""
    return Chunking("mean", None if tokens is None else checked_count("tokens", tokens, MIN_CHUNK_TOKENS))


class JobArguments(TypedDict, total=False):
    """What every call of the client takes for its jobs; what is absent is the service's default.

    `chunk` is `late(…)` or `mean(…)`. `lane` is "interactive" unless given, and "bulk" for submitted jobs; `trace` is a
    W3C traceparent.
    """

    model: str | None
    dimensions: int | None
    dtype: Dtype | None
    input_type: InputType | None
    instruction: str | None
    truncate: Truncate | None
    chunk: Chunking | None
    metadata: Mapping[str, Any] | None
    lane: Lane
    trace: str | None


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The part of a job that all texts of a call share."""

    model: str | None = None
    dimensions: int | None = None
    dtype: Dtype | None = None
    input_type: InputType | None = None
    instruction: str | None = None
    truncate: Truncate | None = None
    metadata: Mapping[str, Any] | None = None
    lane: Lane = "interactive"
    trace: str | None = None
    chunk: Chunking | None = None

    def __post_init__(self) -> None:
        _text("model", self.model, 1)
        _choice("dtype", self.dtype, get_args(Dtype))
        _choice("input_type", self.input_type, get_args(InputType))
        _choice("truncate", self.truncate, get_args(Truncate))
        _chunking(self.chunk)
        if self.chunk is not None and self.truncate not in (None, "error"):
            raise InvalidArgument(
                argument="truncate", expected="none, or error, where chunk is given", got=repr(self.truncate)
            )
        _choice("lane", self.lane, get_args(Lane), optional=False)
        _text("instruction", self.instruction)
        _text("trace", self.trace, 1)
        if self.dimensions is not None:
            step = 8 if self.dtype == "binary" else 1
            if type(self.dimensions) is not int or self.dimensions < MIN_DIMENSIONS or self.dimensions % step:
                expected = f"an integer of at least {MIN_DIMENSIONS}"
                if step == 8:
                    expected += ", a multiple of 8 since dtype is 'binary'"
                raise _wrong("dimensions", expected, self.dimensions)
        if self.instruction is not None and self.input_type == "document":
            raise InvalidArgument(
                argument="instruction", expected="none where input_type is 'document'", got="one"
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


_NONE: Final = msgspec.Raw()


def _wrong(argument: str, expected: str, value: object) -> InvalidArgument:
    """An error that names a value's type, and the value only where it is a number or a flag."""
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
        raise InvalidArgument(argument=name, expected="a non-empty string", got=f"{len(value)} characters")
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
    """An integer of at least `least`."""
    if type(value) is not int or value < least:
        raise _wrong(name, f"an integer of at least {least}", value)
    return value


def checked_id(value: object) -> str:
    """A job id as the contract wants it."""
    if not isinstance(value, str):
        raise _wrong("id", f"a string of 1 to {MAX_ID_LENGTH} characters", value)
    if not 1 <= len(value) <= MAX_ID_LENGTH:
        raise InvalidArgument(
            argument="id",
            expected=f"a string of 1 to {MAX_ID_LENGTH} characters",
            got=f"{len(value)} characters",
        )
    _utf8_size(value, "id")
    return value


def _utf8_size(text: str, name: str) -> int:
    """Bytes of a text on the wire."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            argument=name, expected="valid Unicode", got=f"a lone surrogate at position {error.start}"
        ) from None


def text_size(text: object, name: str, limit: int) -> int:
    """A text's bytes on the wire.

    Raises:
        InvalidArgument: it is no string, no valid Unicode, or more than one job carries.
    """
    if not isinstance(text, str):
        raise _wrong(name, "a string", text)
    size = _utf8_size(text, name)
    if size > limit:
        raise InvalidArgument(
            argument=name,
            expected=f"at most {limit:,} bytes of UTF-8, which one job carries",
            got=f"{size:,}",
        )
    return size


def checked_texts(texts: object, limit: int, name: str = "texts") -> tuple[list[str], list[int]]:
    """The texts as a list, and each one's bytes on the wire."""
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Sequence):
        raise _wrong(name, "a string or a sequence of strings", texts)
    if not texts:
        raise InvalidArgument(argument=name, expected="at least one text", got="none")
    return list(texts), [text_size(text, f"{name}[{n}]", limit) for n, text in enumerate(texts)]


def split(sizes: Sequence[int], *, max_inputs: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Where to cut a list into jobs: (start, end) pairs that cover it, each within both limits."""
    start = held = 0
    for n, size in enumerate(sizes):
        if n > start and (n - start == max_inputs or held + size > max_bytes):
            yield start, n
            start, held = n, 0
        held += size
    yield start, len(sizes)
