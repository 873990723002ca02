"""Files and batches as OpenAI's interface shows them, and its paths."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from embedq_gateway.batches.batch import DAY_S, Batch, FileFault, Status
from embedq_gateway.batches.files import File, Purpose
from embedq_gateway.http.operation import Operation, Parameter

ENDPOINT: Final = "/v1/embeddings"
"""The one endpoint that batches may have."""
HOUR_S: Final = 3600
LONGEST_KEPT_S: Final = 30 * DAY_S
LONGEST_WINDOW_S: Final = 14 * DAY_S
MOST_FILES: Final = 10_000
MOST_BATCHES: Final = 100
_MOST_PAIRS: Final = 16

Seconds = Annotated[int, Meta(ge=HOUR_S, le=LONGEST_KEPT_S)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Value = Annotated[str, Meta(max_length=512)]
Time = Annotated[int | None, Meta(description="Epoch seconds.")]


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A form with a file."""

    file: Annotated[bytes, Meta(extra_json_schema={"type": "string", "format": "binary"})]
    purpose: Literal["batch"]
    keep: Annotated[Seconds | None, Meta(description="For how many seconds the file is kept.")] = (
        msgspec.field(default=None, name="expires_after[seconds]")
    )


class FileObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="file"):
    """A file, without its content."""

    id: str
    bytes: int
    created_at: Annotated[int, Meta(description="Epoch seconds.")]
    expires_at: Annotated[int, Meta(description="Epoch seconds after which it is gone.")]
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """A page of files."""

    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="file"):
    """A file that is gone."""

    id: str
    deleted: Literal[True] = True


class ExpiresAfter(msgspec.Struct, frozen=True):
    """How long a file is kept: seconds after it was made."""

    seconds: Seconds
    anchor: Literal["created_at"] = "created_at"


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch is to do. Fields that it does not have are ignored, as clients send more than they document."""

    input_file_id: str
    endpoint: Annotated[str, Meta(description=f"`{ENDPOINT}`.")]
    completion_window: Annotated[
        str,
        Meta(
            description="`24h`; beside OpenAI's, other hours (`h`) and days (`d`), such as `3d`, up to `14d`."
        ),
    ]
    metadata: Annotated[dict[Name, Value], Meta(max_length=_MOST_PAIRS)] | None = None
    output_expires_after: ExpiresAfter | None = None


class Faults(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """Why an input file was refused."""

    data: tuple[FileFault, ...]


class RequestCounts(msgspec.Struct, frozen=True):
    """Lines of the input file, those that were answered with 200, and those that were not."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(msgspec.Struct, frozen=True):
    """There are no cached tokens here."""

    cached_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """There is no reasoning here."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that were run so far."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


# More than six fields: OpenAI's.
class BatchObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="batch"):
    """A batch."""

    id: str
    endpoint: str
    model: None = None
    errors: Faults | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: Annotated[str | None, Meta(description="The file of results, once the batch has ended.")]
    error_file_id: Annotated[str | None, Meta(description="The file of lines that failed, or were not run.")]
    created_at: Annotated[int, Meta(description="Epoch seconds.")]
    in_progress_at: Time
    expires_at: Annotated[int, Meta(description="Epoch seconds at which the completion window ends.")]
    finalizing_at: Time
    completed_at: Time
    failed_at: Time
    expired_at: Time
    cancelling_at: Time
    cancelled_at: Time
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    model_versions: Annotated[
        dict[str, int], Meta(description="How many lines each model version has answered.")
    ]


class BatchList(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """A page of batches, the newest first."""

    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(file: File) -> FileObject:
    """How its owner sees a file."""
    return FileObject(
        id=file.id,
        bytes=file.size,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def batch_object(batch: Batch) -> BatchObject:
    """How its owner sees a batch."""
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=Faults(batch.faults) if batch.faults else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=RequestCounts(batch.total, batch.completed, batch.failed),
        usage=BatchUsage(input_tokens=batch.tokens, total_tokens=batch.tokens),
        metadata=batch.metadata,
        model_versions=batch.model_versions,
    )


_TAG: Final = "Files and batches"
_COMMON: Final = ("not_found", "storage_unavailable")


def _id(of: str) -> Parameter:
    return Parameter(name="id", place="path", meaning=of, schema={"type": "string", "minLength": 1})


def _list_parameters(most: int) -> tuple[Parameter, ...]:
    return (
        Parameter(
            name="after",
            place="query",
            meaning="The id of the last thing of the page before.",
            schema={"type": "string"},
        ),
        Parameter(
            name="limit",
            place="query",
            meaning="Most things of a page.",
            schema={"type": "integer", "minimum": 1, "maximum": most},
        ),
    )


OPERATIONS: Final = (
    Operation(
        method="post",
        path="/v1/files",
        tag=_TAG,
        summary="Keep a file of requests, one a line.",
        body=Upload,
        body_media="multipart/form-data",
        answer=FileObject,
        codes=(*_COMMON, "invalid_value", "body_too_large"),
    ),
    Operation(
        method="get",
        path="/v1/files",
        tag=_TAG,
        summary="The caller's files.",
        parameters=(
            *_list_parameters(MOST_FILES),
            Parameter(
                name="order",
                place="query",
                meaning="By time of creation; `desc`, the newest first, unless given.",
                schema={"type": "string", "enum": ["asc", "desc"]},
            ),
            Parameter(
                name="purpose",
                place="query",
                meaning="Only files of this purpose, `batch` or `batch_output`.",
                schema={"type": "string"},
            ),
        ),
        answer=FileList,
        codes=(*_COMMON, "invalid_value"),
    ),
    Operation(
        method="get",
        path="/v1/files/{id}",
        tag=_TAG,
        summary="One file, without its content.",
        parameters=(_id("The file's id."),),
        answer=FileObject,
        codes=_COMMON,
    ),
    Operation(
        method="delete",
        path="/v1/files/{id}",
        tag=_TAG,
        summary="Remove a file that no batch reads.",
        parameters=(_id("The file's id."),),
        answer=FileDeleted,
        codes=(*_COMMON, "file_in_use"),
    ),
    Operation(
        method="get",
        path="/v1/files/{id}/content",
        tag=_TAG,
        summary="A file's bytes.",
        parameters=(_id("The file's id."),),
        answer_media="application/octet-stream",
        codes=_COMMON,
    ),
    Operation(
        method="post",
        path="/v1/batches",
        tag=_TAG,
        summary="Run the requests of a file in the bulk lane.",
        body=BatchRequest,
        answer=BatchObject,
        codes=(*_COMMON, "malformed", "invalid_value", "unsupported_content_type", "body_too_large"),
    ),
    Operation(
        method="get",
        path="/v1/batches",
        tag=_TAG,
        summary="The caller's batches, the newest first.",
        parameters=_list_parameters(MOST_BATCHES),
        answer=BatchList,
        codes=(*_COMMON, "invalid_value"),
    ),
    Operation(
        method="get",
        path="/v1/batches/{id}",
        tag=_TAG,
        summary="One batch.",
        parameters=(_id("The batch's id."),),
        answer=BatchObject,
        codes=_COMMON,
    ),
    Operation(
        method="post",
        path="/v1/batches/{id}/cancel",
        tag=_TAG,
        summary="Stop a batch; what is done remains.",
        parameters=(_id("The batch's id."),),
        answer=BatchObject,
        codes=(*_COMMON, "batch_ended"),
    ),
)


def page_of(kind: type[Any], data: list[Any], more: bool) -> Any:
    """A page of a list: `FileList` or `BatchList`."""
    return kind(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=more,
    )
