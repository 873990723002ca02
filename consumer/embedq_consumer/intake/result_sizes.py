"""Upper bounds of what a job's results take, on the wire and in memory. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from embedq_consumer.fairness import Cost
from embedq_consumer.intake.jobs import JobState, Request
from embedq_consumer.intake.records import Record
from embedq_shared.codec import Format
from embedq_shared.headers import JobHeaders
from embedq_shared.messages import Dtype, EncodingFormat
from embedq_shared.vectors import vector_bytes

_RESULT_OVERHEAD: Final = 1024
"""Bytes of a result around its vectors: field names, numbers and brackets, with plenty to spare."""
_DATUM_OVERHEAD: Final = 192
"""Bytes of one input in a result around its vector: index, tokens, flags and brackets."""
_DECIMAL_BYTES: Final = {"float32": 16, "float16": 16, "int8": 5, "binary": 4}
"""The longest decimals: `-1.2345679e-10,` for float32, and as long for float16; `-128,` for int8; `255,` for binary."""


def fixed_bytes(record: Record, headers: JobHeaders, request: Request) -> int:
    """Upper bound of what each part of a result holds in addition to its vectors."""
    echoed = 0
    for name, value in headers.echo:
        echoed += len(name) + len(value) + 8
    if request.answer is not None:
        return _RESULT_OVERHEAD + echoed + request.answer.size
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
    return _datum_bytes(request.dimensions, request.dtype, request.format, request.encoding)


@lru_cache(maxsize=4096)
def _datum_bytes(dimensions: int, dtype: Dtype, format: Format, encoding: EncodingFormat) -> int:
    raw = vector_bytes(dimensions, dtype)
    if format == "msgpack":
        return _DATUM_OVERHEAD + raw
    if encoding == "base64":
        return _DATUM_OVERHEAD + (raw + 2) // 3 * 4
    return _DATUM_OVERHEAD + (raw if dtype == "binary" else dimensions) * _DECIMAL_BYTES[dtype]


def cost_of(job: JobState) -> Cost:
    """What a started job takes: its distinct texts, and a generous estimate of what its results take in memory.

    Copies of an input cost no computing; but the result repeats their vectors, and is held until the brokers have it.
    """
    request = job.request
    return Cost(len(job.distinct), held_bytes(request, job.encoder.hidden_size, len(job.distinct)))


def held_bytes(request: Request, hidden_size: int, distinct: int | None = None) -> int:
    """What a job's vectors may take in memory, before anything is tokenized; `distinct` of its texts differ, or all."""
    distinct = len(request.texts) if distinct is None else distinct
    wire = datum_bytes(request)
    if request.chunk is None:
        return len(request.texts) * wire
    # Windows run in different micro-batches, and the first ones' raw vectors wait in memory for the last one's.
    each = max(wire, 8 * hidden_size)
    if request.late:
        return each * min(request.max_spans, _most_spans(request))
    return distinct * each + (len(request.texts) - distinct) * wire


def _most_spans(request: Request) -> int:
    """Upper bound of a job's spans: a token is at least one byte, and a span at least three quarters full."""
    if request.chunk is None or request.chunk.tokens is None:
        raise RuntimeError("a request without chunks has no spans. This is a bug.")
    least = request.chunk.tokens - request.chunk.tokens // 4
    return sum(1 + len(text) * (1 if text.isascii() else 4) // least for text in request.texts)
