"""Cohere's interface: `POST /v2/embed`.

One request may ask for several types of vectors. They are made here from one float32 vector each, by the functions that the
service has for its own dtypes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from starlette.routing import Route
from starlette.types import ASGIApp

from embedq_gateway.dialects.reading import invalid, named, read
from embedq_gateway.dialects.vectors import numbers
from embedq_gateway.embedding import EmbedAnswer, Embedder, EmbedRequest
from embedq_gateway.errors import ApiError
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
from embedq_shared.messages import MIN_DIMENSIONS, InputType, Truncate
from embedq_shared.vectors import quantize

_NAMES: Final = {"input": "texts", "dimensions": "output_dimension"}
_VERSION_HEADER: Final = MODEL_VERSION.encode()

CohereType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
CohereInputType = Literal["search_document", "search_query", "classification", "clustering"]

EXPECTED: Final = {
    "model": "a model alias",
    "texts": "a non-empty list of strings",
    "input_type": "one of search_document, search_query, classification, clustering",
    "embedding_types": "a list of float, int8, uint8, binary, ubinary, base64",
    "output_dimension": f"an integer from {MIN_DIMENSIONS} to the model's hidden size",
    "truncate": "one of NONE, START, END",
    "max_tokens": "no value: the model's limit counts",
    "images": "no value: models embed texts",
    "inputs": "no value: send `texts`",
    "priority": "an integer, which is not looked at: `x-embedq-lane` chooses the lane",
}
"""What each field must be."""

_INPUT_TYPES: Final[dict[str, InputType]] = {"search_document": "document", "search_query": "query"}
_TRUNCATE: Final[dict[str, Truncate]] = {"NONE": "error", "START": "start", "END": "end"}


class CohereRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `/v2/embed`, for texts."""

    texts: Annotated[list[str], Meta(min_length=1)]
    model: Annotated[str, Meta(min_length=1, description="An alias; absent: the default one.")] | None = None
    input_type: Annotated[
        CohereInputType | None,
        Meta(description="The model's prompt for queries or documents, if it has one."),
    ] = None
    embedding_types: Annotated[list[CohereType], Meta(min_length=1)] | None = None
    output_dimension: Annotated[int, Meta(ge=MIN_DIMENSIONS)] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    max_tokens: None = None
    images: None = None
    inputs: None = None
    priority: int | None = None


class CohereError(msgspec.Struct, frozen=True):
    """An error in this interface's shape, and its code."""

    message: str
    code: str


class CohereApiVersion(msgspec.Struct, frozen=True):
    """Which version answers."""

    version: str = "2"


class CohereBilledUnits(msgspec.Struct, frozen=True):
    """What the request cost."""

    input_tokens: int


class CohereMeta(msgspec.Struct, frozen=True):
    """About an answer."""

    billed_units: CohereBilledUnits
    api_version: CohereApiVersion = CohereApiVersion()


class CohereAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors by type, in the order of the texts."""

    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    id: Annotated[str, Meta(description="The request's id.")]
    embeddings: Annotated[
        dict[str, Any],
        Meta(
            extra_json_schema={
                "type": "object",
                "additionalProperties": {
                    "type": "array",
                    "items": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]},
                },
            }
        ),
    ]
    texts: list[str]
    meta: CohereMeta
    model_version: Annotated[
        str, Meta(description="`sha256:` and 64 hex digits: equal exactly when vectors are comparable.")
    ]


def cohere_error(error: ApiError) -> ASGIApp:
    """An error in this interface's shape."""
    body = CohereError(named(error, _NAMES), error.code)
    return JsonAnswer.of(body, status=error.status, headers=error.answer_headers())


OPERATIONS: Final = (
    Operation(
        method="post",
        path="/v2/embed",
        tag="Cohere",
        summary="Vectors for texts, in several types at once.",
        parameters=EMBEDDING_HEADERS,
        body=CohereRequest,
        answer=CohereAnswer,
        answer_headers=VERSIONED,
        error=CohereError,
        codes=EMBEDDING,
    ),
)


class Cohere:
    """The handlers of this interface."""

    def __init__(self, embedder: Embedder, settings: GatewaySettings) -> None:
        self._embedder = embedder
        self._settings = settings

    def routes(self) -> list[Route]:
        """The paths."""
        return [route("/v2/embed", self.embed, methods=["POST"], errors=cohere_error)]

    async def embed(self, exchange: Exchange) -> ASGIApp:
        """Vectors for texts, in every type that is asked for."""
        exchange.require("embed")
        asked = read(await read_json(exchange, self._settings.max_body_bytes), CohereRequest, EXPECTED)
        types = asked.embedding_types or ["float"]
        packed = {"binary", "ubinary"} & set(types)
        if packed and asked.output_dimension is not None and asked.output_dimension % 8:
            raise ApiError(
                "invalid_value", "`output_dimension`: expected a multiple of 8 for binary", "output_dimension"
            )
        answer = await self._embedder.embed(
            exchange,
            EmbedRequest(
                texts=asked.texts,
                alias=asked.model,
                dimensions=asked.output_dimension,
                input_type=_INPUT_TYPES.get(asked.input_type or ""),
                truncate=_TRUNCATE[asked.truncate or "END"],
            ),
        )
        if packed and answer.dimensions % 8:
            raise invalid("embedding_types", EXPECTED)
        found = CohereAnswer(
            id=exchange.request_id.decode(),
            embeddings={each: written(answer, each) for each in dict.fromkeys(types)},
            texts=asked.texts,
            meta=CohereMeta(CohereBilledUnits(answer.tokens)),
            model_version=answer.model_version,
        )
        return JsonAnswer.of(found, headers=[(_VERSION_HEADER, answer.model_version.encode())])


def written(answer: EmbedAnswer, kind: CohereType) -> Sequence[msgspec.Raw | str]:
    """Every vector in one type.

    Those of 8 bits have a scale of their own, by which a vector's largest component becomes 127: cosines are right, lengths are
    not. `uint8` is int8 and 128. `binary` is `ubinary` less 128, as signed numbers.
    """
    return [_written(datum.embedding, kind) for datum in answer.data]


def _written(raw: bytes, kind: CohereType) -> msgspec.Raw | str:
    if kind == "float":
        return numbers(raw, "float32")
    if kind == "base64":
        return base64.b64encode(raw).decode("ascii")
    vector = np.frombuffer(raw, "<f4")
    if kind in ("int8", "uint8"):
        q, _ = quantize(vector, "int8")
        if kind == "int8":
            return numbers(q, "int8")
        return numbers((np.frombuffer(q, "i1").astype(np.int16) + 128).astype(np.uint8).tobytes(), "binary")
    bits, _ = quantize(vector, "binary")
    if kind == "ubinary":
        return numbers(bits, "binary")
    return numbers((np.frombuffer(bits, "u1").astype(np.int16) - 128).astype(np.int8).tobytes(), "int8")
