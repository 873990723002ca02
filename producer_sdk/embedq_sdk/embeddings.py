"""What a client reads of results, and how the parts of several jobs become one array. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_sdk.errors import (
    EmbedError,
    Expired,
    InternalError,
    InvalidJob,
    JobFailed,
    MixedModelVersions,
    NonFinite,
    PartialFailure,
    ServiceOverloaded,
    TextTooLong,
    UnknownModel,
    UnknownModelVersion,
)
from embedq_sdk.shown import Shown
from embedq_shared.messages import Dtype, Timings, Usage
from embedq_shared.vectors import NUMPY, dequantize

Vectors = npt.NDArray[Any]


class ReadError(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An error on the wire, read leniently: only `code` must be there, and this version may not know it."""

    code: str
    message: str = ""
    param: str | None = None
    retryable: bool = False


_BY_CODE: Final[dict[str, type[JobFailed]]] = {
    "malformed": InvalidJob,
    "unknown_field": InvalidJob,
    "invalid_value": InvalidJob,
    "invalid_header": InvalidJob,
    "unsupported_content_type": InvalidJob,
    "too_many_inputs": InvalidJob,
    "result_too_large": InvalidJob,
    "crashed": InvalidJob,
    "text_too_long": TextTooLong,
    "unknown_model": UnknownModel,
    "unknown_model_version": UnknownModelVersion,
    "expired": Expired,
    "non_finite": NonFinite,
    "overloaded": ServiceOverloaded,
    "internal": InternalError,
}


def job_failed(error: ReadError) -> JobFailed:
    """The exception for an error on the wire; a code that this version does not know becomes a plain JobFailed."""
    kind = _BY_CODE.get(error.code, JobFailed)
    return kind(code=error.code, message=error.message, param=error.param, retryable=error.retryable)


class ReadDatum(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The outcome of one input, or of one span of it: a vector as it was written, or an error."""

    index: int
    embedding: Any = None
    tokens: int | None = None
    truncated: bool | None = None
    cached: bool | None = None
    scale: float | None = None
    span: tuple[int, int] | None = None
    error: ReadError | None = None


class Chunk(Shown, frozen=True, kw_only=True, eq=False):
    """One span of a text and its vector: `[start, end)` in characters, as Python counts and slices them.

    `vector` is float32 (dimensions,), or uint8 (dimensions / 8,) with dtype "binary"; `tokens` is the length of the
    span alone.
    """

    start: int
    end: int
    tokens: int
    vector: Vectors

    def of(self, text: str) -> str:
        """The span's part of `text`, the text that was sent."""
        return text[self.start : self.end]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Vectors:
        """The vector, so that numpy takes a list of chunks as (chunks, dimensions)."""
        return as_array(self.vector, dtype, copy)


class ReadResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """One result record, perhaps one part of several. More lenient than the contract, to read newer services too.

    What is made of several, by `assemble` and others, was checked before (`reply_checks`).
    """

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


class ReadFailure(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="error"):
    """The reply to a job of which every input failed."""

    error: ReadError
    id: str | None = None
    model: str | None = None
    model_version: str | None = None
    metadata: Any = None


_Reply = ReadResult | ReadFailure
_msgpack: Final[msgspec.msgpack.Decoder[_Reply]] = msgspec.msgpack.Decoder(_Reply)
_json: Final[msgspec.json.Decoder[_Reply]] = msgspec.json.Decoder(_Reply)


def read_reply(value: bytes, *, msgpack: bool) -> ReadResult | ReadFailure:
    """A result record's value, whose vectors nobody has looked at yet; `reply_checks` does.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is not one.
    """
    return _msgpack.decode(value) if msgpack else _json.decode(value)


_MOST_ATTEMPTS: Final = 8
"""Of a job to be answered whose parts are held at once: two are common, and each more is somebody else's doing."""


class PartJoiner:
    """Collects the parts of one job's result. They may arrive in any order, and more than once.

    Invariant: only parts of the same model version are joined, since a job that is processed twice with a reload in
    between is answered by two models.
    """

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], dict[int, ReadResult]] = {}

    def add(self, result: ReadResult) -> list[ReadResult] | None:
        """All parts in order once the last one has arrived, else None."""
        if result.parts == 1:
            return [result]
        parts = self._parts.setdefault((result.model_version, result.parts), {})
        parts[result.part] = result
        if len(self._parts) > _MOST_ATTEMPTS:
            self._parts.pop(next(iter(self._parts)))
        return [parts[n] for n in sorted(parts)] if len(parts) == result.parts else None


def vector(datum: ReadDatum, dtype: Dtype) -> Vectors:
    """One vector that was checked: float32, or for binary uint8 with eight dimensions in each byte, first one highest."""
    if dtype == "binary":
        return np.frombuffer(datum.embedding, dtype=np.uint8).copy()
    return dequantize(datum.embedding, dtype, datum.scale)


