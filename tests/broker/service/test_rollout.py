"""Three replicas change their model as one fleet: in turns, back again on failure, and whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.admin import RolloutUpdate, live_replicas, reload_model, rollback_model
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.ailing_model import AILING
from tests.helpers.delivery import statuses
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

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(400)]

NAMES = ("r1", "r2", "r3")
SOAK_S = 5.0


class Fleet:
    """Three replicas, each with a model root of its own, and all that they say."""

    def __init__(self, stack: DevStack, topics: Topics, folder: Path, models: Path) -> None:
        self.stack = stack
        self.topics = topics
        self.folder = folder
        for name in NAMES:
            root = folder / name
            for model in "ab":
                shutil.copytree(models / model, root / model)
            shutil.copytree(models / "b", root / "hangs")
            (root / "hangs" / "hangs").write_bytes(b"")
        nan_weights(folder / "nan")
        for name, source in (("r1", models / "b"), ("r2", folder / "nan"), ("r3", folder / "nan")):
            shutil.copytree(folder / "nan", folder / name / "nan")
            shutil.copytree(source, folder / name / "halfway")
        self.members = {name: self.replica(name) for name in NAMES}

    def replica(self, name: str, log: str = "") -> Replica:
        return Replica(
            *(self.stack, self.topics, self.folder / name / "a", self.folder / f"{name}{log}.log"),
            python=("-m", "tests.helpers.bad_loads"),
            replica=name,
        )

    async def reload(self, path: str, **more: Any) -> RolloutUpdate:
        """Watch a reload to its end."""
        return await last(
            reload_model(
                self.stack.kafka_servers,
                path,
                topic_prefix=self.topics.prefix,
                timeout=patient(120),
                connect_timeout=patient(10),
                **more,
            )
        )

    async def hangs(self, status: Reader, version: int) -> str:
        """Begin a reload whose canary does not come to an end; the canary's name."""
        begun = await self.command("reload", "hangs", "--no-wait")
        assert await begun.wait() == 0
        said = await until(status, lambda said: who_tried(said, version) != [], "the canary's load")
        [canary] = who_tried(said, version)
        return canary

    async def serving(self) -> dict[str, str | None]:
        """The directory of each live replica's model."""
        found = await live_replicas(
            self.stack.kafka_servers, topic_prefix=self.topics.prefix, connect_timeout=patient(10)
        )
        return {replica.replica: replica.path for replica in found}

    def command(self, *arguments: str) -> Any:
        """Start `embedq`."""
        return asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from embedq_sdk.cli import main; main()", *arguments),
            env=os.environ
            | {"EMBEDQ_KAFKA_SERVERS": self.stack.kafka_servers, "EMBEDQ_TOPIC_PREFIX": self.topics.prefix},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )


async def last(updates: AsyncIterator[RolloutUpdate]) -> RolloutUpdate:
    return [update async for update in updates][-1]


@asynccontextmanager
async def a_fleet(stack: DevStack, models: Path, folder: Path) -> AsyncIterator[Fleet]:
    topics = await make_topics(stack, fresh_prefix())
    fleet = await asyncio.to_thread(Fleet, stack, topics, folder, models)
    async with replicas(*fleet.members.values()):
        yield fleet


def of_version(said: Iterable[dict[str, Any]], version: int) -> list[dict[str, Any]]:
    return [status for status in said if status["version"] == version]


def most_at_once(said: Sequence[dict[str, Any]]) -> int:
    """The most replicas that worked in their turn at the same time, as the topic's order has it."""
    working: set[str] = set()
    most = 0
    for status in said:
        if status["turn"] is not None and status["state"] == "LOADING" and status["step"] != "validate":
            working.add(status["replica"])
        elif status["turn"] is None or status["state"] != "LOADING":
            working.discard(status["replica"])
        most = max(most, len(working))
    return most


def who_tried(said: Sequence[dict[str, Any]], version: int) -> list[str]:
    """The replicas that began to load for a command, in order."""
    tried = [status["replica"] for status in of_version(said, version) if status["step"] == "load"]
    return list(dict.fromkeys(tried))


