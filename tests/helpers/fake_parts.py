"""The parts around a job's path, each as simple as its Protocol allows: they note what they are given, and obey."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedq_consumer.cache.entries import CachedVector
from embedq_consumer.delivery.destination import Parcel, Settled, Urgent
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.engine import Chunked, Encoder, Piece, Text, TextTooLong, Tokens
from embedq_consumer.intake.records import Record
from embedq_shared.headers import value_of
from embedq_shared.topics import CONTENT_TYPE
from tests.helpers.in_flight import PARTITIONS, TOPICS, Model

Vectors = npt.NDArray[np.float32]

WINDOW = 4
"""Characters of a window of `Letters`."""


class Letters(Model):
    """A token is a character, a window is four of them, and a text of more than `max_tokens` is too long."""

    def __init__(self, max_tokens: int = 512, *, hidden_size: int = 256) -> None:
        super().__init__(hidden_size)
        self.max_tokens = max_tokens
        self.calls: list[list[str]] = []

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        self.calls.append([text.text for text in texts])
        return [self._tokens(text) for text in texts]

    def chunk(self, texts: Sequence[Text]) -> list[Chunked | TextTooLong]:
        self.calls.append([text.text for text in texts])
        return [_windows(text.text) for text in texts]

    def _tokens(self, text: Text) -> Tokens | TextTooLong:
        ids = _ids(text.text)
        if len(ids) <= self.max_tokens:
            return Tokens(ids)
        if text.truncate == "error":
            return TextTooLong(len(ids), self.max_tokens)
        return Tokens(ids[: self.max_tokens], truncated=True)


def _ids(text: str) -> npt.NDArray[np.int32]:
    return np.array([ord(character) for character in text], dtype=np.int32)


def _windows(text: str) -> Chunked:
    starts = range(0, len(text), WINDOW)
    parts = [text[start : start + WINDOW] for start in starts]
    return Chunked(
        tuple(Tokens(_ids(part)) for part in parts),
        tuple(Piece(start, start + len(part), len(part)) for start, part in zip(starts, parts, strict=True)),
    )


class ScriptedDevice:
    """A vector is the text's first token, then ones. `failure` says what a micro-batch of these texts raises, `seconds` how long each
    took. While `gate` is shut, results wait."""

    def __init__(
        self, failure: Callable[[list[str]], Exception | None] = lambda texts: None, seconds: float = 0.5
    ) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self._seconds = seconds
        self.ran: list[list[str]] = []
        self.started: list[str] = []
        """Texts that began before the cache had answered."""
        self.failed = 0
        """Texts that got no vector, even alone."""
        self.ran_out = 0
        """Micro-batches that found too little memory."""
        self._failure = failure

    def note_failed(self, encoder: Encoder) -> None:
        self.failed += 1

    def note_out_of_memory(self, encoder: Encoder) -> None:
        self.ran_out += 1

    def start(self, encoder: Encoder, text: Text) -> asyncio.Future[list[Any]]:
        """What the model is given for this text; it is among those that `ran` once its vector is asked for."""
        self.started.append(text.text)
        found: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        found.set_result([*encoder.tokenize([text])])
        return found

    async def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> tuple[Vectors, float]:
        texts = ["".join(map(chr, tokens.ids)) for tokens in batch]
        self.ran.append(texts)
        if (error := self._failure(texts)) is not None:
            raise error
        vectors = np.ones((len(batch), encoder.hidden_size), dtype=np.float32)
        vectors[:, 0] = [tokens.ids[0] for tokens in batch]
        await self.gate.wait()
        return vectors, self._seconds


class ScriptedSink:
    """Takes every record but those for which `refusal` has a reason; `new_topics` are found by the next refresh.

    `events` notes, in order, the topics that records went to and, with `finish`, the offsets that were finished.
    """

    def __init__(self, refusal: Callable[[Outgoing], Exception | None] = lambda record: None) -> None:
        self.sent: list[Outgoing] = []
        self.events: list[str | int] = []
        self.known = dict(PARTITIONS) | {TOPICS.dead_letters: 4}
        self.new_topics: dict[str, int] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.stuck: set[str] = set()
        self.timeouts: list[tuple[str, float | None]] = []
        self.urgent: list[Urgent] = []
        self._pending: list[tuple[Outgoing, Settled]] = []
        self._refusal = refusal

    @property
    def topics(self) -> ScriptedSink:
        return self

    def partitions(self, topic: str) -> int | None:
        return self.known.get(topic)

    async def refresh_topics(self) -> None:
        self.known |= self.new_topics

    def send(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            self.timeouts.append((parcel.record.topic, parcel.timeout_s))
            self.urgent.append(parcel.urgent)
            self._pending.append((parcel.record, parcel.settled))
        asyncio.get_running_loop().call_soon(self._work)

    def open(self) -> None:
        """Take records again, those that wait first."""
        self.gate.set()
        self._work()

    def _work(self) -> None:
        """Take what may be taken now. Records of topics that are `stuck` wait."""
        pending, self._pending = self._pending, []
        for record, settled in pending:
            if not self.gate.is_set() or record.topic in self.stuck:
                self._pending.append((record, settled))
            elif (reason := self._refusal(record)) is not None:
                settled(reason)
            else:
                self.sent.append(record)
                self.events.append(record.topic)
                settled(None)

    def finish(self, *records: Record) -> None:
        self.events += [record.ticket.offset for record in records]

    @property
    def finished(self) -> list[int]:
        """The offsets of the finished records, in order."""
        return [event for event in self.events if isinstance(event, int)]

    def to(self, topic: str) -> list[Outgoing]:
        """What was sent to a topic; each result says its content type."""
        found = [record for record in self.sent if record.topic == topic]
        assert topic == TOPICS.dead_letters or all(value_of(one.headers, CONTENT_TYPE) for one in found)
        return found


class DictCache:
    """Keeps everything. While `gate` is shut, writes wait; while `readable` is not set, look-ups do."""

    def __init__(self) -> None:
        self.entries: dict[bytes, CachedVector] = {}
        self.asked: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.readable = asyncio.Event()
        self.readable.set()

    async def get_many(self, keys: Sequence[bytes], *, counted: bool = True) -> list[CachedVector | None]:
        await self.readable.wait()
        self.asked += keys
        return [self.entries.get(key) for key in keys]

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> int:
        await self.gate.wait()
        self.entries.update(items)
        return len(items)
