"""From a micro-batch's raw vectors to each input's outcome: finite, cut to the dimensions, normalized, quantized. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedq_consumer.batching import AssembledText, ComputedText, QueuedText, Settled, Vectors
from embedq_consumer.intake.jobs import InputVector, JobState, Span, Spans, input_param
from embedq_shared.messages import Dtype, ErrorBody
from embedq_shared.vectors import cut_and_normalize, quantize


def outcomes_of(texts: Sequence[ComputedText], vectors: Vectors) -> list[Settled]:
    """The outcome of each input that waited for a text of a micro-batch; `vectors` is float32 (texts, hidden_size)."""
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    settled: list[Settled] = []
    for (text, waiters), vector, usable in zip(texts, vectors, finite.tolist(), strict=True):
        made: dict[tuple[int, Dtype], tuple[bytes, float | None]] = {}
        for job, index in waiters:
            outcome = _vector_of(text, job, vector, made) if usable else _not_finite(job, index)
            settled.append((job, index, outcome))
    return settled


def assembled_outcomes_of(texts: Sequence[AssembledText]) -> list[Settled]:
    """The same for texts that ran in windows, each with all its rows: one of a mean, or one for each span."""
    settled: list[Settled] = []
    for text, rows, waiters in texts:
        if text.window is None:
            raise RuntimeError("a text without windows was assembled. This is a bug.")
        chunked, usable = text.window.of, bool(np.isfinite(rows).all())
        for job, index in waiters:
            request = job.request
            if not usable:
                settled.append((job, index, _not_finite(job, index)))
                continue
            made = [quantize(cut_and_normalize(row, request.dimensions), request.dtype) for row in rows]
            if request.late:
                spans = [
                    Span(piece.start, piece.end, piece.tokens, raw, scale)
                    for piece, (raw, scale) in zip(chunked.pieces, made, strict=True)
                ]
                settled.append((job, index, Spans(tuple(spans), chunked.tokens)))
            else:
                raw, scale = made[0]
                settled.append((job, index, InputVector(raw, chunked.tokens, None, scale, cached=False)))
    return settled


def _vector_of(
    text: QueuedText,
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
    cut = request.truncate if text.tokens.truncated and request.truncate != "error" else None
    return InputVector(raw, len(text.tokens.ids), cut, scale, cached=False)


def _not_finite(job: JobState, index: int) -> ErrorBody:
    param = input_param(job.request, index)
    return ErrorBody.of("non_finite", f"`{param}`: the model gave a vector that is not finite", param)
