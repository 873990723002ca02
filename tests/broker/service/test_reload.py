"""Models change while jobs flow: no job is lost, and every vector says truly which model made it."""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer

from embedq_consumer.engine import Quantization, Text, Tokens, load_encoder
from embedq_sdk.admin.control import LostRace, reload_model, service_status
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from embedq_shared.vectors import cut_and_normalize
from tests.helpers.delivery import load, send_unreadable, statuses, until_committed
from tests.helpers.service_process import (
    Reader,
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
)
from tests.helpers.support import patient, wait_until
from tests.helpers.tiny_models import nan_weights

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

_TEXTS = tuple(f"the text of number {number}" + " and more" * (number % 7) for number in range(12))
_DIMENSIONS = 64


class Own:
    """A model's own output, computed here: what its service must return."""

    def __init__(self, path: Path, quantization: Quantization = "none") -> None:
        encoder = load_encoder(path, device="cpu", threads=1, quantization=quantization)
        self.version = encoder.model_version
        self.vectors: dict[str, np.ndarray[Any, Any]] = {}
        for text, tokens in zip(_TEXTS, encoder.tokenize([Text(text) for text in _TEXTS]), strict=True):
            assert isinstance(tokens, Tokens)
            self.vectors[text] = cut_and_normalize(encoder.encode([tokens.ids])[0], _DIMENSIONS)
        encoder.close()


own = cache(Own)


def list_job(number: int) -> dict[str, Any]:
    """Three of a few texts, so that the cache soon holds each of them for each model."""
    texts = [_TEXTS[(number + step) % len(_TEXTS)] for step in (0, 1, 5)]
    return {"id": f"job-{number}", "input": texts, "dimensions": _DIMENSIONS}


def assert_each_vector_is_its_models_own(
    results: Iterable[dict[str, Any]], *models: Own, atol: float = 1e-5
) -> set[str]:
    """Compare every vector with the output of the model that its result names; returns the versions seen."""
    by_version = {model.version: model for model in models}
    for result in results:
        assert result["object"] == "list", result
        model = by_version[result["model_version"]]
        for text, datum in zip(
            list_job(int(result["id"].split("-")[1]))["input"], result["data"], strict=True
        ):
            np.testing.assert_allclose(datum["embedding"], model.vectors[text], atol=atol)
    return {result["model_version"] for result in results}


async def command(
    client: AIOKafkaProducer, topics: Topics, version: int, path: str, **more: Any
) -> dict[str, Any]:
    """Write one control record, as an operator without our command line would."""
    record = {"alias": "default", "version": version, "path": path, "command_id": uuid.uuid4().hex, **more}
    await client.send_and_wait(topics.control, json.dumps(record).encode(), key=b"default", partition=0)
    return record


