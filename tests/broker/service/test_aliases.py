"""Several aliases of two replicas on a real Kafka: each job is run by its alias's model, and an alias changes by a message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_sdk import EmbedClient, InvalidArgument, UnknownModel, UnknownModelVersion
from embedq_sdk.admin.control import live_replicas, reload_model, rollback_model
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.admin.splits import split_alias, splits_in_force
from embedq_sdk.dev import DevStack
from embedq_shared.fleet import share_of
from embedq_shared.vectors import cut_and_normalize
from tests.helpers.delivery import load, until_committed
from tests.helpers.service_process import Reader, Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(240)]

_ALIASES: Final = ("default", "second", "third")
_DIMENSIONS: Final = 64


def job(number: int) -> dict[str, Any]:
    """For each alias in turn, and a few for one that nobody serves; few texts, so that the cache knows them for each model."""
    alias = "nobody's" if number % 20 == 19 else _ALIASES[number % 3]
    return {"id": f"{number}", "input": f"text {number % 7}", "model": alias, "dimensions": _DIMENSIONS}


def split_job(number: int) -> dict[str, Any]:
    return job(number) | {"id": f"user-{number}", "model": "test"}


def own(path: Path) -> tuple[str, list[np.ndarray[Any, Any]]]:
    """A model's version, and its vectors of the texts."""
    encoder = load_encoder(path, device="cpu", threads=1)
    try:
        found = encoder.tokenize([Text(f"text {number}") for number in range(7)])
        ids = [tokens.ids for tokens in found if isinstance(tokens, Tokens)]
        vectors = [cut_and_normalize(encoder.encode([each])[0], _DIMENSIONS) for each in ids]
        return encoder.model_version, vectors
    finally:
        encoder.close()


async def end_of(updates: AsyncIterator[RolloutUpdate]) -> RolloutUpdate:
    last: RolloutUpdate | None = None
    async for update in updates:
        last = update
    assert last is not None
    return last


def loads(*wanted: Replica) -> list[int]:
    """How many models each replica has loaded and warmed up."""
    return [sum(event["event"] == "model_loaded" for event in one.events()) for one in wanted]


async def test_each_alias_is_served_by_its_model_and_changes_to_one_in_memory_without_a_load(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    a, b = await asyncio.gather(*(asyncio.to_thread(own, models / name) for name in ("a", "b")))
    truth = dict([a, b])
    topics = await make_topics(stack, fresh_prefix())
    server: dict[str, Any] = {"servers": stack.kafka_servers, "topic_prefix": topics.prefix}
    pair = [
        Replica(
            stack,
            topics,
            models / "a",
            tmp_path / name,
            replica=name,
            aliases=f"second={models / 'b'},third",
            compile_cache=tmp_path / "cache",
        )
        for name in ("one", "two")
    ]
    async with (
        replicas(*pair),
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as client,
    ):
        assert loads(*pair) == [2, 2], "the third alias has the first one's model"

        # A pin is kept, or the answer says what is served.
        pinned = await client.embed_detailed(["text 0"], model="second", model_version=b[0])
        assert pinned.model_version == b[0]
        with pytest.raises(UnknownModelVersion, match=a[0]):
            await client.embed("text 0", model="third", model_version=b[0])
        with pytest.raises(UnknownModel, match="'default', 'second', 'third'"):
            await client.embed("text 0", model="fourth")

        async with load(stack, topics.jobs, results, window=32, make=job) as jobs:
            await jobs.progress(100)
            before = len(jobs.ids)
            to_resident = await end_of(
                reload_model(path="a", alias="second", canary=True, timeout=patient(60), **server)
            )
            assert to_resident.progress == "ready", to_resident
            assert loads(*pair) == [2, 2]
            changed = len(jobs.ids)
            await jobs.progress(60)

            # The model that nobody had any more is loaded again, and only the one alias has it.
            back = await end_of(rollback_model(alias="second", timeout=patient(60), **server))
            assert back.progress == "ready", back
            assert loads(*pair) == [3, 3]
            await jobs.progress(60)

        await until_committed(stack, topics)
        assert set(jobs.answered.counts()) == set(jobs.ids)
        assert jobs.answered.duplicates() == 0
        versions: dict[str, set[str]] = {alias: set() for alias in _ALIASES}
        for result in jobs.answered.results:
            number = int(result["id"])
            if result["model"] == "nobody's":
                assert result["error"]["code"] == "unknown_model"
                continue
            versions[result["model"]].add(result["model_version"])
            vector = truth[result["model_version"]][number % 7]
            np.testing.assert_allclose(result["data"][0]["embedding"], vector, atol=1e-5)
            if result["model"] == "second" and number < before - 32:
                assert result["model_version"] == b[0]
        second = [one for one in jobs.answered.results if one["model"] == "second"]
        assert a[0] in {one["model_version"] for one in second if int(one["id"]) >= changed}
        assert versions == {"default": {a[0]}, "third": {a[0]}, "second": {a[0], b[0]}}

        # Every alias of every replica has a status of its own, which none overwrites.
        last = {record.key: record for record in await status.all()}
        assert sorted(last) == [b"one", b"one/second", b"one/third", b"two", b"two/second", b"two/third"]
        found = await live_replicas(**server)
        assert [(one.replica, one.alias, one.state, one.model_version) for one in found] == [
            (replica, alias, "READY", b[0] if alias == "second" else a[0])
            for replica in ("one", "two")
            for alias in _ALIASES
        ]
        metrics = await pair[0].metrics()
        serving = [name for name in metrics if name.startswith("embedq_model_info{")]
        assert sorted(name.partition('alias="')[2].partition('"')[0] for name in serving) == list(_ALIASES)

        # A split begins with a message, and each job is run by the model whose share its id is.
        weights = {"default": 1, "second": 1}
        await split_alias(alias="test", weights=weights, **server)
        assert await splits_in_force(**server) == {"test": weights}
        await wait_until(lambda: _both_know(status, {"test": weights}), what="replicas that know the split")
        async with load(stack, topics.jobs, results, window=16, make=split_job) as more:
            await more.progress(40)
        shared = {one["id"]: one for one in more.answered.results if one["id"] in set(more.ids)}
        for id, result in shared.items():
            share = share_of("test", weights, id)
            assert (result["model"], result["model_version"]) == ("test", b[0] if share == "second" else a[0])
        assert len({one["model_version"] for one in shared.values()}) == 2
        await split_alias(alias="test", weights={}, **server)
        await wait_until(lambda: _both_know(status, {}), what="replicas that know its end")
        with pytest.raises(UnknownModel):
            await client.embed("text 0", model="test")
        with pytest.raises(InvalidArgument, match="a name that no replica serves by itself"):
            await split_alias(alias="second", weights={"default": 1}, **server)
        with pytest.raises(InvalidArgument, match=r"aliases that live replicas serve .*, got fourth"):
            await split_alias(alias="test", weights={"default": 1, "fourth": 1}, **server)

        assert await asyncio.gather(*(one.stop() for one in pair)) == [0, 0]
        await wait_until(lambda: _all_stopped(status), what="a goodbye of each alias")


async def _both_know(status: Reader, splits: dict[str, Any]) -> bool:
    last = {record.key: json.loads(record.value) for record in await status.all()}
    return all(last[name]["splits"] == splits for name in (b"one", b"two"))


async def _all_stopped(status: Reader) -> bool:
    last = {record.key: record.value for record in await status.all()}
    return len(last) == 6 and all(b'"STOPPED"' in value for value in last.values())
