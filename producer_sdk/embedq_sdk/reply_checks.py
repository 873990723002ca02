"""Whether a reply is what the wire contract says. Nothing here does I/O.

A reply is written by whoever can write to the topic. What comes out of this file can be made into arrays without a further
look: every vector is bytes of the right length and finite, every number fits, and every input has its outcome.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from embedq_sdk.embeddings import ReadDatum, ReadFailure, ReadResult, read_reply
from embedq_shared.codec import format_of
from embedq_shared.messages import Dtype
from embedq_shared.vectors import NUMPY, vector_bytes

_UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_MOST_DIMENSIONS: Final = 1 << 16
"""Several times what any embedding model has."""
_MOST_PARTS: Final = 1 << 20
"""Each part has an item, and so many items are more than a service answers at once."""
_MOST: Final = 1 << 40
"""Of any count in a reply: far beyond a sensible one, and within what arrays and clocks hold."""
_MOST_EMPTY_BYTES: Final = 128 << 20
"""Of the rows of inputs without a vector, which cost the sender next to nothing: 2,048 of 16,384 dimensions each."""
_LONGEST_NAME: Final = 4096
"""Characters of `id`, `model` and `model_version`, which are remembered: far beyond what the contract allows for an id."""
_LARGEST_SCALE: Final = 1e30
"""Of int8: below 0.01 for a vector of length 1; times 127 it must be a number that float32 has."""

_NUMBERS: Final[dict[str, tuple[type, ...]]] = {
    "float32": (int, float),
    "float16": (int, float),
    "int8": (int,),
    "binary": (int,),
}
"""How JSON may write each dtype's numbers. True is an int elsewhere, but not here."""


class BadReply(Exception):
    """A reply breaks the contract. The message says which rule, and quotes nothing of it."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a job asked for, as far as its reader knows; None is not known."""

    count: int | None = None
    """Number of inputs."""
    dtype: Dtype | None = None
    dimensions: int | None = None
    late: bool | None = None
    """Whether inputs get spans."""


def read_checked(value: bytes | None, content_type: bytes | None) -> ReadResult | ReadFailure:
    """One record of a reply, whose vectors are raw bytes from now on, however they were written.

    Raises:
        BadReply: it is none, or could not be part of one.
    """
    format = format_of(content_type)
    if format is None:
        raise BadReply("a content type that no reply has")
    try:
        reply = read_reply(value or b"", msgpack=format == "msgpack")
    except _UNDECODABLE as error:
        raise BadReply(type(error).__name__) from None
    if any(len(name or "") > _LONGEST_NAME for name in (reply.id, reply.model, reply.model_version)):
        raise BadReply(f"a name of more than {_LONGEST_NAME} characters")
    return reply if isinstance(reply, ReadFailure) else _checked_part(reply)


def check_whole(parts: Sequence[ReadResult], asked: Asked) -> None:
    """That these are all parts of one result to this job.

    Raises:
        BadReply: they are not.
    """
    head = parts[0]
    if any((part.dimensions, part.dtype) != (head.dimensions, head.dtype) for part in parts):
        raise BadReply("parts that disagree about `dimensions` or `dtype`")
    if asked.dtype not in (None, head.dtype):
        raise BadReply("another `dtype` than was asked for")
    if asked.dimensions not in (None, head.dimensions):
        raise BadReply("another number of `dimensions` than was asked for")
    data = [datum for part in parts for datum in part.data]
    width = 4 * head.dimensions if head.dtype != "binary" else head.dimensions // 8
    if sum(datum.error is not None for datum in data) * width > _MOST_EMPTY_BYTES:
        raise BadReply("more inputs without a vector than anybody could have sent")
    spanned = [datum.span is not None for datum in data if datum.error is None]
    chunked = any(spanned)
    if chunked and (asked.late is False or not all(spanned)):
        raise BadReply("`span` where no input was split, or not everywhere")
    if asked.late and not all(spanned):
        raise BadReply("no `span` where inputs are split")
    if chunked:
        _check_spans(data)
        indices: Iterable[int] = dict.fromkeys(datum.index for datum in data)
    else:
        indices = [datum.index for datum in data]
    found = list(indices)
    if found != list(range(len(found))) or asked.count not in (None, len(found)):
        raise BadReply("not one outcome for each input, in order")