def as_array(vectors: Vectors, dtype: npt.DTypeLike | None, copy: bool | None) -> Vectors:
    """What `__array__` returns, by numpy's rules for `dtype` and `copy`: the same array if it can be."""
    if dtype is None or np.dtype(dtype) == vectors.dtype:
        return vectors.copy() if copy else vectors
    if copy is False:
        raise ValueError(f"vectors of {vectors.dtype} are not {np.dtype(dtype)} without a copy")
    return vectors.astype(dtype)


class Embeddings(Shown, frozen=True, kw_only=True, eq=False):
    """The vectors of one call, and where they came from.

    numpy takes it as `vectors`: `np.asarray(found)`, `len(found)`, `found[0]`, `found[2:5]` and iteration mean their rows.

    Arrays have one row for each input, in the order of the inputs; with late chunking one row for each span, in the
    order of inputs and text, and `inputs` and `spans` say which.

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
    """Seconds that the service took, for each job of the call."""
    metadata: Any
    inputs: npt.NDArray[np.int64]
    """Each row's input: 0, 1, 2, … except with late chunking."""
    spans: npt.NDArray[np.int64] | None
    """(rows, 2): each row's `[start, end)` in its input; 0, 0 for an input that failed. None without late chunking."""
    total_tokens: int
    """Tokens that were run, after truncation."""

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[Vectors]:
        return iter(self.vectors)

    def __getitem__(self, rows: Any) -> Any:
        """Rows, as of an array."""
        return self.vectors[rows]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Vectors:
        """The vectors, (rows, dimensions)."""
        return as_array(self.vectors, dtype, copy)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `vectors`."""
        return self.vectors.shape

    def _facts(self) -> Iterator[tuple[str, Any]]:
        """What is worth seeing: the vectors, who made them, and counts."""
        yield "vectors", self.vectors
        yield "model", self.model
        versions = sorted({version for version in self.model_versions if version is not None})
        yield ("model_version", versions[0]) if len(versions) == 1 else ("model_versions", versions)
        if self.spans is not None:
            yield "inputs", self.count
        yield "total_tokens", self.total_tokens
        for name, rows in (("truncated", self.truncated), ("cached", self.cached)):
            if rows.any():
                yield name, int(rows.sum())
        if self.errors:
            yield "errors", self.errors

    @property
    def model_version(self) -> str:
        """The one model version of all vectors.

        Raises:
            MixedModelVersions: there are several, which only a call with `allow_mixed=True` returns.
        """
        versions = {version for version in self.model_versions if version is not None}
        if len(versions) != 1:
            raise mixed(self.model_versions)
        return versions.pop()

    def chunks(self) -> list[list[Chunk]]:
        """The spans of each input, in order; none for an input that failed or was not chunked."""
        chunks: list[list[Chunk]] = [[] for _ in range(self.count)]
        for row, (start, end) in enumerate([] if self.spans is None else self.spans.tolist()):
            if row not in self.errors:
                chunk = Chunk(start=start, end=end, tokens=int(self.tokens[row]), vector=self.vectors[row])
                chunks[self.inputs[row]].append(chunk)
        return chunks

    @property
    def count(self) -> int:
        """Number of inputs."""
        return int(self.inputs[-1]) + 1

    def masked(self) -> np.ma.MaskedArray[Any, Any]:
        """The vectors with the failed rows masked."""
        mask = np.zeros(self.vectors.shape, dtype=bool)
        mask[list(self.errors)] = True
        return np.ma.MaskedArray(self.vectors, mask=mask)

    def checked(self) -> Embeddings:
        """Returns itself if no input failed.

        Raises:
            EmbedError: every input failed; this is the first one's error.
            PartialFailure: some inputs failed.
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


JobOutcome = list[ReadResult] | EmbedError
"""How one job ended: the parts of its result, or why all of it failed."""


