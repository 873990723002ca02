"""OpenAI's interface: `POST /v1/embeddings`, `GET /v1/models`.

A request is the body of a job, so it is read as one: `embedq_shared.codec` has its rules and its errors. What goes beyond
OpenAI's are extra fields, in requests and in answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from starlette.routing import Route
from starlette.types import ASGIApp

from embedq_gateway.dialects.vectors import numbers
from embedq_gateway.embedding import EmbedAnswer, Embedder, EmbedRequest
from embedq_gateway.errors import ApiError
from embedq_gateway.fleet.fleet import Fleet, Model
from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.body import read_json
from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import MODEL_VERSION, Exchange
from embedq_gateway.http.operation import (
    EMBEDDING,
    EMBEDDING_HEADERS,
    VERSIONED,
    Operation,
    Parameter,
)
from embedq_gateway.settings import GatewaySettings
from embedq_sdk.embeddings import ReadDatum
from embedq_shared.codec import BadJob, decode_job
from embedq_shared.messages import Dtype, EncodingFormat, Job

_VERSION_HEADER: Final = MODEL_VERSION.encode()
_TOKENS: Final = (
    "`input`: expected a string or a non-empty list of strings, got token ids, which are another model's: set "
    "check_embedding_ctx_length=False (LangChain's OpenAIEmbeddings) or send texts"
)


class Embedding(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="embedding", omit_defaults=True
):
    """One input's vector, or that of a span of it. `truncated`, `scale` and `span` are there only where they say something."""

    index: int
    embedding: Annotated[
        Any,
        Meta(
            description="Numbers, or base64 of the raw little-endian bytes.",
            extra_json_schema={"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
        ),
    ]
    truncated: Annotated[bool, Meta(description="Whether the text was cut; only where it was.")] = False
    scale: Annotated[float | None, Meta(description="Of int8 alone: x ≈ q · scale.")] = None
    span: Annotated[
        tuple[int, int] | None,
        Meta(description="Of late chunks alone: start and end in the input, in Unicode code points."),
    ] = None


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens that were run, after any cut; those of prompts and special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """The vectors of a request, in the order of its inputs, all of one model."""

    data: list[Embedding]
    model: Annotated[str, Meta(description="The alias that was asked for.")]
    model_version: Annotated[
        str, Meta(description="`sha256:` and 64 hex digits: equal exactly when vectors are comparable.")
    ]
    usage: EmbeddingUsage
    metadata: Annotated[
        msgspec.Raw | msgspec.UnsetType,
        Meta(description="As it came.", extra_json_schema={"type": "object"}),
    ] = msgspec.UNSET


class ModelObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="model"):
    """One alias that is alive."""

    id: Annotated[str, Meta(description="The alias, to be named as `model`.")]
    created: Annotated[
        int, Meta(description="Epoch seconds at which this gateway first saw the model version.")
    ]
    owned_by: Literal["embedq"] = "embedq"
    model_version: Annotated[
        str, Meta(description="`sha256:` and 64 hex digits: equal exactly when vectors are comparable.")
    ]
    dimensions: Annotated[
        int | None,
        Meta(description="The hidden size, the most that `dimensions` may be; null where it is not known."),
    ]
    max_tokens: Annotated[
        int | None,
        Meta(description="The longest input, special tokens included; null where it is not known."),
    ]
    replicas: Annotated[int, Meta(description="How many serve it now.")]


