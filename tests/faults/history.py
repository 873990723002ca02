"""What happened in a run: one JSON object a line, written by the harness, read by the checker and by people.

The harness notes what it sees and judges nothing; the checker judges and sees nothing else. Job records, results and dead
letters are read from the brokers' logs, not taken from what a producer believes. `at` is seconds since the run began, when
it was seen.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

import msgspec

Mode = Literal["at-least-once", "exactly-once"]
OK: Final = "ok"
"""What a good job expects instead of an error's code."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    at: float


class Run(_Line, frozen=True, kw_only=True, tag="run"):
    """The first line. `once`: the job topics whose jobs are answered exactly once; of the others, `repeats_each` is how many
    jobs one fault may have answered again, and `slack_s` how long after it that may still come."""

    seed: int
    mode: Mode
    kafka: str
    model: str
    workers: int
    once: tuple[str, ...] = ()
    repeats_each: int
    slack_s: float
    settings: dict[str, str] = {}


class Accepted(_Line, frozen=True, kw_only=True, tag="accepted"):
    """A job record in the log of a job topic.

    `expects`: `ok`, or the code of the error that it must get. `buried`: a copy of it belongs among the dead letters.
    `fragile`: its reply topic is one that faults may take away for good; then an error on the results topic is an answer,
    too.
    """

    id: str
    topic: str
    partition: int
    offset: int
    expects: str = OK
    buried: bool = False
    reply_topic: str
    reply_partition: int | None = None
    fragile: bool = False


class Result(_Line, frozen=True, kw_only=True, tag="result"):
    """A result record. `id` is its job's, by the record's key. `cosine` is the least of its vectors' with what the model
    that it names gives alone, and `digest` is theirs; None where it holds no vector. A wrong vector, length, order or
    number of items is a cosine of -1."""

    id: str
    topic: str
    partition: int
    offset: int
    status: str
    code: str | None = None
    part: int = 0
    parts: int = 1
    model_version: str | None = None
    cosine: float | None = None
    digest: str | None = None


class DeadLetter(_Line, frozen=True, kw_only=True, tag="dead_letter"):
    """A record on the dead-letter topic, and where the record that it tells of lies."""

    topic: str
    partition: int
    offset: int
    origin_topic: str
    origin_partition: int
    origin_offset: int
    code: str


class Committed(_Line, frozen=True, kw_only=True, tag="committed"):
    """A record of the group's log, in the log's order: the offset that was committed for a partition, None where the log
    says that it is forgotten. `record` is where it lies there."""

    record: int
    partition: str
    offset: int | None = None


class Ends(_Line, frozen=True, kw_only=True, tag="ends"):
    """The ends of the topics with results and dead letters, by `topic/partition`, asked after all `Committed` above were read.

    Everything that was published before one of those commits lies below these ends.
    """

    ends: dict[str, int]


class Fault(_Line, frozen=True, kw_only=True, tag="fault"):
    """A fault begins or ends."""

    name: str
    target: str
    phase: Literal["begin", "end"]
    detail: str = ""


class Worker(_Line, frozen=True, kw_only=True, tag="worker"):
    """A worker process started, or ended with this code (minus the signal)."""

    name: str
    event: Literal["started", "ended"]
    code: int | None = None


class Ended(_Line, frozen=True, kw_only=True, tag="ended"):
    """The last line: the ends of the job topics' partitions, and what the brokers acknowledged to the producer."""

    ends: dict[str, int]
    acknowledged: int


Event = Run | Accepted | Result | DeadLetter | Committed | Ends | Fault | Worker | Ended

_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)


def place(topic: str, partition: int) -> str:
    """How a partition is written."""
    return f"{topic}/{partition}"


class HistoryWriter:
    """Appends to a history; from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._lock = threading.Lock()

    def add(self, event: Event) -> None:
        """Write one line."""
        line = _encoder.encode(event) + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        """Everything is in the file."""
        self._file.close()


def read(path: Path) -> Iterator[Event]:
    """The events of a history.

    Raises:
        msgspec.DecodeError: a line is not one.
    """
    with path.open("rb") as lines:
        for line in lines:
            yield _decoder.decode(line)


def digest(path: Path) -> str:
    """SHA-256 of a history's bytes."""
    with path.open("rb") as file:
        found = sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
