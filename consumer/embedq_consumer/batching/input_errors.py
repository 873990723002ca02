"""Why an input gets no vector, though its job was admitted: found when it is tokenized, queued or computed. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from embedq_consumer.engine import Chunked, Failed, Found, TextTooLong
from embedq_consumer.intake.jobs import JobState, Request, input_param, too_many_spans
from embedq_shared.messages import ErrorBody

ErrorOf = Callable[[Request, int], ErrorBody]
"""The error of one input of a job: equal inputs of several jobs share its cause, not its `param`."""

EXPIRED_IN_QUEUE: Final = ErrorBody.of(
    "expired", "header `deadline`: expected a time after the start of the job's micro-batch", "deadline"
)


def error_of(found: Found, request: Request, longest: int) -> ErrorOf | None:
    """Why a tokenized text is not run, if it is not; `longest` is how many tokens of one text fit into memory."""
    if isinstance(found, Failed):
        return lambda request, index: unreadable(request, index, found)
    if isinstance(found, TextTooLong):
        return lambda request, index: too_long(request, index, found)
    windows = found.windows if isinstance(found, Chunked) else (found,)
    tokens = max(len(window.ids) for window in windows)
    if tokens > longest:
        return lambda request, index: beyond_memory(request, index, tokens, longest)
    if request.late and isinstance(found, Chunked) and len(found.pieces) > request.max_spans:
        return lambda request, index: too_many_spans(request)
    return None


def unreadable(request: Request, index: int, found: Failed) -> ErrorBody:
    """A text that the model cannot take, whoever sends it and however often. The tokenizer's own words stay here: they may
    quote another job's text."""
    param = input_param(request, index)
    if found.beyond is None:
        return ErrorBody.of(
            "invalid_value", f"`{param}`: expected a text that the model's tokenizer can read", param
        )
    number, rows = found.beyond
    return ErrorBody.of(
        "invalid_value",
        f"`{param}`: expected tokens that the model has embeddings for, which are those below {rows}; one has the id {number}",
        param,
    )


def too_long(request: Request, index: int, found: TextTooLong) -> ErrorBody:
    """A text over the model's limit in a job that does not allow a cut."""
    param = input_param(request, index)
    if request.chunk is not None:
        return ErrorBody.of(
            "text_too_long",
            f"`{param}`: expected at most {found.limit} tokens that cannot be split (prompt and special tokens, or one "
            f"character of many tokens), got {found.tokens}",
            param,
        )
    return ErrorBody.of(
        "text_too_long",
        f"`{param}`: expected at most {found.limit} tokens, special tokens included, got {found.tokens}; "
        "set `truncate` to start or end, or set `chunk`",
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
