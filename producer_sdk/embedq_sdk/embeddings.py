"""What a client reads of results, and how parts become one answer. Nothing here does I/O."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_sdk.errors import EmbedError, MixedModelVersions, PartialFailure, job_failed
from embedq_shared.messages import Dtype, Timings, Usage
from embedq_shared.vectors import NUMPY, dequantize

Vectors = npt.NDArray[Any]


class ReadError(msgspec.Struct, frozen=True, gc=False):
    """An error on the wire. `code` may be one that this version does not know."""

    code: str
    message: str = ""
    param: str | None = None
    retryable: bool = False


class ReadDatum(msgspec.Struct, frozen=True, gc=False):
    """The outcome of one input, or of one span of it: a vector as it was written, or an error."""

    index: int
    embedding: Any = None
    tokens: int | None = None
    truncated: bool | None = None
    cached: bool | None = None
    scale: float | None = None
    span: tuple[int, int] | None = None
    error: ReadError | None = None


class Chunk(msgspec.Struct, frozen=True, eq=False):
    """One span of a text and its vector: `[start, end)` in characters, as Python counts and slices them.

    `vector` is float32 (dimensions,), or uint8 (dimensions / 8,) with dtype "binary". `tokens` are the span's own.
    """

    start: int
    end: int
    tokens: int
    vector: Vectors

    def of(self, text: str) -> str:
        """Its part of the text that was sent."""
        return text[self.start : self.end]


class ReadResult(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """One result record, perhaps one part of several. More lenient than the contract, so that a newer service fits."""

    id: str
    model: str
    model_version: str
    dimensions: int
    dtype: Dtype
    data: list[ReadDatum]
    usage: Usage | None = None
    timings: Timings = Timings()
    metadata: Any = None
    part: int = 0
    parts: int = 1


class ReadFailure(msgspec.Struct, frozen=True, tag_field="object", tag="error"):
    """The answer to a job that failed whole."""

    error: ReadError
    id: str | None = None
    model: str | None = None
    model_version: str | None = None
    metadata: Any = None


_Reply = ReadResult | ReadFailure
_msgpack: Final[msgspec.msgpack.Decoder[_Reply]] = msgspec.msgpack.Decoder(_Reply)
_json: Final[msgspec.json.Decoder[_Reply]] = msgspec.json.Decoder(_Reply)


def read_reply(value: bytes, *, msgpack: bool) -> ReadResult | ReadFailure:
    """A result record's value.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is none.
    """
    return _msgpack.decode(value) if msgpack else _json.decode(value)


@dataclass(slots=True)
class PartJoiner:
    """Collects the parts of one job's answer, in any order, each perhaps several times.

    A job may be answered twice and by different models if a reload lies between, so parts are only joined with
    parts of the same model version.
    """

    _seen: dict[tuple[str, int], dict[int, ReadResult]] | None = None

    def add(self, result: ReadResult) -> list[ReadResult] | None:
        """All parts in order once the last one is there, else None."""
        if result.parts == 1:
            return [result]
        if self._seen is None:
            self._seen = {}
        parts = self._seen.setdefault((result.model_version, result.parts), {})
        parts[result.part] = result
        return [parts[n] for n in sorted(parts)] if len(parts) == result.parts else None


def vector(datum: ReadDatum, dtype: Dtype) -> Vectors:
    """One vector: float32, or for binary uint8 with eight dimensions in each byte, first dimension highest."""
    raw = datum.embedding
    if isinstance(raw, list):
        if dtype == "int8":
            return np.asarray(raw, dtype=np.float32) * np.float32(1.0 if datum.scale is None else datum.scale)
        return np.asarray(raw, dtype=np.uint8 if dtype == "binary" else np.float32)
    if isinstance(raw, str):
        raw = base64.b64decode(raw)
    if dtype == "binary":
        return np.frombuffer(raw, dtype=np.uint8).copy()
    return dequantize(raw, dtype, datum.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """The vectors of one call, and where they came from. Arrays have one row for each input, in the inputs' order; with
    late chunks one for each span, in the order of inputs and text, and `inputs` and `spans` say which.

    `vectors` is float32 (rows, dimensions); with dtype "binary" it is uint8 (rows, dimensions / 8), which
    `numpy.unpackbits(..., axis=1)` expands. An input that failed has one row of zeros, and its error is in `errors`.
    """

    vectors: Vectors
    model: str
    model_versions: list[str | None]
    """Each row's model version; None where the whole job failed."""
    dimensions: int
    dtype: Dtype
    tokens: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    cached: npt.NDArray[np.bool_]
    errors: dict[int, EmbedError]
    """By row."""
    timings: tuple[Timings, ...]
    """The service's seconds for each job that the call took."""
    metadata: Any
    inputs: npt.NDArray[np.int64]
    """Each row's input: 0, 1, 2, … but for late chunks."""
    spans: npt.NDArray[np.int64] | None
    """(rows, 2): each row's `[start, end)` in its input, with late chunks alone; 0, 0 for an input that failed."""
    total_tokens: int
    """Tokens that were run, after any cut."""

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def model_version(self) -> str:
        """The one model version of all vectors.

        Raises:
            MixedModelVersions: there are several, which only a call with `allow_mixed=True` returns.
        """
        found = {version for version in self.model_versions if version is not None}
        if len(found) != 1:
            raise mixed(self.model_versions)
        return found.pop()

    def chunks(self) -> list[list[Chunk]]:
        """The spans of each input, in order; none for one that failed. An input without late chunks has none either."""
        found: list[list[Chunk]] = [[] for _ in range(self.count)]
        for row, (start, end) in enumerate([] if self.spans is None else self.spans.tolist()):
            if row not in self.errors:
                chunk = Chunk(start, end, int(self.tokens[row]), self.vectors[row])
                found[self.inputs[row]].append(chunk)
        return found

    @property
    def count(self) -> int:
        """How many inputs there are."""
        return int(self.inputs[-1]) + 1

    def masked(self) -> np.ma.MaskedArray[Any, Any]:
        """The vectors with the failed rows masked."""
        mask = np.zeros(self.vectors.shape, dtype=bool)
        mask[list(self.errors)] = True
        return np.ma.MaskedArray(self.vectors, mask=mask)

    def checked(self) -> Embeddings:
        """Itself.

        Raises:
            EmbedError: every input failed; it is the first one's error.
            PartialFailure: some did.
        """
        if not self.errors:
            return self
        row, first = min(self.errors.items())
        if len(self.errors) == len(self):
            raise first
        raise PartialFailure(
            vectors=self.masked(),
            errors=dict(sorted(self.errors.items())),
            failed=len(self.errors),
            total=self.count,
            index=int(self.inputs[row]),
            first=str(first),
        )


