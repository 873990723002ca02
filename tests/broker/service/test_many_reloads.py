"""Reloads back and forth under load, on three replicas: nothing is lost, and no vector, cached or not, is another model's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from safetensors.torch import load_file, save_file

from embedq_sdk.dev import DevStack
from tests.broker.service.test_reload import (
    assert_each_vector_is_its_models_own,
    command,
    list_job,
    outcomes,
    own,
)
from tests.helpers.bad_models import copied
from tests.helpers.delivery import load, until_committed
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.tiny_models import make_tiny_qwen3, minilm_path

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(1800)]

POLICIES: Final = ("availability_preserving", "resource_preserving", None)


def pair(kind: str, models: Path, root: Path) -> Path:
    """Where two models of this kind are, `a` and `b`, which give each text another vector."""
    if kind == "minilm":
        copied(minilm_path(), root / "a")
        file = copied(minilm_path(), root / "b") / "model.safetensors"
        tensors = load_file(file)
        tensors["encoder.layer.5.output.dense.weight"] *= -1
        save_file(tensors, file, metadata={"format": "pt"})
        return root
    if kind == "qwen3":
        for seed, name in enumerate(("a", "b"), start=1):
            make_tiny_qwen3(root / name, seed=seed, max_tokens=2048)
        return root
    return models


@pytest.mark.parametrize(
    ("reloads", "kind"),
    [
        (6, "bert"),
        *(pytest.param(50, kind, marks=pytest.mark.soak) for kind in ("bert", "minilm", "qwen3")),
    ],
)
async def test_reloads_lose_no_job_and_every_vector_is_that_of_the_model_that_it_names(
    stack: DevStack,
    models: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    reloads: int,
    kind: str,
) -> None:
    models = await asyncio.to_thread(pair, kind, models, tmp_path / "pair")
    a, b = await asyncio.to_thread(own, models / "a"), await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    fleet = [
        Replica(stack, topics, models / "a", tmp_path / name, replica=name)
        for name in ("one", "two", "three")
    ]
    async with (
        replicas(*fleet),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
    ):
        async with load(stack, topics.jobs, results, window=32, make=list_job) as jobs:
            for version in range(1, reloads + 1):
                policy = POLICIES[version % len(POLICIES)]
                asked = {} if policy is None else {"policy": policy}
                sent = await command(client, topics, version, "ab"[version % 2], **asked)
                wanted = (a, b)[version % 2].version
                for said in await outcomes(status, sent, len(fleet)):
                    assert (said["state"], said["model_version"]) == ("READY", wanted), said
                changed = len(jobs.ids)
                await jobs.progress(30)
                after = [
                    result for result in jobs.answered.results if int(result["id"].split("-")[1]) >= changed
                ]
                assert {result["model_version"] for result in after} <= {wanted}
        await until_committed(stack, topics)
        answered = jobs.answered
        await answered.all()
        assert set(answered.counts()) == set(jobs.ids)
        assert answered.duplicates() == 0
        assert_each_vector_is_its_models_own(answered.results, a, b)
        cached = [
            (result["model_version"], datum)
            for result in answered.results
            for datum in result["data"]
            if datum["cached"]
        ]
        assert {version for version, _ in cached} == {a.version, b.version}
        record_property("jobs", len(jobs.ids))
        record_property("cached", len(cached))
        assert await asyncio.gather(*(replica.stop() for replica in fleet)) == [0, 0, 0]
