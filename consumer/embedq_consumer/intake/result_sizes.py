"""Upper bounds of what a job's results take, on the wire and in memory. Pure."""

from __future__ import annotations

from typing import Final

from embedq_consumer.intake.jobs import Request
from embedq_consumer.intake.records import Record
from embedq_shared.headers import JobHeaders
from embedq_shared.vectors import vector_bytes

# Bytes around the vectors: field names, numbers, and for each input index, tokens, flags and brackets.
_RESULT_OVERHEAD: Final = 1024


_DATUM_OVERHEAD: Final = 192


# The longest decimals: "-1.2345679e-10," for float32, and as long for float16; "-128," for int8; "255," for binary.
_DECIMAL_BYTES: Final = {"float32": 16, "float16": 16, "int8": 5, "binary": 4}


def fixed_bytes(record: Record, headers: JobHeaders, request: Request) -> int:
    """Upper bound of what each part of a result holds beside its vectors."""
    echoed = sum(len(name) + len(value) + 8 for name, value in headers.echo)
    key = len(record.key) if record.key is not None else 4 * len(request.id)
    # JSON writes a control character as six bytes.
    return (
        _RESULT_OVERHEAD
        + echoed
        + key
        + 6 * len(request.id.encode())
        + 6 * len(request.model)
        + len(bytes(request.metadata))
    )


def datum_bytes(request: Request) -> int:
    """Upper bound of one vector in a result."""
    raw = vector_bytes(request.dimensions, request.dtype)
    if request.format == "msgpack":
        return _DATUM_OVERHEAD + raw
    if request.encoding == "base64":
        return _DATUM_OVERHEAD + (raw + 2) // 3 * 4
    numbers = raw if request.dtype == "binary" else request.dimensions
    return _DATUM_OVERHEAD + numbers * _DECIMAL_BYTES[request.dtype]


def held_bytes(request: Request, hidden_size: int) -> int:
    """What a job's vectors may take in memory, a generous estimate before anything is tokenized."""
    if request.chunk is None:
        return len(request.texts) * datum_bytes(request)
    # Windows run in micro-batches of their own, and what is there of a text waits, as the model gave it, for the rest.
    each = max(datum_bytes(request), 8 * hidden_size)
    return each * (min(request.max_spans, _most_spans(request)) if request.late else len(request.texts))


def _most_spans(request: Request) -> int:
    """A token is a byte at least, and a span three quarters full."""
    assert request.chunk is not None
    assert request.chunk.tokens is not None
    least = request.chunk.tokens - request.chunk.tokens // 4
    return sum(1 + len(text) * (1 if text.isascii() else 4) // least for text in request.texts)
