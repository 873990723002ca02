"""What callers are told when something is wrong: one table of codes, each with its HTTP status. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidArgument,
    JobFailed,
    KafkaUnavailable,
    MixedModelVersions,
    Overloaded,
    TopicMissing,
    UnreadableReply,
)
from embedq_shared.codec import BadJob

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
]


class Kind(msgspec.Struct, frozen=True):
    """One code: the status and type that it is answered with, and what it means."""

    status: int
    type: ErrorType
    meaning: str


_TRY_AGAIN_S: Final = 1.0
"""What `Retry-After` says where nothing better is known: a replica has finished many micro-batches by then."""

KINDS: Final[Mapping[str, Kind]] = {
    # The contract's codes, in the order of WIRE.md
    "malformed": Kind(400, "invalid_request_error", "the body is not a JSON object"),
    "unknown_field": Kind(400, "invalid_request_error", "a field that requests do not have"),
    "invalid_value": Kind(
        400, "invalid_request_error", "a field's value breaks its rule; arrays of token ids too"
    ),
    "invalid_header": Kind(400, "invalid_request_error", "a header's value breaks its rule"),
    "unsupported_content_type": Kind(
        415, "invalid_request_error", "the body is not `application/json`, or it is compressed"
    ),
    "unknown_model": Kind(404, "not_found_error", "no replica serves this alias"),
    "unknown_model_version": Kind(
        404, "not_found_error", "the alias has another version than the `model_version` that was asked for"
    ),
    "text_too_long": Kind(
        413,
        "invalid_request_error",
        "a text is over the model's limit, without `truncate` and without `chunk`",
    ),
    "too_many_inputs": Kind(413, "invalid_request_error", "more texts, or spans, than one request may have"),
    "result_too_large": Kind(413, "invalid_request_error", "not even one vector fits into a record of Kafka"),
    "expired": Kind(504, "server_error", "there was no answer within the time that the request had"),
    "non_finite": Kind(422, "invalid_request_error", "the model gave NaN or infinity for a text"),
    "undeliverable": Kind(503, "server_error", "the answer could not be delivered"),
    "crashed": Kind(
        422, "invalid_request_error", "processes of the service ended again and again while this request ran"
    ),
    "overloaded": Kind(503, "server_error", "no capacity now"),
    "internal": Kind(503, "server_error", "a fault of the service, which may pass"),
    # The gateway's own
    "invalid_api_key": Kind(401, "authentication_error", "there is no API key, or it is not known"),
    "permission_denied": Kind(403, "permission_error", "the API key may not do this, or not with this model"),
    "not_found": Kind(404, "not_found_error", "there is nothing at this path"),
    "method_not_allowed": Kind(
        405, "invalid_request_error", "the path takes other methods, which `Allow` names"
    ),
    "malformed_request": Kind(400, "invalid_request_error", "what came is no HTTP/1.1 request"),
    "request_timeout": Kind(
        408, "invalid_request_error", "the request's head or body came too slowly; the connection is closed"
    ),
    "superseded": Kind(
        409, "invalid_request_error", "another reload was asked for at the same time, and is followed instead"
    ),
    "head_too_large": Kind(
        431, "invalid_request_error", "the request's line and headers have more bytes than the gateway takes"
    ),
    "too_many_connections": Kind(503, "server_error", "no further connection has room; it is closed"),
    "body_too_large": Kind(413, "invalid_request_error", "the body has more bytes than the gateway takes"),
    "rate_limit_exceeded": Kind(
        429,
        "rate_limit_error",
        "the API key has used up its tokens of this minute, or its requests in flight",
    ),
    "model_changed": Kind(503, "server_error", "the model was reloaded, again, while a large request ran"),
    "file_in_use": Kind(400, "invalid_request_error", "the file is read by a batch that has not ended"),
    "batch_ended": Kind(400, "invalid_request_error", "the batch has ended, or is about to"),
    "storage_unavailable": Kind(
        503, "server_error", "the storage of files and batches is full, or does not answer"
    ),
    "unavailable": Kind(503, "server_error", "Kafka does not answer, or the gateway starts or leaves"),
    "gateway_fault": Kind(500, "server_error", "a fault of the gateway itself, which is in its log"),
}
"""Every code that an answer may have. What openai's client tries again (408, 409, 429 and from 500 on) is what may succeed later."""


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, as OpenAI's interface says it. `param` is a path such as `dimensions` or `input[3]`, or a header."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorObject


class ApiError(Exception):
    """An answer that is an error. `message` is for the caller: it says what was expected, and repeats no text and no secret."""

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after_s: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = KINDS[code]
        self.message = message
        self.param = param
        self.headers = headers
        self.retry_after_s = retry_after_s
        """None: a second where the status asks for a `Retry-After`."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.kind.status

    def answer(self) -> ErrorAnswer:
        """The body, in OpenAI's shape."""
        return ErrorAnswer(
            ErrorObject(message=self.message, type=self.kind.type, param=self.param, code=self.code)
        )

    def answer_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of this error: `Retry-After`, in whole seconds, where trying again is worth it."""
        if self.status not in (429, 503):
            return list(self.headers)
        seconds = _TRY_AGAIN_S if self.retry_after_s is None else self.retry_after_s
        return [*self.headers, (b"retry-after", b"%d" % max(1, -(-seconds // 1)))]


_PARAMS: Final = {
    "texts": "input",
    "timeout": "x-request-timeout",
    "lane": "x-embedq-lane",
    "tokens": "chunk.tokens",
}
"""What the SDK calls otherwise than requests do."""


def api_error(error: Exception, *, index: int | None = None) -> ApiError:
    """The answer for an error of the SDK or of the contract; `index` is the input that it is about.

    Addresses of brokers and names of topics are for the log alone. What is no such error is the gateway's own fault.
    """
    match error:
        case ApiError():
            return error
        case BadJob():
            return ApiError(error.error.code, error.error.message, error.error.param)
        case JobFailed():
            return _job_failed(error, index)
        case InvalidArgument():
            argument = error.argument
            param = _PARAMS.get(argument, argument)
            if argument.startswith("texts["):
                param = f"input{argument.removeprefix('texts')}"
            return ApiError("invalid_value", f"`{param}`: expected {error.expected}, got {error.got}", param)
        case DeadlineExceeded():
            return ApiError("expired", f"no result within {error.timeout:g} s ({error.progress})")
        case Overloaded():
            return ApiError("overloaded", "too many texts are in flight here; try again")
        case MixedModelVersions():
            return ApiError("model_changed", "the model was reloaded while the request ran; send it again")
        case UnreadableReply():
            return ApiError("internal", "the service's reply cannot be read")
        case KafkaUnavailable() | TopicMissing():
            return ApiError("unavailable", "the queue behind this gateway does not answer; try again")
        case ClientClosed():
            return ApiError("unavailable", "this gateway is starting, or leaving; try again")
        case _:
            return ApiError("gateway_fault", "the gateway failed; its log says why, under this request's id")


def _job_failed(error: JobFailed, index: int | None) -> ApiError:
    """A code that this version does not know counts by whether trying again may help."""
    code = error.code if error.code in KINDS else ("internal" if error.retryable else "invalid_value")
    param = error.param
    message = error.message or KINDS[code].meaning
    if index is not None and (param is None or param.startswith("input")):
        # A request may be several jobs, and the service counts the inputs of each.
        message = message.replace(f"`{param}`", f"`input[{index}]`", 1)
        param = f"input[{index}]"
    return ApiError(code, message, param)
