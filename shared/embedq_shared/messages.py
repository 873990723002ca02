"""Every record on every topic, as the wire contract v1 has it (`spec/WIRE.md`)."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from embedq_shared.topics import POOL_NAME

Dtype = Literal["float32", "float16", "int8", "binary"]
EncodingFormat = Literal["float", "base64"]
InputType = Literal["query", "document"]
Truncate = Literal["error", "start", "end"]
ChunkMode = Literal["late", "mean"]
ErrorCode = Literal[
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
    "expired",
    "non_finite",
    "undeliverable",
    "crashed",
    "overloaded",
    "internal",
]
ResultStatus = Literal["ok", "partial", "error"]

RETRYABLE: Final[frozenset[str]] = frozenset({"undeliverable", "overloaded", "internal"})
DEFAULT_ALIAS: Final = "default"
MIN_DIMENSIONS: Final = 32
MAX_ID_LENGTH: Final = 256
MAX_VERSION_LENGTH: Final = 256
"""Characters of a model version that a job may name; ours have 71."""
MAX_METADATA_BYTES: Final = 16 * 1024
MAX_INSTRUCTION_BYTES: Final = 16 * 1024
"""It is put before every input of its job: without a limit, a job of 1 MB could ask for 2 GB of text."""
MAX_NESTING: Final = 64
DEFAULT_MAX_INPUTS: Final = 2048
MAX_INTEGER: Final = 2**63 - 1
"""Of versions and times: JSON has larger ones, which no clock and no encoder of ours takes."""
MIN_CHUNK_TOKENS: Final = 8
"""The smallest span or window that a job may ask for: it bounds the number of vectors for one text."""
DEFAULT_CHUNK_TOKENS: Final = 256
"""The largest span of late chunking, unless the job says otherwise."""

NULL: Final = msgspec.Raw(b"null")
"""What absent metadata is in a JSON result."""


class Chunking(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a text becomes pieces.

    "late": one pass over the whole text and a vector for each span of at most `tokens` tokens. "mean": windows of at
    most `tokens` tokens run alone, and the text's vector is their mean.
    """

    mode: ChunkMode
    tokens: (
        Annotated[
            int,
            Meta(
                ge=MIN_CHUNK_TOKENS,
                description=f"Absent: {DEFAULT_CHUNK_TOKENS} in mode late, as many as the model takes in mode mean.",
            ),
        ]
        | None
    ) = None


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One embedding job: the body of an OpenAI embeddings request, and what a queue needs.

    null in an optional field means absent. `metadata` keeps the bytes as they came, so that the result returns
    exactly the same JSON.
    """

    input: Annotated[
        str | list[str],
        Meta(
            description="A text, or a non-empty list of texts.",
            extra_json_schema={
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
            },
        ),
    ]
    id: (
        Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH, description="Echoed as it came.")] | None
    ) = None
    model: Annotated[str, Meta(description='A model alias; absent: "default".')] | None = None
    model_version: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=MAX_VERSION_LENGTH,
                description="The version that must answer; absent: whichever the alias has.",
            ),
        ]
        | None
    ) = None
    dimensions: (
        Annotated[int, Meta(ge=MIN_DIMENSIONS, description="At most the hidden size; absent: all.")] | None
    ) = None
    dtype: Dtype | None = None
    encoding_format: (
        Annotated[EncodingFormat, Meta(description="JSON only: how vectors are written.")] | None
    ) = None
    input_type: Annotated[InputType, Meta(description="Applies the model's prompt of that name.")] | None = (
        None
    )
    instruction: (
        Annotated[
            str,
            Meta(
                description=f"Applied as `Instruct: …\\nQuery:…`; at most {MAX_INSTRUCTION_BYTES} bytes of UTF-8."
            ),
        ]
        | None
    ) = None
    truncate: Annotated[Truncate, Meta(description="What to do with a text over the limit.")] | None = None
    chunk: Chunking | None = None
    metadata: Annotated[
        msgspec.Raw,
        Meta(
            description=f"At most {MAX_METADATA_BYTES} bytes; returned equal.",
            extra_json_schema={"type": ["object", "null"]},
        ),
    ] = msgspec.field(default_factory=msgspec.Raw)
    user: Annotated[msgspec.Raw, Meta(description="Accepted and ignored.")] = msgspec.field(
        default_factory=msgspec.Raw
    )


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong: `message` says what was expected and never repeats text, metadata or header values.

    `code` is an `ErrorCode`, or one that a newer service has added: a client must be able to read those too.
    """

    code: str
    message: str
    param: Annotated[str, Meta(description="A path such as `dimensions` or `input[3]`.")] | None = None
    retryable: bool = False

    @classmethod
    def of(cls, code: ErrorCode, message: str, param: str | None = None) -> ErrorBody:
        """An error whose `retryable` follows from its code."""
        return cls(code=code, message=message, param=param, retryable=code in RETRYABLE)