def _check_spans(data: Sequence[ReadDatum]) -> None:
    """Each input's spans follow each other, in the order of inputs; one that failed has a single datum."""
    before: ReadDatum | None = None
    for datum in data:
        if before is not None and before.index == datum.index:
            if before.span is None or datum.span is None or datum.span[0] < before.span[1]:
                raise BadReply("spans that overlap, or more of an input that failed")
        elif before is not None and datum.index != before.index + 1:
            raise BadReply("not one outcome for each input, in order")
        before = datum


def _checked_part(part: ReadResult) -> ReadResult:
    if not 1 <= part.parts <= _MOST_PARTS or not 0 <= part.part < part.parts:
        raise BadReply("`part` and `parts` that cannot be")
    if not 1 <= part.dimensions <= _MOST_DIMENSIONS or (part.dtype == "binary" and part.dimensions % 8):
        raise BadReply("`dimensions` that cannot be")
    if not part.data:
        raise BadReply("no `data`")
    if part.usage is not None and not _are_counts(part.usage.prompt_tokens, part.usage.total_tokens):
        raise BadReply("`usage` that cannot be")
    # A client that streams looks at thousands of these a second: lists at once, and a closer look at what is unusual.
    spans = [datum.span for datum in part.data if datum.span is not None]
    counts = [datum.index for datum in part.data]
    counts += [datum.tokens or 0 for datum in part.data]
    counts += [number for span in spans for number in span]
    if not _are_counts(min(counts), max(counts)) or any(start > end for start, end in spans):
        raise BadReply("`index`, `tokens` or `span` that cannot be")
    width = vector_bytes(part.dimensions, part.dtype)
    plain = part.dtype != "int8"
    data = [
        datum
        if plain and datum.error is None and type(datum.embedding) is bytes and len(datum.embedding) == width
        else _checked_datum(datum, part)
        for datum in part.data
    ]
    _check_finite([datum.embedding for datum in data if datum.error is None], part.dtype)
    return msgspec.structs.replace(part, data=data)


def _are_counts(*numbers: int) -> bool:
    return all(0 <= number <= _MOST for number in numbers)


def _checked_datum(datum: ReadDatum, part: ReadResult) -> ReadDatum:
    """The same with its vector as bytes; none if the input failed."""
    if datum.error is not None:
        return datum if datum.embedding is None else msgspec.structs.replace(datum, embedding=None)
    if part.dtype == "int8" and (datum.scale is None or not 0 < datum.scale < _LARGEST_SCALE):
        raise BadReply("int8 without a `scale` above 0, or with one that makes infinity")
    raw = _raw(datum.embedding, part.dtype)
    if len(raw) != vector_bytes(part.dimensions, part.dtype):
        raise BadReply("an `embedding` of another length than `dimensions` and `dtype` say")
    return datum if raw is datum.embedding else msgspec.structs.replace(datum, embedding=raw)


def _raw(written: Any, dtype: Dtype) -> bytes:
    """A vector's bytes from the way it was written: those bytes, base64 text or numbers."""
    match written:
        case bytes():
            return written
        case str():
            try:
                return base64.b64decode(written, validate=True)
            except (binascii.Error, ValueError):
                raise BadReply("an `embedding` that is not base64") from None
        case list() if all(type(number) in _NUMBERS[dtype] for number in written):
            try:
                with np.errstate(over="ignore"):  # infinity is found by whoever looks for it
                    return np.array(written, dtype=NUMPY[dtype]).tobytes()
            except (ValueError, OverflowError):
                raise BadReply("an `embedding` with a number that `dtype` does not have") from None
    raise BadReply("an `embedding` that is neither bytes, base64 nor numbers")


def _check_finite(vectors: Sequence[bytes], dtype: Dtype) -> None:
    if (
        dtype in ("float32", "float16")
        and not np.isfinite(np.frombuffer(b"".join(vectors), NUMPY[dtype])).all()
    ):
        raise BadReply("an `embedding` with NaN or infinity")