async def outcomes(status: Reader, sent: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The last word of `count` replicas about a command: READY or FAILED."""
    found: dict[str, dict[str, Any]] = {}

    async def enough() -> bool:
        for said in await statuses(status):
            if said["command_id"] == sent["command_id"] and said["state"] in ("READY", "FAILED"):
                found[said["replica"]] = said
        return len(found) >= count

    await wait_until(enough, within=90, what=f"the outcome of version {sent['version']}")
    return list(found.values())


async def steps(status: Reader, sent: dict[str, Any], replica: str) -> list[str]:
    """What one replica said about a command, in order and without repeats."""
    said = [
        record["step"]
        for record in await statuses(status)
        if record["command_id"] == sent["command_id"] and record["replica"] == replica
    ]
    return [step for before, step in zip([None, *said], said, strict=False) if step != before]


async def test_two_replicas_change_models_to_and_fro_under_load_and_every_vector_is_true(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    a = await asyncio.to_thread(own, models / "a")
    b = await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    pair = [Replica(stack, topics, models / "a", tmp_path / name, replica=name) for name in ("one", "two")]
    late = Replica(stack, topics, models / "a", tmp_path / "late", replica="late")
    async with (
        replicas(*pair),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
    ):
        async with load(stack, topics.jobs, results, window=48, make=list_job) as jobs:
            await jobs.progress(100)
            load_first = await command(client, topics, 1, "b")
            for outcome in await outcomes(status, load_first, 2):
                assert (outcome["state"], outcome["model_version"]) == ("READY", b.version)
            changed = len(jobs.ids)
            await jobs.progress(150)
            first_after = [
                result for result in jobs.answered.results if int(result["id"].split("-")[1]) >= changed
            ]
            assert {result["model_version"] for result in first_after} == {b.version}

            async with replicas(late):  # its own setting says a
                await jobs.progress(100)
                serving = [
                    said
                    for said in await statuses(status)
                    if (said["replica"], said["state"]) == ("late", "READY")
                ]
                assert {said["model_version"] for said in serving} == {b.version}
                assert await late.stop() == 0

            unload_first = await command(client, topics, 2, "a", policy="resource_preserving")
            for outcome in await outcomes(status, unload_first, 2):
                assert (outcome["state"], outcome["model_version"]) == ("READY", a.version)
            await jobs.progress(100)
        await until_committed(stack, topics)
        answered = jobs.answered
        await answered.all()

        assert set(answered.counts()) == set(jobs.ids)
        assert answered.duplicates() == 0
        versions = assert_each_vector_is_its_models_own(answered.results, a, b)
        assert versions == {a.version, b.version}
        # The same texts were asked for before and after each change: the cache took part, for the right model.
        cached = [result for result in answered.results if result["data"][0]["cached"]]
        assert {result["model_version"] for result in cached} == {a.version, b.version}
        for name in ("one", "two"):
            assert await steps(status, load_first, name) == [
                *("validate", "load", "warm_up", "check", "drain", "swap", "serving")
            ]
            assert await steps(status, unload_first, name) == [
                *("validate", "drain", "load", "warm_up", "check", "swap", "serving")
            ]
        assert await asyncio.gather(*(replica.stop() for replica in pair)) == [0, 0]


async def test_the_first_queries_after_a_reload_are_hits_where_the_cache_was_warmed(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    dimensions = 40  # no other test asks for so many, so that nobody else has put these vectors there
    a, b = await asyncio.to_thread(own, models / "a"), await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log", cache_warm_texts=100)

    def job(number: int) -> dict[str, Any]:
        return list_job(number) | {"dimensions": dimensions}

    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        load(stack, topics.jobs, results, window=8, make=job) as jobs,
    ):
        await jobs.progress(60)
        sent = await command(client, topics, 1, "b", policy="availability_preserving")
        [said] = await outcomes(status, sent, 1)
        assert (said["state"], said["model_version"], said["warmed"]) == ("READY", b.version, len(_TEXTS))
        await jobs.progress(30)
        metrics = await replica.metrics()
        assert metrics['embedq_cache_warmed_total{outcome="computed"}'] == len(_TEXTS)
    by_version: dict[str, list[dict[str, Any]]] = {a.version: [], b.version: []}
    for result in jobs.answered.results:
        by_version[result["model_version"]].append(result)
    assert by_version[b.version]
    for model in (a, b):
        for result in by_version[model.version]:
            texts = list_job(int(result["id"].split("-")[1]))["input"]
            for text, datum in zip(texts, result["data"], strict=True):
                expected = cut_and_normalize(model.vectors[text], dimensions)
                np.testing.assert_allclose(datum["embedding"], expected, atol=1e-5)
    assert all(datum["cached"] for result in by_version[b.version] for datum in result["data"])
    assert not all(datum["cached"] for result in by_version[a.version] for datum in result["data"])


async def test_a_cpu_goes_to_bf16_and_back_and_every_vector_says_which_of_the_two_made_it(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    exact = await asyncio.to_thread(own, models / "a")
    rounded = await asyncio.to_thread(own, models / "a", "bf16")
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        load(stack, topics.jobs, results, window=16, make=list_job) as jobs,
    ):
        for version, quantization, model in ((1, "bf16", rounded), (2, "none", exact)):
            await jobs.progress(30)
            sent = await command(client, topics, version, "a", quantization=quantization)
            [said] = await outcomes(status, sent, 1)
            assert (said["state"], said["model_version"]) == ("READY", model.version)
        await jobs.progress(30)
    assert set(jobs.answered.counts()) == set(jobs.ids)
    by_version: dict[str, list[dict[str, Any]]] = {exact.version: [], rounded.version: []}
    for result in jobs.answered.results:
        by_version[result["model_version"]].append(result)
    assert_each_vector_is_its_models_own(by_version[exact.version], exact)
    of_bf16 = by_version[rounded.version]
    assert assert_each_vector_is_its_models_own(of_bf16, rounded, atol=0.01) == {rounded.version}
    first = list_job(int(of_bf16[0]["id"].split("-")[1]))["input"][0]
    off = np.abs(of_bf16[0]["data"][0]["embedding"] - exact.vectors[first]).max()
    assert off > 1e-5, "nothing was rounded"


async def test_a_command_that_cannot_be_followed_keeps_the_old_model_and_says_why(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    shutil.copytree(models / "a", root / "a")
    shutil.copytree(models / "b", root / "b")
    shutil.copytree(models / "a", tmp_path / "outside")
    await asyncio.to_thread(nan_weights, root / "nan")
    shutil.copytree(models / "a", root / "torn")
    weights = (root / "torn" / "model.safetensors").read_bytes()
    (root / "torn" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "file").write_text("no directory")
    a = await asyncio.to_thread(own, models / "a")
    topics = await make_topics(stack, fresh_prefix())
    wanted: list[tuple[str, dict[str, Any], str]] = [
        ("nan", {}, "finite"),
        ("missing", {}, "is not one"),
        ("file", {}, "is not one"),
        ("../outside", {}, "below"),
        ("torn", {}, "model.safetensors"),
        ("b", {"digest": "sha256:" + "0" * 64}, "digest"),
        ("b", {"min_cosine": 0.99}, "min_cosine"),
    ]
    replica = Replica(stack, topics, root / "a", tmp_path / "log")
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        load(stack, topics.jobs, results, window=16, make=list_job) as jobs,
    ):
        version = 0
        for policy in ("availability_preserving", "resource_preserving"):
            for path, more, why in wanted:
                version += 1
                sent = await command(client, topics, version, path, policy=policy, **more)
                [outcome] = await outcomes(status, sent, 1)
                assert outcome["state"] == "FAILED", (path, policy)
                assert why in outcome["error"], (path, policy, outcome["error"])
                assert outcome["model_version"] == a.version
        version += 1
        sent = await command(client, topics, version, "a", digest=a.version, min_cosine=0.9999)
        [outcome] = await outcomes(status, sent, 1)
        assert (outcome["state"], outcome["error"]) == ("READY", None)
        await jobs.progress(20)
        assert replica.returncode is None
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert jobs.answered.duplicates() == 0
    assert assert_each_vector_is_its_models_own(jobs.answered.results, a) == {a.version}


async def test_of_five_quick_commands_the_newest_wins_and_each_is_reported(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    b = await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.status) as status,
    ):
        paths = ["b", "bert", "a", "bert", "b"]
        sent = [await command(client, topics, 1 + number, path) for number, path in enumerate(paths)]
        [last] = await outcomes(status, sent[-1], 1)
        assert (last["state"], last["model_version"]) == ("READY", b.version)
        for one in sent[:-1]:
            [outcome] = await outcomes(status, one, 1)
            if outcome["state"] == "FAILED":
                # Which newer one depends on how many were there when the replica looked again.
                assert outcome["error"] in {
                    f"superseded by version {newer}" for newer in range(one["version"] + 1, 6)
                }

        old = await command(client, topics, 3, "bert")
        [refused] = await outcomes(status, old, 1)
        assert (refused["state"], refused["model_version"]) == ("FAILED", b.version)
        assert "above 5" in refused["error"]


async def test_control_records_that_no_client_can_read_are_stepped_over(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """A header name that is not UTF-8 makes aiokafka's polls raise, a live replica's and a new one's."""
    b = await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    live, later = (
        Replica(stack, topics, models / "a", tmp_path / name, replica=name) for name in ("live", "later")
    )
    async with producer(stack) as client, reader(stack, topics.status) as status, replicas(live):
        for value in (b"", b"{", b'{"alias": "default"}', b'{"alias": "other", "version": 9}', b"\xff"):
            await client.send_and_wait(topics.control, value, key=b"default", partition=0)
        before = await command(client, topics, 1, "b")
        await send_unreadable(client, topics.control, 0, b"default")
        await client.send_and_wait(topics.control, None, key=b"default", partition=0)
        [outcome] = await outcomes(status, before, 1)
        assert outcome["state"] == "READY"
        after = await command(client, topics, 2, "a")
        await outcomes(status, after, 1)
        again = await command(client, topics, 3, "b")
        await outcomes(status, again, 1)
        async with replicas(later):
            ready = [
                said
                for said in await statuses(status)
                if (said["replica"], said["state"]) == ("later", "READY")
            ]
            assert {said["model_version"] for said in ready} == {b.version}
        assert live.returncode is None


async def test_a_replica_starts_on_the_fallback_when_the_desired_model_has_vanished(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    b = await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with producer(stack) as client, reader(stack, topics.status) as status:
        sent = await command(client, topics, 1, "vanished", fallback="b")
        async with replicas(replica):
            [outcome] = await outcomes(status, sent, 1)
            assert (outcome["state"], outcome["model_version"]) == ("FAILED", b.version)
            assert "vanished" in outcome["error"]
            assert await replica.get("/readyz") == 200


async def test_of_twenty_reloads_written_at_once_one_learns_that_it_worked_and_a_late_replica_follows_it(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    one, later = (
        Replica(stack, topics, models / "a", tmp_path / name, replica=name) for name in ("one", "later")
    )

    async def reload(number: int) -> RolloutUpdate | None:
        try:
            updates = [
                update
                async for update in reload_model(
                    stack.kafka_servers,
                    ("a", "b")[number % 2],
                    topic_prefix=topics.prefix,
                    timeout=patient(60),
                    connect_timeout=patient(10),
                )
            ]
        except LostRace:
            return None
        return updates[-1]

    async with (
        replicas(one),
        reader(stack, topics.control) as control,
        reader(stack, topics.status) as status,
    ):
        ended = [update for update in await asyncio.gather(*map(reload, range(20))) if update is not None]
        # Not all of them need have met: who reads after another one has written takes the next version.
        last = max(ended, key=lambda update: update.version)
        assert last.ok
        assert {update.progress for update in ended if update is not last} <= {"superseded", "ready"}
        written = [json.loads(record.value) for record in await control.all()]
        assert len({record["command_id"] for record in written}) == 20
        assert written[-1]["command_id"] == last.command_id
        async with replicas(later):
            said = [status for status in await statuses(status) if status["replica"] == "later"]
        assert said[-1]["command_id"] == last.command_id


async def test_a_replica_serves_whatever_became_of_a_reload(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with replicas(replica):
        updates = [
            update
            async for update in reload_model(
                stack.kafka_servers,
                "nowhere",
                topic_prefix=topics.prefix,
                timeout=patient(60),
                max_unavailable=None,
                canary=False,
            )
        ]
        assert updates[-1].progress == "failed"
        found = await service_status(
            stack.kafka_servers, topic_prefix=topics.prefix, group=f"{topics.prefix}.embedq"
        )
        [view] = found.replicas
        assert (view.state, view.outcome, view.step) == ("READY", "FAILED", "validate")
        assert view.error
        assert "nowhere" in view.error
