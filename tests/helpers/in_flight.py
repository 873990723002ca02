"""Records and jobs for tests of the pure parts, each made in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from aiokafka import TopicPartition

from embedq_consumer.batching.single_flight import Identity, Item, Waiter
from embedq_consumer.engine import Chunked, Memory, Pending, Text, TextTooLong, Tokens
from embedq_consumer.intake.admission import AdmissionPolicy
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.intake.offsets import Ticket
from embedq_consumer.intake.records import Record
from embedq_shared.topics import Topics

TOPICS = Topics("t")
PARTITIONS = {TOPICS.results: 4, TOPICS.replies: 4, "elsewhere": 2}
NOW_MS = 1_000_000.0
VERSION = "sha256:" + "ab" * 32


class Model:
    """What admission and answers read of an encoder. It computes nothing."""

    model_version = VERSION
    max_tokens = 512
    prompts: Mapping[str, str] = {"query": "Q: ", "document": "D: "}

    def __init__(self, hidden_size: int = 256, default_prompt: str = "", *, late_chunks: bool = True) -> None:
        self.hidden_size = hidden_size
        self.default_prompt = default_prompt
        self.late_chunks = late_chunks

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


MODEL = Model()


def rules(**changes: Any) -> AdmissionPolicy:
    """The service's defaults."""
    settings = {
        "topics": TOPICS,
        "alias": "default",
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
    )


def admitted(
    *headers: tuple[str, bytes | None],
    model: Model | None = None,
    max_result_bytes: int = 900_000,
    key: bytes | None = None,
    value: bytes | None = None,
    **fields: Any,
) -> JobState:
    """A job in flight."""
    found = rules(max_result_bytes=max_result_bytes).admit(
        record(value, *headers, key=key, **fields), model or MODEL, NOW_MS, PARTITIONS.get
    )
    assert isinstance(found, JobState)
    return found


def item(
    job: JobState, index: int = 0, tokens: int = 3, *, truncated: bool = False
) -> tuple[Item, list[Waiter]]:
    """One of its texts behind a micro-batch, and that this input alone waited for it."""
    ids = np.arange(tokens, dtype=np.int32)
    return Item(Identity.of(job, index), Tokens(ids, truncated), 0.0), [(job, index)]