class Datum(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one input, or of one span of it.

    `embedding` is a list of numbers or base64 text in JSON, raw little-endian bytes in MessagePack, and null for an
    input that failed alone. `scale` is there for int8 alone: x ≈ q · scale. `span` is there for late chunks alone.
    """

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[
        Any,
        Meta(
            description="Numbers, base64 text, or in MessagePack raw little-endian bytes; null if the input failed.",
            extra_json_schema={
                "anyOf": [
                    {"type": "array", "items": {"type": "number"}},
                    {"type": "string"},
                    {"type": "null"},
                ]
            },
        ),
    ]
    tokens: int | None = None
    truncated: bool | None = None
    cached: bool | None = None
    scale: float | msgspec.UnsetType = msgspec.UNSET
    span: tuple[int, int] | msgspec.UnsetType = msgspec.UNSET
    error: ErrorBody | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens that were run, after any cut, those of prompts and special tokens included; the same for cached answers."""

    prompt_tokens: int
    total_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """Seconds for each stage; null where it did not happen.

    `compute` is that of whole micro-batches, which jobs share; `device` is the job's own part of it, by tokens, so those of all jobs
    add up to what the device worked.
    """

    queue: float | None = None
    tokenize: float | None = None
    compute: float | None = None
    device: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """The vectors of one job, or one part of them."""

    id: str
    model: str
    model_version: str
    dimensions: int
    dtype: Dtype
    data: list[Datum]
    usage: Usage
    timings: Timings
    metadata: Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["object", "null"]})] = msgspec.field(
        default_factory=lambda: NULL
    )
    part: int = 0
    parts: int = 1


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="error"):
    """The answer to a job that failed whole. What is unknown is null."""

    id: str | None
    model: str | None
    model_version: str | None
    error: ErrorBody
    metadata: Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["object", "null"]})] = msgspec.field(
        default_factory=lambda: NULL
    )


# -- control and status ---------------------------------------------------------------------------------------------

Policy = Literal["availability_preserving", "resource_preserving"]
Quantization = Literal["none", "bf16", "fp8"]
Step = Literal["starting", "validate", "load", "warm_up", "check", "drain", "swap", "serving", "stopped"]
State = Literal["LOADING", "READY", "FAILED", "STOPPED"]

STATUS_INTERVAL_S: Final = 3.0
"""Each replica repeats its status this often."""
STATUS_STALE_AFTER_S: Final = 15.0
"""A replica whose last status is older is gone."""
MAX_SHARES: Final = 16
"""Aliases of a split."""
MAX_WEIGHT: Final = 1_000_000
"""Of an alias in a split: parts of a million are finer than anybody can measure."""
SAME_SPACE_COSINE: Final = 0.995
"""Two runs of one model in other precision, on another device or quantized to 8 bits agree to this on every text; two models do not."""
GOLDEN_FILE: Final = "embedq_golden.json"
"""In a model directory: texts, and the vectors that the model must give for them."""


MAX_SOAK_S: Final = 7 * 24 * 3600.0
"""Of a canary: a week has every hour of every weekday."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a fleet follows a command. Without it every replica follows at once."""

    max_unavailable: (
        Annotated[int, Meta(ge=1, description="Replicas that change at once; absent: all.")] | None
    ) = None
    canary: Annotated[bool, Meta(description="One replica changes alone first.")] = False
    soak_s: (
        Annotated[
            float,
            Meta(
                gt=0,
                le=MAX_SOAK_S,
                description="Seconds that the canary serves before others follow; absent: 0.",
            ),
        ]
        | None
    ) = None


