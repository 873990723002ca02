"""From a micro-batch's raw vectors to each input's outcome: finite, cut to the dimensions, normalised, quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_consumer.admission import input_param
from embedq_consumer.engine import TextTooLong
from embedq_consumer.jobs import Answer, Item, Outcome, Request
from embedq_shared.messages import ErrorBody
from embedq_shared.vectors import cut_and_normalise, quantise


def outcomes_of(batch: Sequence[Item], vectors: npt.NDArray[np.float32]) -> list[Outcome]:
    """One outcome for each text of a micro-batch; `vectors` is float32 (len(batch), hidden_size)."""
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    return [
        _answer(item, vector) if usable else _not_finite(item)
        for item, vector, usable in zip(batch, vectors, finite.tolist(), strict=True)
    ]


def _answer(item: Item, vector: npt.NDArray[np.float32]) -> Answer:
    request = item.job.request
    raw, scale = quantise(cut_and_normalise(vector, request.dimensions), request.dtype)
    cut = request.truncate if item.truncated and request.truncate != "error" else None
    return Answer(raw, item.tokens, cut, scale, cached=False)


def _not_finite(item: Item) -> ErrorBody:
    param = input_param(item.job.request, item.index)
    return ErrorBody.of("non_finite", f"`{param}`: the model gave a vector that is not finite", param)


def too_long(request: Request, index: int, found: TextTooLong) -> ErrorBody:
    """A text over the model's limit in a job that does not allow a cut."""
    param = input_param(request, index)
    return ErrorBody.of(
        "text_too_long",
        f"`{param}`: expected at most {found.limit} tokens, special tokens included, got {found.tokens}; "
        "`truncate` may be start or end",
        param,
    )


def failed(item: Item) -> ErrorBody:
    """A text whose micro-batch failed even when it ran alone."""
    param = input_param(item.job.request, item.index)
    return ErrorBody.of("internal", f"`{param}`: the model could not run this input", param)


EXPIRED_WAITING: Final = ErrorBody.of(
    "expired", "header `deadline`: expected a time after the start of the job's micro-batch", "deadline"
)
