"""Replicas come, go, die and freeze on a real Kafka: nobody else waits for it, and an orderly hand-over repeats nothing.

The workers are the real intake without a model, so that what is measured is the group. Each test says what it measured (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.delivery import until_committed
from tests.helpers.groups import SteadyLoad, Worker, say, steady_load, workers
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(240)]

PAUSE_S = 1.0
"""What a joiner, a leaver or a killed replica may cost the others."""


async def group_of(stack: DevStack) -> Topics:
    return await make_topics(stack, fresh_prefix(), partitions=8)


async def position(load: SteadyLoad) -> int:
    return len(await load.results())


async def test_ten_joins_and_leaves_in_a_row_lose_and_repeat_nothing_and_nobody_waits(
    stack: DevStack, tmp_path: Path
) -> None:
    topics = await group_of(stack)
    one, two, three = (Worker(stack, topics, tmp_path, name) for name in ("one", "two", "three"))
    async with workers(one, two, three), steady_load(stack, topics) as load:
        await load.progress(200)
        begun = await position(load)
        for worker in (one, two, three, one, two):
            assert await worker.stop() == 0
            await load.progress(50)
            await worker.start()
            await load.progress(50)
        await load.progress(200)
        load.finish()
        await load.answered()
        await until_committed(stack, topics)
        longest, repeated = await load.longest_wait(since=begun), await load.repeated()
    say(f"ten joins and leaves: {len(load.ids)} jobs, {repeated} repeated, longest wait {longest:.2f} s")
    assert repeated == 0
    assert longest <= patient(PAUSE_S)


@pytest.mark.parametrize("restart", ["none", "another name", "same name"])
async def test_a_killed_replica_stops_nobody_and_its_partitions_wait_for_its_session_at_most(
    stack: DevStack, tmp_path: Path, restart: str
) -> None:
    topics = await group_of(stack)
    one, two, three = (Worker(stack, topics, tmp_path, name) for name in ("one", "two", "three"))
    four = Worker(stack, topics, tmp_path, "three" if restart == "same name" else "four")
    async with workers(one, two, three), steady_load(stack, topics) as load:
        await load.progress(400)
        begun = await position(load)
        await load.progress(200)
        dead = await load.partitions_of(three, begun)
        assert dead
        killed_at = await position(load)
        three.kill()
        await three.ended()
        if restart != "none":
            await four.start(joined=False)

        async def taken_over() -> bool:
            results = (await load.results())[killed_at:]
            return {
                r["partition"] for r in results if r["worker"] != three.replica or restart == "same name"
            } >= dead

        await wait_until(taken_over, within=60, what="the dead one's partitions to be read by others")
        await load.progress(400)
        load.finish()
        await load.answered()
        await until_committed(stack, topics)
        others = await load.longest_wait(since=killed_at, but=dead)
        orphans = await load.longest_wait(since=killed_at, of=dead)
        repeated = await load.repeated()
        if not four.process_ended():
            assert await four.stop() == 0
    say(
        f"SIGKILL, restart: {restart}: others waited {others:.2f} s at most, the dead one's jobs {orphans:.2f} s "
        f"(session {three.session_s:.0f} s), {repeated} repeated"
    )
    assert others <= patient(PAUSE_S)
    assert orphans <= three.session_s + patient(2.0)
    if restart == "same name":
        assert "predecessor removed" in "".join(map(str, four.events()))


async def test_a_replica_frozen_beyond_its_session_is_fenced_and_no_commit_goes_back(
    stack: DevStack, tmp_path: Path
) -> None:
    topics = await group_of(stack)
    frozen, other = (Worker(stack, topics, tmp_path, name) for name in ("frozen", "other"))
    group = f"{topics.prefix}.embedq"
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    furthest: dict[TopicPartition, int] = {}
    watching = True

    async def watch() -> None:
        while watching:
            for partition, stored in (await admin.list_consumer_group_offsets(group)).items():
                assert stored.offset >= furthest.get(partition, 0), f"{partition} went back"
                furthest[partition] = stored.offset
            await asyncio.sleep(0.05)

    try:
        async with workers(frozen, other), steady_load(stack, topics) as load:
            await load.progress(300)
            watcher = asyncio.create_task(watch())
            frozen.kill(signal.SIGSTOP)
            times = other.count("partitions_assigned")
            await other.until("partitions_assigned", times + 1)
            await load.progress(400)
            times = frozen.count("partitions_assigned")
            frozen.kill(signal.SIGCONT)
            await frozen.until("expelled_from_group")
            await frozen.until("partitions_assigned", times + 1)
            await load.progress(400)
            load.finish()
            await load.answered()
            await until_committed(stack, topics)
            watching = False
            await watcher
            repeated = await load.repeated()
            assert [await frozen.stop(), await other.stop()] == [0, 0]
    finally:
        await admin.close()
    say(f"SIGSTOP: {repeated} of {len(load.ids)} repeated")
    # What it had in flight or uncommitted when it froze, and what it took on waking before it heard: no more than is
    # answered in the time of a commit, and a poll.
    assert repeated <= 8 * 64 + 512


async def test_a_static_member_that_stops_and_comes_back_costs_no_rebalance(
    stack: DevStack, tmp_path: Path
) -> None:
    topics = await group_of(stack)
    one, two = (Worker(stack, topics, tmp_path, name, static_membership=True) for name in ("one", "two"))
    async with workers(one, two), steady_load(stack, topics) as load:
        await load.progress(300)
        await wait_until(lambda: bool(one.generations()) and bool(two.generations()), what="a settled group")
        before = one.generations()[-1], two.generations()[-1]
        assert await two.stop() == 0
        await two.start()
        await load.progress(300)
        load.finish()
        await load.answered()
        await until_committed(stack, topics)
        assert (one.generations()[-1], two.generations()[-1]) == before
        assert await load.repeated() == 0


async def test_replicas_of_the_former_kind_and_new_ones_form_one_group(
    stack: DevStack, tmp_path: Path
) -> None:
    """A rolling upgrade: round robin's members give up all they have before each rebalance, and claim nothing."""
    topics = await group_of(stack)
    former = AIOKafkaConsumer(
        *topics.lanes,
        bootstrap_servers=stack.kafka_servers,
        group_id=f"{topics.prefix}.embedq",
        enable_auto_commit=False,
        partition_assignment_strategy=(RoundRobinPartitionAssignor,),
        heartbeat_interval_ms=300,
    )
    await former.start()  # the group's leader
    polling = True

    async def poll() -> None:
        while polling:
            await former.getmany(timeout_ms=100)

    task = asyncio.create_task(poll())
    one, two = (Worker(stack, topics, tmp_path, name) for name in ("one", "two"))
    try:
        async with workers(one, two):
            await wait_until(
                lambda: 0 < len(former.assignment()) < 16 and one.generations()[-1] == two.generations()[-1],
                what="a group of both kinds",
            )
            assert len(former.assignment()) in (5, 6)
            polling = False
            await task
            await former.stop()  # a new one becomes the leader
            async with steady_load(stack, topics) as load:
                await load.progress(300)
                load.finish()
                await load.answered()
    finally:
        polling = False
        await former.stop()


async def test_a_job_that_others_overtake_for_too_long_is_given_up_and_its_partition_goes_on(
    stack: DevStack, tmp_path: Path
) -> None:
    topics = await group_of(stack)
    worker = Worker(
        stack, topics, tmp_path, "one", swallow="job-100", stuck_after_s=1.0, stuck_limit_s=patient(3.0)
    )
    async with workers(worker), steady_load(stack, topics) as load:
        await worker.until("trouble")
        reason = next(event["reason"] for event in worker.events() if event["event"] == "trouble")
        assert reason.startswith(f"{topics.jobs}-{100 % 8} is stuck at offset {100 // 8}")
        await worker.until("record_given_up")
        load.finish()
        await load.answered()
        await until_committed(stack, topics)
        assert [r["status"] for r in await load.results() if r["id"] == "job-100"] == ["error"]
