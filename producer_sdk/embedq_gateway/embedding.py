"""The one way from a request's texts to their vectors, whatever shape the request came in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import msgspec

from embedq_gateway.errors import ApiError, api_error
from embedq_gateway.fleet.fleet import Fleet
from embedq_gateway.http.exchange import Exchange
from embedq_gateway.http.hang_up import UntilHungUp
from embedq_gateway.joining import Client
from embedq_gateway.settings import GatewaySettings
from embedq_sdk.embeddings import FinishedJob, ReadDatum, job_failed
from embedq_sdk.errors import EmbedError
from embedq_sdk.job_options import JobOptions
from embedq_shared.messages import Chunking, Dtype, InputType, Truncate
from embedq_shared.topics import Lane

_SAID: Final = 3
"""Failed inputs that an error names; the others are counted."""


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, the same for all texts. None means the service's default."""

    texts: list[str]
    alias: str | None = None
    model_version: str | None = None
    """The one that must answer."""
    dimensions: int | None = None
    dtype: Dtype | None = None
    input_type: InputType | None = None
    instruction: str | None = None
    truncate: Truncate | None = None
    chunk: Chunking | None = None


class EmbedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors of a request, all of one model. `data` has each input's, in order: raw bytes of `dtype`, little-endian."""

    alias: str
    model_version: str
    dimensions: int
    dtype: Dtype
    data: list[ReadDatum]
    tokens: int
    """That were run, after truncation."""


class Embedder:
    """Turns requests into answers: who asks may do so, the model is there, and the job runs until its client hangs up."""

    def __init__(self, client: Client, fleet: Fleet, settings: GatewaySettings) -> None:
        self._client = client
        self._fleet = fleet
        self._settings = settings

    async def embed(self, exchange: Exchange, request: EmbedRequest) -> EmbedAnswer:
        """The vectors of a request. One input that fails fails it all, as in OpenAI's interface.

        Raises:
            ApiError: the caller may not, or has asked for what cannot be.
            EmbedError: what the SDK says.
            HungUp: the client has gone.
        """
        caller = exchange.require("embed")
        settings = self._settings
        alias = settings.default_alias if request.alias is None else request.alias
        caller.require_alias(alias)
        timeout = exchange.timeout(settings.timeout_s, settings.max_timeout_s)
        options = _options(
            alias,
            request.model_version,
            request.dimensions,
            request.dtype,
            request.input_type,
            request.instruction,
            request.truncate,
            request.chunk,
            caller.lane_for(exchange.lane()),
            caller.client_id,
        )
        if (trace := exchange.trace()) is not None:
            options = msgspec.structs.replace(options, trace=trace)
        exchange.texts = len(request.texts)
        if len(request.texts) > settings.max_inputs:
            raise ApiError("too_many_inputs", f"expected at most {settings.max_inputs:,} texts", "input")
        if self._fleet.is_unknown(alias, time.time()):
            raise ApiError("unknown_model", "no replica serves a model of this name", "model")
        with caller.admit(characters=sum(map(len, request.texts)), texts=len(request.texts)) as admitted:
            with UntilHungUp(exchange):
                finished = await self._client.embed_raw(request.texts, options, timeout=timeout)
            answer = joined(finished, alias)
            exchange.tokens = answer.tokens
            admitted.settle(answer.tokens)
        exchange.own_headers += admitted.headers()
        return answer


@lru_cache(maxsize=256)  # most requests ask for the same, and checking it costs more than looking it up
def _options(
    model: str,
    model_version: str | None,
    dimensions: int | None,
    dtype: Dtype | None,
    input_type: InputType | None,
    instruction: str | None,
    truncate: Truncate | None,
    chunk: Chunking | None,
    lane: Lane,
    client_id: str | None,
) -> JobOptions:
    return JobOptions(
        model=model,
        model_version=model_version,
        dimensions=dimensions,
        dtype=dtype,
        input_type=input_type,
        instruction=instruction,
        truncate=truncate,
        chunk=chunk,
        lane=lane,
        client_id=client_id,
    )


def joined(finished: Sequence[FinishedJob], alias: str) -> EmbedAnswer:
    """The outcomes of a request's jobs as one answer.

    Raises:
        EmbedError: the first job that failed whole.
        ApiError: some inputs failed.
    """
    first = finished[0].outcome
    if len(finished) == 1 and isinstance(first, list) and len(first) == 1:
        head, data = first[0], first[0].data  # one job in one record, as nearly all are
        tokens = _tokens(finished[0])
    else:
        data, tokens, offset = [], 0, 0
        for job in finished:
            if isinstance(job.outcome, EmbedError):
                raise job.outcome
            head = job.outcome[0]
            data += [
                datum if offset == 0 else msgspec.structs.replace(datum, index=datum.index + offset)
                for part in job.outcome
                for datum in part.data
            ]
            offset += job.count
            tokens += _tokens(job)
    if any(datum.error is not None for datum in data):
        raise _inputs_failed(data)
    return EmbedAnswer(
        alias=alias,
        model_version=head.model_version,
        dimensions=head.dimensions,
        dtype=head.dtype,
        data=data,
        tokens=tokens,
    )


def _inputs_failed(data: Sequence[ReadDatum]) -> ApiError:
    """The error of the first input that failed; its message counts the others."""
    failed = [datum for datum in data if datum.error is not None]
    first = failed[0]
    if first.error is None:
        raise RuntimeError("an input that failed has no error. This is a bug.")
    error = api_error(job_failed(first.error), index=first.index)
    if len(failed) > 1:
        others = ", ".join(str(datum.index) for datum in failed[1 : _SAID + 1])
        more = len(failed) - 1 - _SAID
        error.message += f" (and so did the inputs {others}{f' and {more} more' if more > 0 else ''})"
    return error


def _tokens(job: FinishedJob) -> int:
    """Tokens that were run for a job: each part reports the whole job's usage."""
    if not isinstance(job.outcome, list):
        return 0
    usage = job.outcome[0].usage
    if usage is None:
        return sum(datum.tokens or 0 for part in job.outcome for datum in part.data)
    return usage.total_tokens
