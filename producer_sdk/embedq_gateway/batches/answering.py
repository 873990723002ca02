"""A line of a batch, run as the same body would be over HTTP, but in the bulk lane and with all the time that the batch has."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from embedq_gateway.batches.batch import Batch
from embedq_gateway.batches.running.lines import Answer
from embedq_gateway.batches.running.runner import TryAgain
from embedq_gateway.dialects.openai import embed_request, embedding_list, read_job
from embedq_gateway.embedding import joined
from embedq_gateway.errors import ApiError, api_error
from embedq_gateway.joining import Client, JoiningClient
from embedq_gateway.keys.caller import client_id
from embedq_gateway.settings import GatewaySettings
from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    EmbedError,
    Expired,
    KafkaUnavailable,
    MixedModelVersions,
    Overloaded,
    ServiceOverloaded,
    TopicMissing,
)
from embedq_sdk.job_options import JobOptions
from embedq_shared.codec import BadJob

MAX_ATTEMPTS: Final = 3
"""Of a job whose answer is an error that may heal. The service has tried a bulk job several times before it says so."""

JOINED_TEXTS: Final = 32
"""Texts of lines that share a job, as in the SDK's streams: a record of Kafka costs as much as a few texts."""
_STEP_S: Final = 60.0
"""A job's deadline may be so much later than its batch's end, which does not wait for it."""

_NOT_NOW: Final = (
    ClientClosed,
    DeadlineExceeded,
    Expired,
    KafkaUnavailable,
    MixedModelVersions,
    Overloaded,
    ServiceOverloaded,
    TopicMissing,
)
"""What says nothing about the line: it is tried again until the batch's time is over."""

_encoder: Final = msgspec.json.Encoder()


class EmbedLine:
    """Runs lines whose endpoint is `/v1/embeddings`. A line that fails has the answer that HTTP would have given."""

    def __init__(self, client: Client, settings: GatewaySettings) -> None:
        self._client = JoiningClient(client, JOINED_TEXTS)
        self._settings = settings

    async def __call__(self, batch: Batch, body: bytes, timeout: float) -> Answer:
        """See `RunLine`."""
        try:
            return await self._run(batch, body, timeout)
        except _NOT_NOW as error:
            raise TryAgain(str(error)) from error
        except (ApiError, BadJob, EmbedError) as error:
            refused = api_error(error)
            return Answer(status=refused.status, body=_encoder.encode(refused.answer()))

    async def _run(self, batch: Batch, body: bytes, timeout: float) -> Answer:
        settings = self._settings
        job = read_job(body, settings.max_inputs)
        request = embed_request(job)
        alias = settings.default_alias if request.alias is None else request.alias
        if batch.aliases is not None and alias not in batch.aliases:
            raise ApiError("permission_denied", "the batch's API key may not use this model", "model")
        options = JobOptions(
            model=alias,
            model_version=request.model_version,
            dimensions=request.dimensions,
            dtype=request.dtype,
            input_type=request.input_type,
            instruction=request.instruction,
            truncate=request.truncate,
            chunk=request.chunk,
            lane="bulk",
            client_id=client_id(batch.owner),
        )
        # The same for all lines of a moment, so that they may share a job.
        timeout = _STEP_S * math.ceil(timeout / _STEP_S)
        finished = await self._client.embed_raw(request.texts, options, timeout=timeout)
        answer = joined(finished, alias)
        return Answer(
            status=200,
            body=_encoder.encode(embedding_list(job, answer)),
            tokens=answer.tokens,
            model_version=answer.model_version,
        )