def began(said: Sequence[dict[str, Any]], version: int, replica: str) -> float:
    """When a replica began to load for a command, in seconds of its own clock."""
    its = [one for one in of_version(said, version) if one["replica"] == replica]
    return float(next(one["at"] for one in its if one["step"] == "load")) / 1000


def ready_at(said: Sequence[dict[str, Any]], version: int, replica: str) -> float:
    """When it first said that it serves what a command asks for."""
    its = [one for one in of_version(said, version) if one["replica"] == replica]
    return float(next(one["at"] for one in its if one["state"] == "READY")) / 1000


async def until(status: Reader, told: Any, what: str) -> list[dict[str, Any]]:
    """All statuses, as soon as they satisfy a condition."""

    async def found() -> bool:
        return bool(told(await statuses(status)))

    await wait_until(found, within=120, what=what)
    return await statuses(status)


def all_ready(version: int, names: Iterable[str] = NAMES) -> Any:
    """Whether these replicas say READY for a version, and say nothing later of another one."""

    def are(said: list[dict[str, Any]]) -> bool:
        latest = {one["replica"]: one for one in said}
        return all((latest[name]["version"], latest[name]["state"]) == (version, "READY") for name in names)

    return are


async def test_a_fleet_changes_in_turns_goes_back_whole_when_one_fails_and_starters_join_in(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    async with a_fleet(stack, models, tmp_path) as fleet, reader(stack, fleet.topics.status) as status:
        good = await fleet.reload("b", max_unavailable=1, soak=SOAK_S)
        assert (good.progress, [replica.path for replica in good.replicas]) == ("ready", ["b"] * 3)
        said = await statuses(status)
        assert sorted(who_tried(said, 1)) == list(NAMES)
        assert most_at_once(said) == 1
        canary, second, _ = who_tried(said, 1)
        assert began(said, 1, second) - ready_at(said, 1, canary) >= SOAK_S

        back = await last(
            rollback_model(
                stack.kafka_servers,
                topic_prefix=fleet.topics.prefix,
                max_unavailable=None,
                timeout=patient(120),
                connect_timeout=patient(10),
            )
        )
        assert (back.progress, [replica.path for replica in back.replicas]) == ("ready", ["a"] * 3)

        bad = await fleet.reload("nan")
        assert (bad.progress, bad.version, bad.rollback_version) == ("rolled_back", 3, 4)
        assert bad.reason is not None
        said = await statuses(status)
        [canary] = who_tried(said, 3)
        assert bad.reason.startswith(f"{canary}: check: expected finite vectors")
        assert [replica.path for replica in bad.replicas] == ["a"] * 3
        assert who_tried(said, 4) == []  # nobody had left the old model, so nobody loaded it again
        assert f"version 3 was taken back: {canary}: check" in of_version(said, 4)[-1]["error"]

        # The copy of the first by name is good, the others' are not: who has changed already goes back. All have seen the
        # directory before, so that nobody is still at its validation when the first could begin.
        assert (await fleet.reload("halfway", digest="sha256:" + "0" * 64)).progress == "rolled_back"
        later = await fleet.reload("halfway", max_unavailable=1)
        assert (later.progress, later.version, later.rollback_version) == ("rolled_back", 7, 8)
        assert [replica.path for replica in later.replicas] == ["a"] * 3
        said = await statuses(status)
        assert who_tried(said, 7) == ["r1", "r2"]
        assert who_tried(said, 8) == ["r1"]
        assert most_at_once(said) == 1

        missing = await fleet.reload("no/such-model")
        assert missing.progress == "rolled_back"
        assert missing.reason is not None
        assert "embedq pull no/such-model" in missing.reason

        # One that starts while the canary is at it begins with the old model, and has its turn like the others.
        assert await fleet.members["r3"].stop() == 0
        canary = await fleet.hangs(status, 11)
        again = fleet.replica("r3", "-again")
        async with replicas(again):
            assert (await fleet.serving())["r3"] == "a"
            superseding = await fleet.reload("b")
            assert superseding.progress == "ready"
            assert await fleet.serving() == dict.fromkeys(NAMES, "b")
            assert who_tried(await statuses(status), 11) == [canary]


async def test_whoever_dies_meanwhile_the_fleet_ends_on_one_model(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    async with (
        a_fleet(stack, models, tmp_path) as fleet,
        reader(stack, fleet.topics.status) as status,
        reader(stack, fleet.topics.control) as control,
    ):
        # The command line is killed as soon as its command is written; the fleet goes on by itself.
        dying = await fleet.command("reload", "b", "--max-unavailable", "2")
        await control.until(1)
        dying.kill()
        await dying.wait()
        said = await until(status, all_ready(1), "a fleet that is through")
        assert len(who_tried(said, 1)) == 3
        assert set((await fleet.serving()).values()) == {"b"}

        # Killed again; and nobody is there to take back what fails but the replicas.
        dying = await fleet.command("reload", "nan")
        await control.until(2)
        dying.kill()
        await dying.wait()
        said = await until(status, all_ready(3), "a fleet that went back")
        assert len(who_tried(said, 2)) == 1
        written = [json.loads(record.value) for record in await control.all()]
        assert (written[-1]["rollback_of"], written[-1]["path"]) == (2, "b")

        # The canary is killed in the middle of its load: nobody else tries that model.
        canary = await fleet.hangs(status, 4)
        fleet.members[canary].kill()
        await fleet.members[canary].ended()
        others = [name for name in NAMES if name != canary]
        said = await until(status, all_ready(5, others), "a fleet without its canary")
        assert who_tried(said, 4) == [canary]
        assert f"{canary}: fell silent in step load" in of_version(said, 5)[-1]["error"]
        fleet.members[canary] = fleet.replica(canary, "-again")
        async with replicas(fleet.members[canary]):
            await until(status, all_ready(5), "the canary's successor")
            assert await fleet.serving() == dict.fromkeys(NAMES, "b")

            # The same once more, and its successor is there before anybody has missed it.
            canary = await fleet.hangs(status, 6)
            fleet.members[canary].kill()
            await fleet.members[canary].ended()
            third = fleet.replica(canary, "-third")
            async with replicas(third):
                said = await until(status, all_ready(7), "a fleet whose canary was replaced")
                assert len(who_tried(said, 6)) == 1
                assert await fleet.serving() == dict.fromkeys(NAMES, "b")


async def test_a_canary_whose_model_fails_in_its_soak_time_takes_the_fleet_back(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    pair = [
        Replica(
            *(stack, topics, models / "a", tmp_path / f"{name}.log"),
            python=("-m", "tests.helpers.ailing_model"),
            replica=name,
            retry_delays_s="",
        ).in_environment({AILING: str(tmp_path / "ailing")})
        for name in NAMES[:2]
    ]
    async with replicas(*pair), reader(stack, topics.status) as status, producer(stack) as client:
        reloading = asyncio.create_task(
            last(
                reload_model(
                    stack.kafka_servers,
                    "b",
                    topic_prefix=topics.prefix,
                    soak=3600.0,
                    connect_timeout=patient(10),
                )
            )
        )

        def canary_serves(said: list[dict[str, Any]]) -> bool:
            return any(one["state"] == "READY" for one in of_version(said, 1))

        said = await until(status, canary_serves, "the canary's model")
        [canary] = who_tried(said, 1)
        for partition in range(4):  # whoever reads it
            job = {"id": f"job-{partition}", "input": "incurable", "dimensions": 32}
            await client.send_and_wait(topics.jobs, json.dumps(job).encode(), partition=partition)
        async with asyncio.timeout(patient(120)):
            ended = await reloading
        assert (ended.progress, [replica.path for replica in ended.replicas]) == ("rolled_back", ["a"] * 2)
        assert (ended.reason or "").startswith(f"{canary}: a text got no vector ")
        assert who_tried(await statuses(status), 1) == [canary], "nobody else has tried it"
