"""From a micro-batch's raw vectors to each input's outcome: finite, cut to the dimensions, normalized, quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_consumer.batching.single_flight import Item, Waiter
from embedq_consumer.engine import Chunked, TextTooLong, Tokens
from embedq_consumer.intake.jobs import (
    InputVector,
    JobState,
    Outcome,
    Request,
    Span,
    Spans,
    input_param,
    too_many_spans,
)
from embedq_shared.messages import Dtype, ErrorBody
from embedq_shared.vectors import cut_and_normalize, quantize


def outcomes_of(
    landed: Sequence[tuple[Item, Sequence[Waiter]]], vectors: npt.NDArray[np.float32]
) -> list[tuple[JobState, int, Outcome]]:
    """The outcome of each input that waited for a text of a micro-batch; `vectors` is float32 (texts, hidden_size)."""
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    found: list[tuple[JobState, int, Outcome]] = []
    for (item, waiters), vector, usable in zip(landed, vectors, finite.tolist(), strict=True):
        made: dict[tuple[int, Dtype], tuple[bytes, float | None]] = {}
        for job, index in waiters:
            found.append(
                (job, index, _answer(item, job, vector, made) if usable else _not_finite(job, index))
            )
    return found


def chunked_outcomes_of(
    landed: Sequence[tuple[Item, npt.NDArray[np.float32], Sequence[Waiter]]],
) -> list[tuple[JobState, int, Outcome]]:
    """The same for texts that ran in windows, each with all its rows: one of a mean, or one for each piece."""
    found: list[tuple[JobState, int, Outcome]] = []
    for item, rows, waiters in landed:
        if item.window is None:
            raise RuntimeError("a text without windows was gathered. This is a bug.")
        chunked, usable = item.window.of, bool(np.isfinite(rows).all())
        for job, index in waiters:
            request = job.request
            if not usable:
                found.append((job, index, _not_finite(job, index)))
                continue
            made = [quantize(cut_and_normalize(row, request.dimensions), request.dtype) for row in rows]
            if request.late:
                spans = [
                    Span(piece.start, piece.end, piece.tokens, raw, scale)
                    for piece, (raw, scale) in zip(chunked.pieces, made, strict=True)
                ]
                found.append((job, index, Spans(tuple(spans), chunked.tokens)))
            else:
                raw, scale = made[0]
                found.append((job, index, InputVector(raw, chunked.tokens, None, scale, cached=False)))
    return found


def _answer(
    item: Item,
    job: JobState,
    vector: npt.NDArray[np.float32],
    made: dict[tuple[int, Dtype], tuple[bytes, float | None]],
) -> InputVector:
    """`made` keeps what equal inputs of one text share."""
    request = job.request
    wanted = (request.dimensions, request.dtype)
    if wanted not in made:
        made[wanted] = quantize(cut_and_normalize(vector, request.dimensions), request.dtype)
    raw, scale = made[wanted]
    cut = request.truncate if item.text.truncated and request.truncate != "error" else None
    return InputVector(raw, len(item.text.ids), cut, scale, cached=False)


def _not_finite(job: JobState, index: int) -> ErrorBody:
    param = input_param(job.request, index)
    return ErrorBody.of("non_finite", f"`{param}`: the model gave a vector that is not finite", param)


ErrorOf = Callable[[Request, int], ErrorBody]
"""The error of one input of a job."""


def refusal_of(found: Tokens | Chunked | TextTooLong, request: Request, longest: int) -> ErrorOf | None:
    """Why a tokenized text is not run, if it is not; `longest` tokens are what memory has room for."""
    if isinstance(found, TextTooLong):
        return lambda request, index: too_long(request, index, found)
    windows = found.windows if isinstance(found, Chunked) else (found,)
    tokens = max(len(window.ids) for window in windows)
    if tokens > longest:
        return lambda request, index: beyond_memory(request, index, tokens, longest)
    if request.late and isinstance(found, Chunked) and len(found.pieces) > request.max_spans:
        return lambda request, index: too_many_spans(request)
    return None


def too_long(request: Request, index: int, found: TextTooLong) -> ErrorBody:
    """A text over the model's limit in a job that does not allow a cut."""
    param = input_param(request, index)
    if request.chunk is not None:
        return ErrorBody.of(
            "text_too_long",
            f"`{param}`: expected at most {found.limit} tokens that no cut can part (prompt and special tokens, or one "
            f"character of many tokens), got {found.tokens}",
            param,
        )
    return ErrorBody.of(
        "text_too_long",
        f"`{param}`: expected at most {found.limit} tokens, special tokens included, got {found.tokens}; "
        "`truncate` may be start or end, or `chunk` may be there",
        param,
    )


def beyond_memory(request: Request, index: int, tokens: int, limit: int) -> ErrorBody:
    """A text that the model would take, but for which this replica's device has too little memory."""
    param = input_param(request, index)
    return ErrorBody.of(
        "text_too_long",
        f"`{param}`: expected at most {limit} tokens, special tokens included, which is what fits into this replica's "
        f"memory; got {tokens}",
        param,
    )


def failed(job: JobState, index: int) -> ErrorBody:
    """A text whose micro-batch failed even when it ran alone."""
    param = input_param(job.request, index)
    return ErrorBody.of("internal", f"`{param}`: the model could not run this input", param)


EXPIRED_WAITING: Final = ErrorBody.of(
    "expired", "header `deadline`: expected a time after the start of the job's micro-batch", "deadline"
)
