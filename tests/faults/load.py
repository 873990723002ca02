"""The jobs of a run, each made from the seed and its number alone, and the judgment of what came back for it."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_shared.messages import Dtype
from embedq_shared.topics import Topics
from embedq_shared.vectors import cut_and_normalize, dequantize
from tests.faults.history import OK

Vectors = npt.NDArray[np.float32]
Format = Literal["floats", "base64", "msgpack"]

CLIENTS: Final = 4
"""Clients that read a partition of the replies topic each."""
_BAD: Final = 0.04
"""Share of jobs that must get an error."""
_WORDS: Final = [
    "river",
    "stone",
    "cloud",
    "engine",
    "letter",
    "window",
    "garden",
    "bridge",
    "market",
    "winter",
    "sample",
    "vector",
    "token",
    "queue",
    "broker",
    "commit",
    "offset",
    "replica",
    "lane",
    "batch",
    "model",
    "cosine",
    "memory",
    "thread",
    "signal",
    "packet",
    "socket",
    "leader",
    "follower",
    "quorum",
]


class Job(NamedTuple):
    """What is sent, and what must come back. `texts` are numbers of texts; `reply` is a topic and maybe a partition."""

    id: str
    topic: str
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    texts: tuple[int, ...]
    dimensions: int
    format: Format
    expects: str
    buried: bool
    reply: tuple[str, int | None]
    fragile: bool


def texts(seed: int, count: int) -> list[str]:
    """The texts that jobs are made of: from two words to forty, no two alike."""
    draw = random.Random(f"{seed} texts")
    return [
        f"{number} " + " ".join(draw.choices(_WORDS, k=min(40, 2 + int(draw.expovariate(1 / 12)))))
        for number in range(count)
    ]


class JobMaker:
    """Makes the jobs of a run. Pure: a job depends on the seed and its number alone."""

    def __init__(
        self,
        seed: int,
        topics: Topics,
        texts: Sequence[str],
        *,
        hidden: int,
        own_topic: str,
        fragile_topic: str | None,
    ) -> None:
        self._seed = seed
        self._topics = topics
        self._texts = texts
        self._hidden = hidden
        self._own_topic = own_topic
        self._fragile_topic = fragile_topic

    def job(self, id: str) -> Job:
        """The job with this id, which is `job-` and its number."""
        draw = random.Random(f"{self._seed} {id}")
        topic = draw.choice(self._topics.lanes)
        reply, headers = self._address(draw)
        chosen = tuple(draw.choices(range(len(self._texts)), k=draw.choice((1, 1, 1, 1, 2, 3, 4))))
        single = len(chosen) == 1 and draw.random() < 0.7
        dimensions = draw.choice((32, 64, self._hidden))
        format: Format = draw.choice(("floats", "floats", "base64", "msgpack"))
        fields: dict[str, Any] = {
            "id": id,
            "input": self._texts[chosen[0]] if single else [self._texts[index] for index in chosen],
            "dimensions": dimensions,
        }
        if format == "base64":
            fields["encoding_format"] = "base64"
        if format == "msgpack":
            headers.append(("content-type", b"application/msgpack"))
        value = msgspec.msgpack.encode(fields) if format == "msgpack" else json.dumps(fields).encode()
        expects, buried = OK, False
        if draw.random() < _BAD:
            format = "floats"
            headers = [header for header in headers if header[0] != "content-type"]
            expects, buried, value, headers, reply = self._spoiled(draw, fields, headers, reply)
        return Job(
            id=id,
            topic=topic,
            value=value,
            headers=tuple(headers),
            texts=chosen,
            dimensions=dimensions,
            format=format,
            expects=expects,
            buried=buried,
            reply=reply,
            fragile=reply[0] == self._fragile_topic,
        )

    def _address(self, draw: random.Random) -> tuple[tuple[str, int | None], list[tuple[str, bytes]]]:
        """Where the answer goes, and the headers that say so."""
        client = draw.randrange(CLIENTS + 4)
        if client < CLIENTS:
            return (self._topics.replies, client), [
                ("reply-topic", self._topics.replies.encode()),
                ("reply-partition", struct.pack(">i", client)),
                ("correlation-id", draw.randbytes(8)),
            ]
        if client == CLIENTS:
            return (self._own_topic, None), [("reply-topic", self._own_topic.encode())]
        if client == CLIENTS + 1 and self._fragile_topic is not None and draw.random() < 0.2:
            return (self._fragile_topic, None), [("reply-topic", self._fragile_topic.encode())]
        return (self._topics.results, None), []

    def _spoiled(
        self,
        draw: random.Random,
        fields: dict[str, Any],
        headers: list[tuple[str, bytes]],
        reply: tuple[str, int | None],
    ) -> tuple[str, bool, bytes, list[tuple[str, bytes]], tuple[str, int | None]]:
        """The code of its error, whether it is buried, its value, its headers, and where the error goes."""
        fields = {name: value for name, value in fields.items() if name != "encoding_format"}
        good = json.dumps(fields).encode()
        results = (self._topics.results, None)
        match draw.randrange(6):
            case 0:
                return "malformed", True, good[: len(good) // 2], headers, reply
            case 1:
                return "unknown_field", False, json.dumps(fields | {"oops": 1}).encode(), headers, reply
            case 2:
                return (
                    "invalid_value",
                    False,
                    json.dumps(fields | {"dimensions": 10**6}).encode(),
                    headers,
                    reply,
                )
            case 3:
                return "expired", False, good, [*headers, ("deadline", b"1000")], reply
            case 4:
                return (
                    "unsupported_content_type",
                    True,
                    good,
                    [*headers, ("content-type", b"text/plain")],
                    reply,
                )
            case _:
                nowhere = [
                    header for header in headers if header[0] not in ("reply-topic", "reply-partition")
                ]
                nowhere.append(("reply-topic", f"{self._topics.prefix}.nobody-reads-this".encode()))
                return "invalid_header", True, good, nowhere, results


class Answer(NamedTuple):
    """What one result record says."""

    code: str | None
    part: int
    parts: int
    model_version: str | None
    cosine: float | None
    digest: str | None


class Judge:
    """Compares results with what each model gives alone.

    Args:
        expected: vectors of the run's texts, float32 (texts, hidden), by model version.
    """

    def __init__(self, expected: Mapping[str, Vectors]) -> None:
        self._expected = expected

    def answer(self, job: Job, value: bytes | None, headers: Sequence[tuple[str, bytes]]) -> Answer:
        """Read one result record of this job. Whatever is wrong with it is a cosine of -1."""
        kind = next((found for name, found in reversed(headers) if name == "content-type"), b"")
        try:
            decode = msgspec.msgpack.decode if kind == b"application/msgpack" else msgspec.json.decode
            found: dict[str, Any] = decode(value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Answer("undecodable", 0, 1, None, -1.0, None)
        version = found.get("model_version")
        if found.get("object") != "list":
            return Answer(found["error"]["code"], 0, 1, version, None, None)
        cosine, digest = self._compare(job, found)
        return Answer(None, found["part"], found["parts"], version, cosine, digest)

    def _compare(self, job: Job, found: Mapping[str, Any]) -> tuple[float, str]:
        """The least cosine of the part's vectors, and the digest of all of them."""
        expected = self._expected.get(found["model_version"])
        digest = sha256()
        if expected is None or not found["data"] or found["id"] != job.id:
            return -1.0, digest.hexdigest()[:16]
        if found["parts"] == 1 and [datum["index"] for datum in found["data"]] != list(range(len(job.texts))):
            return -1.0, digest.hexdigest()[:16]
        least = 1.0
        for datum in found["data"]:
            vector = vector_of(datum["embedding"], found["dtype"])
            if len(vector) != job.dimensions or not 0 <= datum["index"] < len(job.texts):
                return -1.0, digest.hexdigest()[:16]
            right = cut_and_normalize(expected[job.texts[datum["index"]]], job.dimensions)
            cosine = float(np.dot(vector, right)) / (float(np.linalg.norm(vector)) or 1.0)
            least = min(least, cosine if np.isfinite(cosine) else -1.0)
            digest.update(vector.tobytes())
        return least, digest.hexdigest()[:16]


def vector_of(embedding: Any, dtype: Dtype) -> Vectors:
    """float32 (dimensions,), from any of the three ways in which a result writes it; empty if it is none of them."""
    match embedding:
        case list():
            return np.array(embedding, dtype=np.float32)
        case str():
            return dequantize(base64.b64decode(embedding), dtype)
        case bytes():
            return dequantize(embedding, dtype)
        case _:
            return np.zeros(0, dtype=np.float32)