class Control(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The desired model of one alias, complete in one record; `version` only rises.

    A writer's version is one above the one that it has read, and so says which one it expects: of two that have read the same one,
    the first counts. `fallback` is the directory that served before: a replica that starts and cannot load `path` loads that one.
    Replicas of other pools than `pool` do not follow it.
    """

    alias: Annotated[str, Meta(min_length=1, max_length=256)]
    version: Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
    path: Annotated[str, Meta(min_length=1, description="A model directory below the configured root.")]
    command_id: Annotated[str, Meta(min_length=1, max_length=256)]
    digest: Annotated[str, Meta(description="The model version that must come out; absent: any.")] | None = (
        None
    )
    quantization: (
        Annotated[Quantization, Meta(description="Of this model; absent: the replica's setting.")] | None
    ) = None
    policy: Annotated[Policy, Meta(description="Absent: each replica chooses by its free memory.")] | None = (
        None
    )
    min_cosine: (
        Annotated[
            float,
            Meta(ge=-1, le=1, description="Least cosine to the old model's vectors of the check texts."),
        ]
        | None
    ) = None
    golden: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="A file of texts and expected vectors, below the configured root; absent: "
                "`embedq_golden.json` in the model directory, if it is there.",
            ),
        ]
        | None
    ) = None
    golden_min_cosine: (
        Annotated[
            float, Meta(ge=-1, le=1, description="Least cosine to the expected vectors; absent: 0.995.")
        ]
        | None
    ) = None
    min_dimensions: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=MAX_INTEGER,
                description="Least hidden size; absent: the most `dimensions` that jobs lately asked for.",
            ),
        ]
        | None
    ) = None
    pool: (
        Annotated[
            str,
            Meta(
                pattern=POOL_NAME,
                description="Whose replicas serve the alias, and whose lanes its jobs go to; absent: the default pool.",
            ),
        ]
        | None
    ) = None
    rollout: Rollout | None = None
    fallback: str | None = None
    fallback_quantization: (
        Annotated[Quantization, Meta(description="Of the fallback; absent: the replica's setting.")] | None
    ) = None
    rollback_of: (
        Annotated[int, Meta(ge=1, le=MAX_INTEGER, description="The version that this command takes back.")]
        | None
    ) = None
    reason: Annotated[str, Meta(description="Why it was written, for people.")] | None = None


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """An alias whose jobs are shared out among others, complete in one record; `version` only rises.

    `split` has the weight of each alias that gets a share; without any the split has ended.
    """

    alias: Annotated[str, Meta(min_length=1, max_length=256)]
    version: Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
    command_id: Annotated[str, Meta(min_length=1, max_length=256)]
    split: Annotated[
        dict[
            Annotated[str, Meta(min_length=1, max_length=256)],
            Annotated[int, Meta(ge=1, le=MAX_WEIGHT)],
        ],
        Meta(max_length=MAX_SHARES, description="The weight of each alias."),
    ]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica serves and does. `version` is the control record it speaks of; `at` is epoch milliseconds.

    `state` says how that command stands, and `serving` whether a model serves: after a reload that failed, the old one does.
    `serving` is null in records of replicas that do not say it. `dimensions` is the hidden size of the model that serves, and
    `max_tokens` its longest input, special tokens included; null while none serves, and in records of older replicas.
    `turn` is the version of a roll-out whose turn this replica takes. `path` is the directory that serves, as a command would name
    it; null where none could. `memory_used` and `memory_total` are bytes of the device, on a CPU of the process and its machine.
    `splits` has the weights of each split that the replica knows of; null in records of replicas that do not say it.
    `warmed` says of how many texts, of those used most, the cache got vectors of the command's model before it served; null where
    that is not asked for. `served_s` says for how many seconds the model serves, and `first_error_s` after how many of them it first
    failed to give a text a vector, null where it never did. `pool` is the replica's; null for the default one.
    """

    replica: str
    alias: str
    version: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None
    step: Step
    state: State
    model_version: str | None
    error: str | None
    at: Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
    command_id: str | None = None
    serving: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None = None
    turn: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None = None
    path: str | None = None
    memory_used: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | None = None
    memory_total: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | None = None
    splits: dict[str, dict[str, int]] | None = None
    warmed: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | None = None
    served_s: Annotated[float, Meta(ge=0)] | None = None
    first_error_s: Annotated[float, Meta(ge=0)] | None = None
    pool: str | None = None
