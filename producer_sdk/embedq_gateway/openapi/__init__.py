"""The OpenAPI document and a page of it, both written by `make contract`, as they are served."""

from __future__ import annotations

from typing import Final

from embedq_gateway.http.operation import Operation

OPERATIONS: Final = (
    Operation(
        method="get", path="/openapi.json", tag="About", summary="This document.", scope=None, answer=dict
    ),
    Operation(
        method="get",
        path="/docs",
        tag="About",
        summary="This document as a page.",
        scope=None,
        answer_media="text/html",
    ),
)
