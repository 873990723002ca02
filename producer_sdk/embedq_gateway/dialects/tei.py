"""The native interface of Hugging Face's text-embeddings-inference: `POST /embed`, `GET /info`."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta
from starlette.routing import Route
from starlette.types import ASGIApp

from embedq_gateway.dialects.reading import invalid, named, read
from embedq_gateway.dialects.vectors import numbers
from embedq_gateway.embedding import Embedder, EmbedRequest
from embedq_gateway.errors import ApiError
from embedq_gateway.fleet.fleet import Fleet
from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.body import read_json
from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import MODEL_VERSION, Exchange
from embedq_gateway.http.operation import (
    EMBEDDING,
    EMBEDDING_HEADERS,
    VERSIONED,
    Operation,
)
from embedq_gateway.settings import GatewaySettings
from embedq_shared.messages import MIN_DIMENSIONS, Truncate

_NAMES: Final = {"input": "inputs", "input_type": "prompt_name"}
_VERSION_HEADER: Final = MODEL_VERSION.encode()
_VERSION: Final = importlib.metadata.version("embedq")

EXPECTED: Final = {
    "inputs": "a string or a non-empty list of strings",
    "truncate": "true, false or null; without it, a text that is too long is cut",
    "truncation_direction": "one of left, right",
    "prompt_name": "one of query, document",
    "normalize": "true: vectors have length 1",
    "dimensions": f"an integer from {MIN_DIMENSIONS} to the model's hidden size",
}
"""What each field must be."""

_TYPES: Final = {
    413: "Validation",
    422: "Tokenizer",
    429: "Overloaded",
    503: "Overloaded",
    504: "Backend",
    500: "Backend",
}


class TeiRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `/embed`. The model is the gateway's default one, since this interface names none."""

    inputs: Annotated[
        str | list[str],
        Meta(description="A text, or a non-empty list of texts.", extra_json_schema={"minItems": 1}),
    ]
    truncate: Annotated[
        bool | None, Meta(description="Whether a text that is too long is cut; false: it is refused.")
    ] = None
    truncation_direction: Annotated[
        Literal["left", "right", "Left", "Right"] | None, Meta(description="Which end is cut off.")
    ] = None
    prompt_name: Annotated[
        Literal["query", "document"] | None, Meta(description="The model's prompt of that name.")
    ] = None
    normalize: Annotated[Literal[True] | None, Meta(description="Vectors have length 1.")] = None
    dimensions: Annotated[int, Meta(ge=MIN_DIMENSIONS)] | None = None


class TeiError(msgspec.Struct, frozen=True):
    """An error in this interface's shape."""

    error: str
    error_type: str


class TeiEmbedding(msgspec.Struct, frozen=True):
    """What a model is for. The pooling is the replicas' business."""

    pooling: str | None = None


class TeiModelType(msgspec.Struct, frozen=True):
    """What kind of model it is."""

    embedding: TeiEmbedding


class TeiInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The default model, as far as this interface describes models."""

    model_id: str
    model_sha: Annotated[str, Meta(description="The model version.")]
    model_dtype: Annotated[str, Meta(description="Of the vectors.")]
    model_type: TeiModelType
    max_concurrent_requests: int
    max_input_length: int | None
    max_client_batch_size: int
    auto_truncate: bool
    version: str


def tei_error(error: ApiError) -> ASGIApp:
    """An error in this interface's shape."""
    body = TeiError(named(error, _NAMES), _TYPES.get(error.status, "Validation"))
    return JsonAnswer.of(body, status=error.status, headers=error.answer_headers())


OPERATIONS: Final = (
    Operation(
        method="post",
        path="/embed",
        tag="text-embeddings-inference",
        summary="Vectors for texts.",
        parameters=EMBEDDING_HEADERS,
        body=TeiRequest,
        answer=list[list[float]],
        answer_headers=VERSIONED,
        error=TeiError,
        codes=EMBEDDING,
    ),
    Operation(
        method="get",
        path="/info",
        tag="text-embeddings-inference",
        summary="The default model.",
        answer=TeiInfo,
        answer_headers=VERSIONED,
        error=TeiError,
        codes=("unavailable",),
    ),
)


class Tei:
    """The handlers of this interface."""

    def __init__(self, embedder: Embedder, fleet: Fleet, settings: GatewaySettings) -> None:
        self._embedder = embedder
        self._fleet = fleet
        self._settings = settings

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            route("/embed", self.embed, methods=["POST"], errors=tei_error),
            route("/info", self.info, errors=tei_error),
        ]

    async def embed(self, exchange: Exchange) -> ASGIApp:
        """Vectors for texts: a list of lists, for one text too."""
        exchange.require("embed")
        asked = read(await read_json(exchange, self._settings.max_body_bytes), TeiRequest, EXPECTED)
        if not asked.inputs and isinstance(asked.inputs, list):
            raise invalid("inputs", EXPECTED)
        end: Truncate = "start" if (asked.truncation_direction or "right").lower() == "left" else "end"
        answer = await self._embedder.embed(
            exchange,
            EmbedRequest(
                texts=[asked.inputs] if isinstance(asked.inputs, str) else asked.inputs,
                dimensions=asked.dimensions,
                input_type=asked.prompt_name,
                truncate="error" if asked.truncate is False else end,
            ),
        )
        vectors = [numbers(datum.embedding, answer.dtype) for datum in answer.data]
        return JsonAnswer.of(vectors, headers=[(_VERSION_HEADER, answer.model_version.encode())])

    async def info(self, exchange: Exchange) -> ASGIApp:
        """The default model."""
        exchange.require("embed")
        model = self._fleet.model(self._settings.default_alias, time.time())
        if model is None:
            raise ApiError("unavailable", "no replica serves the default model now; try again")
        found = TeiInfo(
            model_id=model.alias,
            model_sha=model.model_version,
            model_dtype="float32",
            model_type=TeiModelType(TeiEmbedding()),
            max_concurrent_requests=self._settings.max_in_flight_texts,
            max_input_length=model.max_tokens,
            max_client_batch_size=self._settings.max_inputs,
            auto_truncate=True,
            version=_VERSION,
        )
        return JsonAnswer.of(found, headers=[(_VERSION_HEADER, model.model_version.encode())])
