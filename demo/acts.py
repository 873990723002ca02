"""What the demo does with a running service, and what each act found out."""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_sdk import EmbedClient
from embedq_sdk.admin.control import reload_model

Vectors = npt.NDArray[np.float32]

TIMEOUT_S: Final = 60.0
_RELOAD_S: Final = 300.0
"""A load runs beside the jobs, and the first one of a model tries it in a process of its own: on a busy machine that takes minutes."""
_JOB_EVERY_S: Final = 0.01
_BEFORE_RELOAD: Final = 40
_AFTER_RELOAD: Final = 60
# Batches of other lengths round differently in the last bits; another model differs in the first digits.
_SAME_VECTOR: Final = 1e-4


class DemoFailed(Exception):
    """Something that the demo promises did not happen; the message says what."""


@dataclass(frozen=True)
class Pass:
    """All sentences once. `vectors` is float32 (sentences, dimensions), in their order."""

    vectors: Vectors
    seconds: float
    tokens: int
    cached: int
    version: str


@dataclass(frozen=True)
class OverHttp:
    """A request over HTTP: the command that sends it too, what came back, and how long it took."""

    command: str
    answer: str
    seconds: float


@dataclass
class Reloaded:
    """A reload while jobs flowed. `texts` and `vectors` are one entry a job, with the version that the service named."""

    sent: int = 0
    seconds: float = 0.0
    steps: list[str] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    vectors: list[Vectors] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)

    def jobs_by_version(self) -> Counter[str]:
        """How many jobs each model version answered."""
        return Counter(self.versions)


async def embed_all(client: EmbedClient, texts: Sequence[str], on_answer: Callable[[], None]) -> Pass:
    """Embed every text, in jobs of a few texts, many of them in flight."""
    rows: list[Vectors | None] = [None] * len(texts)
    tokens = cached = 0
    versions: set[str] = set()
    started = time.perf_counter()
    async with aclosing(
        client.stream(texts, batch_size=8, in_flight=512, ordered=False, timeout=TIMEOUT_S)
    ) as answers:
        async for item in answers:
            rows[item.index] = item.vector
            tokens += item.tokens or 0
            cached += bool(item.cached)
            versions.add(str(item.model_version))
            on_answer()
    seconds = time.perf_counter() - started
    if missing := sum(row is None for row in rows):
        raise DemoFailed(f"{missing} of {len(texts)} sentences came back without a vector")
    if len(versions) != 1:
        raise DemoFailed(f"expected one model version, got {sorted(versions)}")
    vectors = np.stack([row for row in rows if row is not None])
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise DemoFailed(f"expected vectors of length 1, got {lengths.min():.4f} to {lengths.max():.4f}")
    return Pass(vectors, seconds, tokens, cached, versions.pop())


async def nearest(
    client: EmbedClient, queries: Sequence[str], vectors: Vectors, count: int
) -> list[list[tuple[float, int]]]:
    """For each query the closest sentences, as (cosine, index), best first."""
    asked = await client.embed(list(queries), timeout=TIMEOUT_S)
    cosines = asked @ vectors.T  # all of length 1
    best = np.argsort(-cosines, axis=1)[:, :count]
    return [[(float(row[n]), int(n)) for n in order] for row, order in zip(cosines, best, strict=True)]


def over_http(url: str, text: str, expected: Pass) -> OverHttp:
    """One of the sentences as a request of OpenAI's kind; the first row of `expected` is its vector.

    Raises:
        DemoFailed: it is refused, or answered with another vector or model version.
    """
    body = json.dumps({"input": text, "model": "default", "encoding_format": "base64"})
    request = urllib.request.Request(
        f"{url}/v1/embeddings", body.encode(), {"content-type": "application/json"}
    )
    started = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            answer = json.load(reply)
    except OSError as error:
        raise DemoFailed(f"the gateway did not answer: {error}") from error
    seconds = time.perf_counter() - started
    check_answer(answer, expected)
    return OverHttp(
        command=f"curl {url}/v1/embeddings -H 'content-type: application/json' -d {shlex.quote(body)}",
        answer=f"{answer['usage']['total_tokens']} tokens, {expected.version[:15]}, the SDK's vector to the last bit",
        seconds=seconds,
    )