class ModelList(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """The aliases that are alive now."""

    data: list[ModelObject]


OPERATIONS: Final = (
    Operation(
        method="post",
        path="/v1/embeddings",
        tag="OpenAI",
        summary="Vectors for texts.",
        parameters=EMBEDDING_HEADERS,
        body=Job,
        answer=EmbeddingList,
        answer_headers=VERSIONED,
        codes=EMBEDDING,
    ),
    Operation(
        method="get",
        path="/v1/models",
        tag="OpenAI",
        summary="The aliases that are alive now.",
        answer=ModelList,
    ),
    Operation(
        method="get",
        path="/v1/models/{id}",
        tag="OpenAI",
        summary="One alias that is alive now.",
        parameters=(
            Parameter(
                name="id", place="path", meaning="The alias.", schema={"type": "string", "minLength": 1}
            ),
        ),
        answer=ModelObject,
        answer_headers=VERSIONED,
        codes=("unknown_model",),
    ),
)


class OpenAI:
    """The handlers of OpenAI's interface."""

    def __init__(self, embedder: Embedder, fleet: Fleet, settings: GatewaySettings) -> None:
        self._embedder = embedder
        self._fleet = fleet
        self._settings = settings

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            route("/v1/embeddings", self.embeddings, methods=["POST"]),
            route("/v1/models", self.models),
            route("/v1/models/{id:path}", self.model),
        ]

    async def embeddings(self, exchange: Exchange) -> ASGIApp:
        """Vectors for texts."""
        exchange.require("embed")  # before a large body is read for somebody who may not
        job = read_job(await read_json(exchange, self._settings.max_body_bytes), self._settings.max_inputs)
        answer = await self._embedder.embed(exchange, embed_request(job))
        return JsonAnswer.of(
            embedding_list(job, answer), headers=[(_VERSION_HEADER, answer.model_version.encode())]
        )

    async def models(self, exchange: Exchange) -> ASGIApp:
        """The aliases that are alive, and that the caller may use."""
        caller = exchange.require("embed")
        alive = self._fleet.models(time.time())
        mine = [_object(model) for model in alive if caller.aliases is None or model.alias in caller.aliases]
        return JsonAnswer.of(ModelList(data=mine))

    async def model(self, exchange: Exchange) -> ASGIApp:
        """One alias."""
        caller = exchange.require("embed")
        alias = exchange.path_params["id"]
        caller.require_alias(alias)
        model = self._fleet.model(alias, time.time())
        if model is None:
            raise ApiError("unknown_model", "no replica serves a model of this name", "model")
        return JsonAnswer.of(_object(model), headers=[(_VERSION_HEADER, model.model_version.encode())])


def read_job(body: bytes, max_inputs: int) -> Job:
    """The body of a request.

    Raises:
        BadJob: it breaks a rule of jobs.
        ApiError: it has token ids instead of texts; the message says what to set.
    """
    try:
        return decode_job(body, "json", max_inputs=max_inputs)
    except BadJob as bad:
        if (bad.error.param or "").startswith("input") and _has_token_ids(body):
            raise ApiError("invalid_value", _TOKENS, "input") from None
        raise


def embed_request(job: Job) -> EmbedRequest:
    """What a job asks for."""
    return EmbedRequest(
        texts=[job.input] if isinstance(job.input, str) else job.input,
        alias=job.model,
        model_version=job.model_version,
        dimensions=job.dimensions,
        dtype=job.dtype,
        input_type=job.input_type,
        instruction=job.instruction,
        truncate=job.truncate,
        chunk=job.chunk,
    )


def embedding_list(job: Job, answer: EmbedAnswer) -> EmbeddingList:
    """The body of the answer to a job."""
    return EmbeddingList(
        data=written(answer.data, answer.dtype, job.encoding_format or "float"),
        model=answer.alias,
        model_version=answer.model_version,
        usage=EmbeddingUsage(answer.tokens, answer.tokens),
        metadata=_echoed(job.metadata),
    )


def written(data: Sequence[ReadDatum], dtype: Dtype, format: EncodingFormat) -> list[Embedding]:
    """Vectors as the request wants them; msgspec writes bytes as base64."""
    return [
        Embedding(
            index=datum.index,
            embedding=datum.embedding if format == "base64" else numbers(datum.embedding, dtype),
            truncated=bool(datum.truncated),
            scale=datum.scale,
            span=datum.span,
        )
        for datum in data
    ]


class _Ids(msgspec.Struct):
    input: list[int | list[int]] | None = None


def _has_token_ids(body: bytes) -> bool:
    """Whether `input` is a list of integers, or of lists of them."""
    try:
        return bool(msgspec.json.decode(body, type=_Ids).input)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _echoed(metadata: msgspec.Raw) -> msgspec.Raw | msgspec.UnsetType:
    return msgspec.UNSET if bytes(metadata) in (b"", b"null") else metadata


def _object(model: Model) -> ModelObject:
    return ModelObject(
        id=model.alias,
        created=model.since_ms // 1000,
        model_version=model.model_version,
        dimensions=model.dimensions,
        max_tokens=model.max_tokens,
        replicas=model.replicas,
    )
