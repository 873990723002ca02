"""A line of a batch, run as the same body would be over HTTP, but in the bulk lane and with all the time that the batch has."""

from __future__ import annotations

from typing import Final

import msgspec

from embedq_gateway.batches.batch import Batch
from embedq_gateway.batches.running.lines import Answer
from embedq_gateway.batches.running.runner import TryAgain
from embedq_gateway.dialects.openai import embed_request, embedding_list, read_job
from embedq_gateway.embedding import Client, joined
from embedq_gateway.errors import ApiError, api_error
from embedq_gateway.keys.caller import Caller
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
        self._client = client
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
        aliases = None if batch.aliases is None else frozenset(batch.aliases)
        owner = Caller(batch.owner, frozenset({"embed"}), aliases=aliases)
        owner.require_alias(alias)
        options = JobOptions(
            model=alias,
            dimensions=request.dimensions,
            dtype=request.dtype,
            input_type=request.input_type,
            instruction=request.instruction,
            truncate=request.truncate,
            chunk=request.chunk,
            lane="bulk",
            client_id=owner.client_id,
        )
        finished = await self._client.embed_raw(request.texts, options, timeout=timeout)
        answer = joined(finished, alias)
        return Answer(
            status=200,
            body=_encoder.encode(embedding_list(job, answer)),
            tokens=answer.tokens,
            model_version=answer.model_version,
        )
