"""Two pools on a real Kafka: each job reaches the pool in which its alias lives, also while the alias moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pytest

from embedq_sdk import EmbedClient, UnknownModel
from embedq_sdk.admin.control import live_replicas, reload_model, service_status
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.dev import DevStack
from embedq_sdk.errors import InvalidArgument, TopicMissing
from tests.helpers.delivery import load, until_committed
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(240)]

_GROUP: Final = "{prefix}.embedq"


async def end_of(updates: AsyncIterator[RolloutUpdate]) -> RolloutUpdate:
    last: RolloutUpdate | None = None
    async for update in updates:
        last = update
    assert last is not None
    return last


def moving_job(number: int) -> dict[str, Any]:
    return {"id": f"old-lane-{number}", "input": f"text number {number}", "model": "moves", "dimensions": 32}


class Asker:
    """Calls of the SDK for one alias, one after the other, and which model answered each."""

    def __init__(self, client: EmbedClient, alias: str) -> None:
        self.versions: list[str] = []
        self._client = client
        self._alias = alias
        self._ending = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._ending:
            text = f"asked {len(self.versions)}"
            found = await self._client.embed_detailed([text], model=self._alias, timeout=patient(30))
            self.versions.append(found.model_version or "")

    async def progress(self, count: int) -> None:
        goal = len(self.versions) + count
        await wait_until(lambda: self._task.done() or len(self.versions) >= goal, what="further answers")

    async def end(self) -> list[str]:
        """Which models answered, in turn."""
        self._ending = True
        await self._task
        return [version for version, _ in groupby(self.versions)]


async def test_jobs_reach_the_pool_of_their_alias_and_a_move_loses_none(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    server: dict[str, Any] = {"servers": stack.kafka_servers, "topic_prefix": topics.prefix}
    shared: dict[str, Any] = {"compile_cache": tmp_path / "cache", "redis": False}
    async with EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as early:
        big = await make_topics(stack, topics.prefix, pool="big")
        home = Replica(
            stack, topics, models / "a", tmp_path / "home", replica="home", aliases="moves", **shared
        )
        other = Replica(
            *(stack, big, models / "b", tmp_path / "other"),
            **({"replica": "other", "alias": "large", "aliases": "moves"} | shared),
        )
        async with (
            replicas(home, other),
            running(GatewayProcess(stack, topics, tmp_path / "gateway.log")) as gateway,
            reader(stack, topics.results) as results,
            reader(stack, topics.status) as status,
            EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as client,
        ):
            # As long as no command says where it lives, an alias is the default pool's, where nobody serves it.
            with pytest.raises(UnknownModel, match="'default', 'moves'"):
                await client.embed("x", model="large")
            for wrong, error in (("nowhere", TopicMissing), ("bulk", InvalidArgument)):
                with pytest.raises(error):
                    await end_of(reload_model(path="b", alias="large", pool=wrong, **server))
            done = await end_of(reload_model(path="b", alias="large", timeout=patient(60), **server))
            assert (done.progress, [one.replica for one in done.replicas]) == ("ready", ["other"]), done

            # Nobody names a topic: the SDK (also a client that is older than the pool), a submitted job, the gateway.
            a, b = [
                (await client.embed_detailed(["x"], model=alias)).model_version
                for alias in ("default", "large")
            ]
            assert a != b
            assert (await client.embed_detailed(["x"])).model_version == a
            assert (await early.embed_detailed(["x"], model="large")).model_version == b
            await client.submit("x", id="submitted", model="large", dimensions=32, format="json")
            async with gateway.http() as http:
                for alias, version in (("large", b), ("default", a)):
                    body = {"input": "x", "model": alias, "model_version": version}
                    answer = await http.post("/v1/embeddings", json=body, timeout=patient(30))
                    assert answer.status_code == 200, answer.text
            # Who sends it to the wrong pool by hand is told the right one.
            async with load(stack, topics.jobs, results, window=1, make=_wrongly_sent) as wrong_lane:
                await wrong_lane.progress(1)
            await wrong_lane.answered.until(["submitted"])
            by_id = {one["id"]: one for one in wrong_lane.answered.results}
            assert by_id["submitted"]["model_version"] == b
            assert by_id["wrong-0"]["error"]["code"] == "unknown_model"
            assert by_id["wrong-0"]["error"]["message"].endswith(f"its jobs go to the topic {big.jobs}")

            # An alias moves, under load by the SDK and by jobs that are written to its former lane, and comes back.
            asker = Asker(client, "moves")
            async with load(stack, topics.jobs, results, window=8, make=moving_job) as jobs:
                await asyncio.gather(jobs.progress(10), asker.progress(10))
                moved = await end_of(
                    reload_model(path="b", alias="moves", pool="big", timeout=patient(60), **server)
                )
                assert (moved.progress, [one.replica for one in moved.replicas]) == ("ready", ["other"])
                await asyncio.gather(jobs.progress(10), asker.progress(10))
                back = await end_of(
                    reload_model(path="a", alias="moves", pool="default", timeout=patient(60), **server)
                )
                assert (back.progress, [one.replica for one in back.replicas]) == ("ready", ["home"])
                await asyncio.gather(jobs.progress(10), asker.progress(10))
            assert await asker.end() == [a, b, a]
            mine = [one for one in jobs.answered.results if one["id"].startswith("old-lane")]
            assert {one["id"] for one in mine} == set(jobs.ids)
            assert {one.get("model_version") for one in mine} == {a}, (
                "who had the alias serves on what it has"
            )
            assert jobs.answered.duplicates() == 0
            await until_committed(stack, topics)
            await until_committed(stack, big)

            # What operators see.
            last = {record.key: json.loads(record.value) for record in await status.all()}
            assert {key: one["pool"] for key, one in last.items()} == {
                b"home": None,
                b"home/moves": None,
                b"other": "big",
                b"other/moves": "big",
            }
            assert [(one.replica, one.alias, one.pool) for one in await live_replicas(**server)] == [
                ("home", "default", None),
                ("home", "moves", None),
                ("other", "large", "big"),
                ("other", "moves", "big"),
            ]
            group = _GROUP.format(prefix=topics.prefix)
            whole = await service_status(group=group, **server)
            assert {one.topic: one.jobs for one in whole.lag} == dict.fromkeys((*topics.lanes, *big.lanes), 0)
            of_big = await service_status(group=group, pool="big", **server)
            assert {one.replica for one in of_big.replicas} == {"other"}
            assert [one.topic for one in of_big.lag] == list(big.lanes)
            assert await asyncio.gather(*(one.stop() for one in (home, other))) == [0, 0]


def _wrongly_sent(number: int) -> dict[str, Any]:
    return {"id": f"wrong-{number}", "input": "x", "model": "large"}
