"""What the OpenAPI document says of a path, declared beside its handler."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from embedq_gateway.errors import ErrorAnswer
from embedq_gateway.http.exchange import LANE, MODEL_VERSION, REQUEST_ID, TIMEOUT
from embedq_gateway.keys import Scope
from embedq_shared.topics import JSON, LANES


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A header, or a part of the path or of the query."""

    name: str
    place: Literal["header", "path", "query"] = "header"
    meaning: str
    schema: dict[str, Any]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. `codes` are those of `errors.KINDS` that it may answer with, beside `COMMON`."""

    method: Literal["get", "post", "delete"]
    path: str
    tag: str
    summary: str
    scope: Scope | None = "embed"
    """What an API key needs; None: nobody is asked who they are."""
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    """The type that the body is read as; None: there is none."""
    body_media: str = JSON
    answer: Any = None
    """The type of what comes with 200; None: it is not JSON."""
    answer_media: str = JSON
    answer_headers: tuple[str, ...] = ()
    error: Any = ErrorAnswer
    """The type of an error's body."""
    codes: tuple[str, ...] = ()


COMMON: Final = ("gateway_fault",)
"""Codes that everything may answer with."""
KEYED: Final = ("invalid_api_key", "permission_denied")
"""Codes of what asks who calls."""
EMBEDDING: Final = (
    "malformed",
    "unknown_field",
    "invalid_value",
    "invalid_header",
    "unsupported_content_type",
    "unknown_model",
    "unknown_model_version",
    "text_too_long",
    "too_many_inputs",
    "result_too_large",
    "body_too_large",
    "non_finite",
    "crashed",
    "rate_limit_exceeded",
    "expired",
    "overloaded",
    "undeliverable",
    "internal",
    "model_changed",
    "unavailable",
)
"""Codes of what runs texts."""

EMBEDDING_HEADERS: Final = (
    Parameter(
        name=LANE,
        meaning="The lane of the job. Bulk jobs wait while there are interactive ones.",
        schema={"type": "string", "enum": list(LANES), "default": LANES[0]},
    ),
    Parameter(
        name=TIMEOUT,
        meaning="Seconds that the request has, such as 2.5, and its job's deadline.",
        schema={"type": "string", "pattern": r"^\d{1,9}(\.\d{1,9})?$"},
    ),
    Parameter(
        name=REQUEST_ID,
        meaning="Given back as it came, and logged; one that could spoil a log is replaced.",
        schema={"type": "string"},
    ),
    Parameter(
        name="traceparent", meaning="A W3C trace context; it travels with the job.", schema={"type": "string"}
    ),
)
"""Of every request that runs texts."""
VERSIONED: Final = (MODEL_VERSION,)
"""Headers of answers that vectors come in."""