class FinishedJob(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A job that has ended: how many inputs it had, and its outcome."""

    count: int
    outcome: JobOutcome

    @property
    def model_version(self) -> str | None:
        """The model that made its vectors; None if all of it failed."""
        return self.outcome[0].model_version if isinstance(self.outcome, list) else None


def outdated(jobs: Sequence[FinishedJob]) -> list[int]:
    """Indices of the jobs whose vectors come from another model than the last job's.

    The last job was sent last, so its model is taken as the newest.
    """
    if len(jobs) == 1:
        return []
    versions = [job.model_version for job in jobs]
    newest = next((version for version in reversed(versions) if version is not None), None)
    return [n for n, version in enumerate(versions) if version is not None and version != newest]


def require_one_version(jobs: Iterable[FinishedJob]) -> None:
    """Check that one model made all vectors.

    Raises:
        MixedModelVersions: several did; its `versions` has one entry for each input.
    """
    versions = [job.model_version for job in jobs for _ in range(job.count)]
    if len(set(versions) - {None}) > 1:
        raise mixed(versions)


def assemble(jobs: Sequence[FinishedJob]) -> Embeddings:
    """The outcomes of several jobs as one array, in order.

    Raises:
        EmbedError: no job has a result; this is the first one's error.
        MixedModelVersions: a reload changed the number of dimensions.
    """
    head = next((job.outcome[0] for job in jobs if isinstance(job.outcome, list)), None)
    if head is None:
        raise next(job.outcome for job in jobs if isinstance(job.outcome, EmbedError))
    chunked = [_is_chunked(job.outcome) for job in jobs]
    counts = [_row_count(job, spans) for job, spans in zip(jobs, chunked, strict=True)]
    rows = _Rows(head, sum(counts), chunked=any(chunked))
    for job, spans, count in zip(jobs, chunked, counts, strict=True):
        rows.add(job, count, chunked=spans)
    return rows.embeddings()


class _Rows:
    """The arrays of an `Embeddings` while the jobs' rows are written into them, one job after the other."""

    def __init__(self, head: ReadResult, total: int, *, chunked: bool) -> None:
        self._head = head
        width = head.dimensions // 8 if head.dtype == "binary" else head.dimensions
        self._vectors = np.zeros((total, width), dtype=np.uint8 if head.dtype == "binary" else np.float32)
        self._versions: list[str | None] = [None] * total
        self._tokens = np.zeros(total, dtype=np.int64)
        self._truncated = np.zeros(total, dtype=np.bool_)
        self._cached = np.zeros(total, dtype=np.bool_)
        self._inputs = np.arange(total, dtype=np.int64)
        self._spans = np.zeros((total, 2), dtype=np.int64) if chunked else None
        self._errors: dict[int, EmbedError] = {}
        self._timings: list[Timings] = []
        self._total_tokens = 0
        self._row = 0
        """The next job's first row."""
        self._input = 0
        """The next job's first input."""

    def add(self, job: FinishedJob, count: int, *, chunked: bool) -> None:
        """Write the next job's `count` rows."""
        if isinstance(job.outcome, EmbedError):
            self._errors.update(dict.fromkeys(range(self._row, self._row + count), job.outcome))
            self._inputs[self._row : self._row + count] = np.arange(self._input, self._input + count)
        else:
            self._timings.append(job.outcome[0].timings)
            self._total_tokens += _token_count(job.outcome)
            next_row = self._row
            for part in job.outcome:
                if chunked:  # rows follow each other; otherwise an input's index is its row
                    rows = list(range(next_row, next_row + len(part.data)))
                    next_row += len(part.data)
                else:
                    rows = [self._row + datum.index for datum in part.data]
                self._add_part(part, rows)
        self._row += count
        self._input += job.count

    def _add_part(self, part: ReadResult, rows: list[int]) -> None:
        if part.dimensions != self._head.dimensions:
            # A reload changed the hidden size: the rows cannot be in one array.
            raise mixed([self._head.model_version, part.model_version])
        _fill(self._vectors, part, rows)
        version, versions, tokens = part.model_version, self._versions, self._tokens
        truncated, cached, inputs, spans = self._truncated, self._cached, self._inputs, self._spans
        for row, datum in zip(rows, part.data, strict=True):
            versions[row] = version
            tokens[row] = datum.tokens or 0
            truncated[row] = bool(datum.truncated)
            cached[row] = bool(datum.cached)
            inputs[row] = self._input + datum.index
            if spans is not None and datum.span is not None:
                spans[row] = datum.span
            if datum.error is not None:
                self._errors[row] = job_failed(datum.error)

    def embeddings(self) -> Embeddings:
        """The arrays, complete."""
        return Embeddings(
            vectors=self._vectors,
            model=self._head.model,
            model_versions=self._versions,
            dimensions=self._head.dimensions,
            dtype=self._head.dtype,
            tokens=self._tokens,
            truncated=self._truncated,
            cached=self._cached,
            errors=self._errors,
            timings=tuple(self._timings),
            metadata=self._head.metadata,
            inputs=self._inputs,
            spans=self._spans,
            total_tokens=self._total_tokens,
        )


def _is_chunked(outcome: JobOutcome) -> bool:
    """Whether an input may have several rows here."""
    return isinstance(outcome, list) and any(d.span is not None for part in outcome for d in part.data)


def _row_count(job: FinishedJob, chunked: bool) -> int:
    """Number of rows: one for each span, or one for each input."""
    if chunked and isinstance(job.outcome, list):
        return sum(len(part.data) for part in job.outcome)
    return job.count


def _token_count(parts: list[ReadResult]) -> int:
    """Tokens that were run for a job. Each part reports the whole job's usage; without usage, the data are summed."""
    usage = parts[0].usage
    return sum(d.tokens or 0 for part in parts for d in part.data) if usage is None else usage.total_tokens


def _fill(vectors: Vectors, part: ReadResult, rows: list[int]) -> None:
    """Write a part's vectors into their rows, in one copy where the rows are consecutive and the bytes are plain."""
    data = part.data
    plain = part.dtype != "int8" and all(datum.error is None for datum in data)
    if plain and rows and rows[-1] - rows[0] == len(rows) - 1:
        joined = np.frombuffer(b"".join([datum.embedding for datum in data]), dtype=NUMPY[part.dtype])
        vectors[rows[0] : rows[0] + len(rows)] = joined.reshape(len(rows), -1)
        return
    for row, datum in zip(rows, data, strict=True):
        if datum.error is None:
            vectors[row] = vector(datum, part.dtype)
