"""Several replicas under one command: they share the partitions, and start, drain and die together."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, long_job, preload, short_job, uncommitted, until_committed
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


class Command(Replica):
    """One command with several replicas; its log is theirs too."""

    def of(self, event: str) -> list[dict[str, Any]]:
        return [found for found in self.events() if found["event"] == event]

    @property
    def children(self) -> dict[str, int]:
        """Process id of each replica, by name."""
        return {found["child"]: found["pid"] for found in self.of("replica_started")}

    async def until_ready(self, within: float = 90.0) -> None:
        def all_ready() -> bool:
            if self.returncode is not None:
                raise AssertionError(f"the command ended with {self.returncode}:\n{self.tail()}")
            return {event["replica"] for event in self.of("ready")} == set(self.children) != set()

        await wait_until(all_ready, within=within, what="two ready replicas")


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_one_command_shares_the_partitions_among_its_replicas_and_drains_all_of_them(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=4)
    command = Command(stack, topics, models / "a", tmp_path / "log", devices="cpu,cpu", replica="r")
    async with replicas(command), reader(stack, topics.results) as results:
        answered = Answered(results)
        await answered.until(await preload(stack, topics.jobs, 400, short_job))
        assert set(command.children) == {"r-0", "r-1"}
        held = {event["replica"]: event for event in command.of("partitions_assigned")}
        assert all(held[name]["count"] for name in command.children)
        ports = {event["replica"]: event["http_port"] for event in command.of("starting")}
        assert len(set(ports.values())) == 2
        bulk = await preload(stack, topics.bulk, 300, lambda n: long_job(n) | {"id": f"bulk-{n}"})
        await answered.some(500)
        assert await command.stop() == 0
        await answered.all()
    assert {event["replica"] for event in command.of("stopped")} == {"r-0", "r-1"}
    assert answered.duplicates() == 0
    assert len(answered.counts()) == 400 + len(bulk) - await uncommitted(stack, topics)


async def test_a_replica_that_is_killed_takes_the_others_along_and_the_next_command_loses_nothing(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=4)
    first, second = (
        Command(stack, topics, models / "a", tmp_path / name, devices="cpu,cpu")
        for name in ("first", "second")
    )
    async with reader(stack, topics.results) as results:
        answered = Answered(results)
        async with replicas(first):
            ids = await preload(stack, topics.jobs, 500, long_job)
            await answered.some(50)
            name, pid = next(iter(first.children.items()))
            os.kill(pid, signal.SIGKILL)
            assert await first.ended() == 1
        codes = {event["child"]: event["exit_code"] for event in first.of("replica_ended")}
        assert codes.pop(name) == -signal.SIGKILL
        assert set(codes.values()) == {0}  # the other one drained
        async with replicas(second):
            await answered.until(ids)
            await until_committed(stack, topics)
            assert await second.stop() == 0
    assert set(answered.counts()) == set(ids)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
async def test_no_replica_outlives_a_command_that_is_killed(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    command = Command(stack, topics, models / "a", tmp_path / "log", devices="cpu,cpu")
    await command.start(ready=False)
    try:
        await wait_until(lambda: len(command.children) == 2, within=60, what="two replicas")
        pids = list(command.children.values())
        assert all(map(running, pids))
    finally:
        command.kill()
        await command.ended()
    await wait_until(lambda: not any(map(running, pids)), what="the end of both replicas")


async def test_a_command_told_twice_ends_at_once_with_all_its_replicas(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    command = Command(stack, topics, models / "a", tmp_path / "log", devices="cpu,cpu")
    async with replicas(command), reader(stack, topics.results) as results:
        pids = list(command.children.values())
        await preload(stack, topics.jobs, 2000, long_job)
        await Answered(results).some(10)
        command.kill(signal.SIGTERM)
        await wait_until(lambda: bool(command.of("draining")), what="the drain")
        command.kill(signal.SIGTERM)
        assert await command.ended() == -signal.SIGTERM
        await wait_until(lambda: not any(map(running, pids)), what="the end of both replicas")


async def test_a_setting_that_no_replica_can_use_ends_the_command_with_code_2(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    command = Command(stack, topics, tmp_path / "none", tmp_path / "log", devices="cpu,cpu")
    await command.start(ready=False)
    assert await command.ended() == 2
    assert {event["reason"] for event in command.of("failed")} == {"SettingsError"}
