"""Records and jobs for tests of the pure parts, each made in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from aiokafka import TopicPartition

from embedq_consumer.batching.single_flight import Identity, JobInput, QueuedText
from embedq_consumer.engine import (
    Chunked,
    Encoder,
    Footprint,
    Memory,
    Pending,
    Piece,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.group import Ticket
from embedq_consumer.intake.admission import AdmissionPolicy
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.intake.records import Record, size_of
from embedq_shared.topics import Topics

TOPICS = Topics("t")
PARTITIONS = {TOPICS.results: 4, TOPICS.replies: 4, "elsewhere": 2}
NOW_MS = 1_000_000.0
VERSION = "sha256:" + "ab" * 32


class Model:
    """What admission and results read of an encoder. It computes nothing."""

    def __init__(self, hidden_size: int = 256, default_prompt: str = "", *, late_chunks: bool = True) -> None:
        self.model_version = VERSION
        self.max_tokens = 512
        self.weight_bytes = 0
        self.footprint: Footprint | None = None
        self.prompts: Mapping[str, str] = {"query": "Q: ", "document": "D: "}
        self.notes: Sequence[str] = ()
        self.phases: Mapping[str, float] = {}
        self.hidden_size = hidden_size
        self.default_prompt = default_prompt
        self.late_chunks = late_chunks

    @property
    def kernels(self) -> Mapping[str, str]:
        return {}

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        raise NotImplementedError

    def chunk(self, texts: Sequence[Text]) -> list[Chunked | TextTooLong]:
        raise NotImplementedError

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        raise NotImplementedError

    def encode(self, batch: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        raise NotImplementedError

    def memory(self) -> Memory | None:
        return None

    def close(self) -> None:
        raise NotImplementedError

    def close_some(self) -> bool:
        raise NotImplementedError


MODEL: Encoder = Model()
MODELS: Mapping[str, Encoder] = {"default": MODEL}
"""One alias, as the service's defaults have it."""


def rules(**changes: Any) -> AdmissionPolicy:
    """The service's defaults, but that any topic may be named for replies."""
    settings: dict[str, Any] = {
        "topics": TOPICS,
        "max_inputs": 2048,
        "max_text_bytes": 1_000_000,
        "max_result_bytes": 900_000,
        "reply_patterns": ("*",),
    }
    return AdmissionPolicy(**settings | changes)


def record(
    value: bytes | None = None,
    *headers: tuple[str, bytes | None],
    key: bytes | None = None,
    offset: int = 7,
    timestamp_ms: int = 1_700_000_000_000,
    **fields: Any,
) -> Record:
    """A record of the interactive lane; its value is a job with these fields, unless it is given."""
    if value is None and fields:
        value = json.dumps(fields).encode()
    ticket = Ticket(TopicPartition(TOPICS.jobs, 3), epoch=1, offset=offset)
    return Record(
        ticket=ticket,
        lane="interactive",
        key=key,
        value=value,
        headers=headers,  # type: ignore[arg-type]
        timestamp_ms=timestamp_ms,
        timestamp_type=0,
        polled_at=0.0,
        size=size_of(key, value, headers),
    )


def admitted(
    *headers: tuple[str, bytes | None],
    model: Encoder | None = None,
    max_result_bytes: int = 900_000,
    key: bytes | None = None,
    value: bytes | None = None,
    **fields: Any,
) -> JobState:
    """A job in flight."""
    found = rules(max_result_bytes=max_result_bytes).admit(
        record(value, *headers, key=key, **fields), {"default": model or MODEL}, NOW_MS, PARTITIONS.get
    )
    assert isinstance(found, JobState)
    return found


def chunked(*tokens: int) -> Chunked:
    """A text in windows of a vector each: this many tokens of the text, and two special ones around them."""
    ends = np.cumsum(tokens).tolist()
    return Chunked(
        tuple(Tokens(np.zeros(count + 2, dtype=np.int32)) for count in tokens),
        tuple(Piece(end - count, end, count) for count, end in zip(tokens, ends, strict=True)),
    )


def computed(
    job: JobState, index: int = 0, tokens: int = 3, *, truncated: bool = False
) -> tuple[QueuedText, list[JobInput]]:
    """One of its texts after its micro-batch; only this input waited for it."""
    ids = np.arange(tokens, dtype=np.int32)
    text = QueuedText(identity=Identity.of(job, index), tokens=Tokens(ids, truncated), arrived=0.0)
    return text, [(job, index)]