def mixed(versions: Sequence[str | None]) -> MixedModelVersions:
    """The error for vectors of several versions."""
    shown = ", ".join(sorted({version[:15] for version in versions if version is not None}))
    return MixedModelVersions(versions=list(versions), shown=shown or "none")


Outcome = list[ReadResult] | EmbedError
"""One job's end: its parts, or why it failed whole."""


def assemble(jobs: Iterable[tuple[int, Outcome]]) -> Embeddings:
    """One array of several jobs' outcomes, each given with its number of inputs, in order.

    Raises:
        EmbedError: not one job has a result; it is the first one's error.
    """
    jobs = list(jobs)
    head = next((outcome[0] for _, outcome in jobs if isinstance(outcome, list)), None)
    if head is None:
        raise next(outcome for _, outcome in jobs if isinstance(outcome, EmbedError))
    chunked = any(_chunked(outcome) for _, outcome in jobs)
    total = sum(_rows(count, outcome) for count, outcome in jobs)
    width = head.dimensions // 8 if head.dtype == "binary" else head.dimensions
    out = np.zeros((total, width), dtype=np.uint8 if head.dtype == "binary" else np.float32)
    versions: list[str | None] = [None] * total
    tokens = np.zeros(total, dtype=np.int64)
    truncated = np.zeros(total, dtype=np.bool_)
    cached = np.zeros(total, dtype=np.bool_)
    inputs = np.arange(total, dtype=np.int64)
    spans = np.zeros((total, 2), dtype=np.int64) if chunked else None
    errors: dict[int, EmbedError] = {}
    timings: list[Timings] = []
    ran = start = first_input = 0
    for count, outcome in jobs:
        if isinstance(outcome, EmbedError):
            errors.update(dict.fromkeys(range(start, start + count), outcome))
            inputs[start : start + count] = np.arange(first_input, first_input + count)
            start += count
            first_input += count
            continue
        timings.append(outcome[0].timings)
        ran += _tokens(outcome)
        in_order = _chunked(outcome)
        row = start
        for part in outcome:
            if part.dimensions != head.dimensions:
                # A reload changed the hidden size; the rows can't stand in one array.
                raise mixed([head.model_version, part.model_version])
            rows = [row + n if in_order else start + datum.index for n, datum in enumerate(part.data)]
            _fill(out, part, rows)
            for row, datum in zip(rows, part.data, strict=True):
                versions[row] = part.model_version
                tokens[row] = datum.tokens or 0
                truncated[row] = bool(datum.truncated)
                cached[row] = bool(datum.cached)
                inputs[row] = first_input + datum.index
                if spans is not None and datum.span is not None:
                    spans[row] = datum.span
                if datum.error is not None:
                    errors[row] = job_failed(datum.error)
            row = rows[-1] + 1 if rows else row
        start += _rows(count, outcome)
        first_input += count
    return Embeddings(
        out,
        head.model,
        versions,
        head.dimensions,
        head.dtype,
        tokens,
        truncated,
        cached,
        errors,
        tuple(timings),
        head.metadata,
        inputs,
        spans,
        ran,
    )


def _chunked(outcome: Outcome) -> bool:
    """Whether an input may have several rows here."""
    return isinstance(outcome, list) and any(d.span is not None for part in outcome for d in part.data)


def _rows(count: int, outcome: Outcome) -> int:
    """How many rows a job of `count` inputs gets."""
    if isinstance(outcome, list) and _chunked(outcome):
        return sum(len(part.data) for part in outcome)
    return count


def _tokens(outcome: list[ReadResult]) -> int:
    """What was run for a job; each part says it of the whole. A service that does not say so ran what its data tell."""
    usage = outcome[0].usage
    return sum(d.tokens or 0 for part in outcome for d in part.data) if usage is None else usage.total_tokens


def _fill(out: Vectors, part: ReadResult, rows: list[int]) -> None:
    """Write a part's vectors into their rows."""
    data = part.data
    plain = part.dtype != "int8" and all(isinstance(datum.embedding, bytes) for datum in data)
    if plain and rows and rows[-1] - rows[0] == len(rows) - 1:
        joined = np.frombuffer(b"".join([datum.embedding for datum in data]), dtype=NUMPY[part.dtype])
        out[rows[0] : rows[0] + len(rows)] = joined.reshape(len(rows), -1)
        return
    for row, datum in zip(rows, data, strict=True):
        if datum.error is None:
            out[row] = vector(datum, part.dtype)
