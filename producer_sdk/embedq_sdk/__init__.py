"""embedq for applications: `EmbedClient`, what it returns and what it raises."""

from __future__ import annotations

import logging

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
    "UnreadableReply",
    "WrongEventLoop",
    "late",
    "mean",
]

logging.getLogger("embedq_sdk").addHandler(logging.NullHandler())  # whoever wants our log configures logging