def check_answer(answer: Mapping[str, Any], expected: Pass) -> None:
    """The first vector of an answer over HTTP must be the SDK's, and of the same model version.

    Raises:
        DemoFailed: it is not.
    """
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    if not np.array_equal(vector, expected.vectors[0]):
        raise DemoFailed("the gateway's vector is not the one that the SDK got")
    if answer["model_version"] != expected.version:
        raise DemoFailed(f"expected {expected.version} over HTTP, too, got {answer['model_version']}")


async def reload_under_load(
    client: EmbedClient,
    texts: Sequence[str],
    servers: str,
    prefix: str,
    path: str,
    on_answer: Callable[[], None],
) -> Reloaded:
    """Send one job after the other while the model changes; every job must come back.

    Raises:
        DemoFailed: a job was lost or failed, or the reload did not go through.
    """
    found = Reloaded()
    old = asyncio.Event()
    reloaded = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        left = _AFTER_RELOAD
        while left:
            if reloaded.is_set():
                left -= 1
            found.sent += 1
            yield texts[(found.sent - 1) % len(texts)]
            await asyncio.sleep(_JOB_EVERY_S)

    async def flow() -> None:
        async with aclosing(
            client.stream(source(), batch_size=1, in_flight=256, ordered=False, timeout=TIMEOUT_S)
        ) as answers:
            async for item in answers:
                if item.vector is None:
                    raise DemoFailed(f"job {item.index} came back without a vector")
                found.texts.append(item.index % len(texts))
                found.vectors.append(item.vector)
                found.versions.append(str(item.model_version))
                on_answer()
                if len(found.versions) == _BEFORE_RELOAD:
                    old.set()

    async def change() -> None:
        await old.wait()
        started = time.perf_counter()
        async with aclosing(reload_model(servers, path, topic_prefix=prefix, timeout=_RELOAD_S)) as updates:
            async for update in updates:
                for replica in update.replicas:
                    if replica.version == update.version and replica.step not in found.steps:
                        found.steps.append(replica.step)
                if update.done and not update.ok:
                    steps = ", ".join(
                        f"{replica.replica}: {replica.error or replica.step}" for replica in update.replicas
                    )
                    raise DemoFailed(
                        f"the reload ended as {update.progress} ({steps or 'no replica said a word'})"
                    )
        found.seconds = time.perf_counter() - started
        reloaded.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(flow(), name="flow")
        tasks.create_task(change(), name="change")
    if len(found.versions) != found.sent:
        raise DemoFailed(f"{found.sent} jobs were sent and {len(found.versions)} came back")
    return found


def check_versions(reloaded: Reloaded, models: Sequence[Pass]) -> None:
    """Every vector must be the one that the model version on it makes of its text.

    Raises:
        DemoFailed: one is not, or the two models can't be told apart.
    """
    if len({model.version for model in models}) != len(models):
        raise DemoFailed("the reload did not change the model version")
    by_version = {model.version: model.vectors for model in models}
    if reloaded.jobs_by_version().keys() != by_version.keys():
        raise DemoFailed(f"expected jobs from both models, got {dict(reloaded.jobs_by_version())}")
    for text, vector, version in zip(reloaded.texts, reloaded.vectors, reloaded.versions, strict=True):
        if (away := distance(vector, by_version[version][text])) > _SAME_VECTOR:
            raise DemoFailed(
                f"a vector of {version[:15]} is {away:.5f} away from what that model makes of its text"
            )
        others = [vectors[text] for other, vectors in by_version.items() if other != version]
        if any(distance(vector, other) <= _SAME_VECTOR for other in others):
            raise DemoFailed("the two models make the same vector of a text, so nothing is proved")


def distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """The largest difference of two vectors in any dimension."""
    return float(np.max(np.abs(a - b)))
