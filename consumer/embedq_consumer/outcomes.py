"""From a micro-batch's raw vectors to each input's outcome: finite, cut to the dimensions, normalised, quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_consumer.admission import input_param
from embedq_consumer.engine import TextTooLong
from embedq_consumer.flights import Item, Waiter
from embedq_consumer.jobs import Answer, InFlight, Outcome, Request
from embedq_shared.messages import Dtype, ErrorBody
from embedq_shared.vectors import cut_and_normalise, quantise


def outcomes_of(
    landed: Sequence[tuple[Item, Sequence[Waiter]]], vectors: npt.NDArray[np.float32]
) -> list[tuple[InFlight, int, Outcome]]:
    """The outcome of each input that waited for a text of a micro-batch; `vectors` is float32 (texts, hidden_size)."""
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    found: list[tuple[InFlight, int, Outcome]] = []
    for (item, waiters), vector, usable in zip(landed, vectors, finite.tolist(), strict=True):
        made: dict[tuple[int, Dtype], tuple[bytes, float | None]] = {}
        for job, index in waiters:
            found.append(
                (job, index, _answer(item, job, vector, made) if usable else _not_finite(job, index))
            )
    return found


def _answer(
    item: Item,
    job: InFlight,
    vector: npt.NDArray[np.float32],
    made: dict[tuple[int, Dtype], tuple[bytes, float | None]],
) -> Answer:
    """`made` keeps what equal inputs of one text share."""
    request = job.request
    wanted = (request.dimensions, request.dtype)
    if wanted not in made:
        made[wanted] = quantise(cut_and_normalise(vector, request.dimensions), request.dtype)
    raw, scale = made[wanted]
    cut = request.truncate if item.text.truncated and request.truncate != "error" else None
    return Answer(raw, len(item.text.ids), cut, scale, cached=False)


def _not_finite(job: InFlight, index: int) -> ErrorBody:
    param = input_param(job.request, index)
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


def beyond_memory(request: Request, index: int, tokens: int, limit: int) -> ErrorBody:
    """A text that the model would take, but for which this replica's device has too little memory."""
    param = input_param(request, index)
    return ErrorBody.of(
        "text_too_long",
        f"`{param}`: expected at most {limit} tokens, special tokens included, which is what fits into this replica's "
        f"memory; got {tokens}",
        param,
    )


def failed(job: InFlight, index: int) -> ErrorBody:
    """A text whose micro-batch failed even when it ran alone."""
    param = input_param(job.request, index)
    return ErrorBody.of("internal", f"`{param}`: the model could not run this input", param)


EXPIRED_WAITING: Final = ErrorBody.of(
    "expired", "header `deadline`: expected a time after the start of the job's micro-batch", "deadline"
)
