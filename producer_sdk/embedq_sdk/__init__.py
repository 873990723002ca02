"""embedq for applications: `EmbedClient`, what it returns and what it raises."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from embedq_sdk.client import EmbedClient
    from embedq_sdk.embeddings import Chunk, Embeddings
    from embedq_sdk.errors import (
        ClientClosed,
        ClientNotOpened,
        DeadlineExceeded,
        EmbedError,
        Expired,
        InternalError,
        InvalidArgument,
        InvalidJob,
        JobFailed,
        KafkaRefused,
        KafkaUnavailable,
        MixedModelVersions,
        NonFinite,
        Overloaded,
        PartialFailure,
        ServiceOverloaded,
        TextTooLong,
        TopicMissing,
        UnknownModel,
        UnknownModelVersion,
        UnreadableReply,
        WrongEventLoop,
    )
    from embedq_sdk.job_options import JobArguments, late, mean
    from embedq_sdk.result_reader import JobResult, ResultCollector
    from embedq_sdk.stream import Embedded
__all__ = [
    "Chunk",
    "ClientClosed",
    "ClientNotOpened",
    "DeadlineExceeded",
    "EmbedClient",
    "EmbedError",
    "Embedded",
    "Embeddings",
    "Expired",
    "InternalError",
    "InvalidArgument",
    "InvalidJob",
    "JobArguments",
    "JobFailed",
    "JobResult",
    "KafkaRefused",
    "KafkaUnavailable",
    "MixedModelVersions",
    "NonFinite",
    "Overloaded",
    "PartialFailure",
    "ResultCollector",
    "ServiceOverloaded",
    "TextTooLong",
    "TopicMissing",
    "UnknownModel",
    "UnknownModelVersion",
    "UnreadableReply",
    "WrongEventLoop",
    "late",
    "mean",
]

# The command line is in this package, and most of its commands need neither Kafka's client nor numpy: what is above is
# imported when it is first asked for. Type checkers see the imports above, and not these lines.
if not TYPE_CHECKING:
    _HOMES: Final = {
        "embedq_sdk.client": ("EmbedClient",),
        "embedq_sdk.embeddings": ("Chunk", "Embeddings"),
        "embedq_sdk.errors": (
            "ClientClosed",
            "ClientNotOpened",
            "DeadlineExceeded",
            "EmbedError",
            "Expired",
            "InternalError",
            "InvalidArgument",
            "InvalidJob",
            "JobFailed",
            "KafkaRefused",
            "KafkaUnavailable",
            "MixedModelVersions",
            "NonFinite",
            "Overloaded",
            "PartialFailure",
            "ServiceOverloaded",
            "TextTooLong",
            "TopicMissing",
            "UnknownModel",
            "UnknownModelVersion",
            "UnreadableReply",
            "WrongEventLoop",
        ),
        "embedq_sdk.job_options": ("JobArguments", "late", "mean"),
        "embedq_sdk.result_reader": ("JobResult", "ResultCollector"),
        "embedq_sdk.stream": ("Embedded",),
    }

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                globals()[name] = value = getattr(importlib.import_module(home), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
