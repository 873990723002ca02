"""Bulk jobs that fail wait and are run again: one that heals is answered, one that does not ends in the dead letters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from embedq_sdk.admin.dead_letters import letter_of
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.ailing_model import AILING
from tests.helpers.delivery import short_job, until_it_logged
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

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

DELIVERIES: Final = ("at-least-once", "exactly-once")


class Fleet:
    """Topics with two retry tiers, and replicas whose model fails on some texts until it is `cured`."""

    def __init__(self, stack: DevStack, topics: Topics, models: Path, folder: Path) -> None:
        self.stack = stack
        self.topics = topics
        self._models = models
        self._folder = folder
        self._file = folder / "ailing"
        self._file.touch()

    @classmethod
    async def made(cls, stack: DevStack, models: Path, folder: Path) -> Fleet:
        prefix = fresh_prefix()
        names = [Topics(prefix).retry(tier) for tier in (1, 2)]
        topics = await make_topics(stack, prefix, partitions=2, names=names)
        return cls(stack, topics, models, folder)

    def replica(self, name: str, *, delays: tuple[float, ...], **settings: Any) -> Replica:
        """One of them; the delays are seconds of a quiet machine."""
        made = Replica(
            self.stack,
            self.topics,
            self._models / "a",
            self._folder / name,
            python=["-m", "tests.helpers.ailing_model"],
            redis=False,
            replica=name,
            retry_delays_s=",".join(f"{patient(delay):.1f}" for delay in delays),
            **settings,
        )
        return made.in_environment({AILING: str(self._file)})

    def cure(self) -> None:
        self._file.unlink()

    async def send(self, *jobs: dict[str, Any]) -> list[int]:
        """Bulk jobs; the timestamp of each one's record, milliseconds."""
        async with producer(self.stack) as client:
            sent = [
                await client.send(
                    self.topics.bulk,
                    json.dumps(job).encode(),
                    key=job["id"].encode(),
                    headers=[("correlation-id", job["id"].encode())],
                )
                for job in jobs
            ]
            return [(await record).timestamp for record in sent]

    async def is_committed(self) -> bool:
        """Whether nothing is left on the bulk lane and the retry topics."""
        names = (self.topics.bulk, self.topics.retry(1), self.topics.retry(2))
        async with reader(self.stack, *names, committed=True) as everything:
            records = await everything.all()
        ends = {(record.topic, record.partition): record.offset + 1 for record in records}
        admin = AIOKafkaAdminClient(bootstrap_servers=self.stack.kafka_servers)
        await admin.start()
        try:
            stored = await admin.list_consumer_group_offsets(f"{self.topics.prefix}.embedq")
        finally:
            await admin.close()
        done = {(place.topic, place.partition): its.offset for place, its in stored.items()}
        return all(done.get(place, 0) >= end for place, end in ends.items())

    async def until_committed(self) -> None:
        await wait_until(self.is_committed, within=60, what="a commit of everything")


def ailing(number: int) -> dict[str, Any]:
    return short_job(number) | {"input": f"ailing text number {number}"}


def ids(found: Iterable[Any]) -> Counter[str]:
    return Counter(json.loads(record.value)["id"] for record in found)


async def has(found: Reader, count: int) -> bool:
    return len(await found.all()) >= count


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_a_job_that_heals_is_answered_and_one_that_does_not_ends_in_the_dead_letters(
    stack: DevStack, models: Path, tmp_path: Path, delivery: str
) -> None:
    fleet = await Fleet.made(stack, models, tmp_path)
    topics = fleet.topics
    replica = fleet.replica("one", delays=(3, 1), bulk_delivery=delivery)
    async with (
        replicas(replica),
        reader(stack, topics.retry(1), committed=True) as first,
        reader(stack, topics.results, committed=True) as results,
        reader(stack, topics.dead_letters, committed=True) as buried,
    ):
        [_, incurable_at] = await fleet.send(ailing(1), short_job(2) | {"input": "incurable"})
        await wait_until(partial(has, first, 2), within=60, what="two jobs that wait")
        assert await results.all() == []
        fleet.cure()
        await results.until(2, within=90)
        [letter] = await buried.until(1, within=30)
        await fleet.until_committed()
        metrics = await replica.metrics()
        assert await replica.stop() == 0
        answers = {json.loads(record.value)["id"]: record for record in await results.all()}
        assert ids(await results.all()) == Counter(["job-1", "job-2"]), "each once"
        assert ids(await buried.all()) == Counter(["job-2"])
    assert json.loads(answers["job-1"].value)["object"] == "list"
    assert dict(answers["job-1"].headers)["correlation-id"] == b"job-1"
    assert json.loads(answers["job-2"].value)["error"]["code"] == "internal"
    told = letter_of(0, 0, letter.value, letter.headers)
    assert (told.original_topic, told.attempts, told.original_timestamp) == (topics.bulk, 3, incurable_at)
    assert [(run.code, run.replica) for run in told.retries] == [("internal", "one")] * 2
    assert metrics['embedq_retries_total{reason="internal",tier="1"}'] == 2
    assert metrics['embedq_retries_total{reason="internal",tier="2"}'] == 1


@pytest.mark.slow
@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_kills_lose_no_job_that_waits_and_under_exactly_once_repeat_none(
    stack: DevStack, models: Path, tmp_path: Path, delivery: str
) -> None:
    fleet = await Fleet.made(stack, models, tmp_path)
    topics = fleet.topics
    jobs = [ailing(number) for number in range(300)]
    replica = fleet.replica("one", delays=(3, 3), bulk_delivery=delivery)
    async with (
        replicas(replica),
        reader(stack, topics.retry(1), committed=True) as first,
        reader(stack, topics.retry(2), committed=True) as second,
        reader(stack, topics.results, committed=True) as results,
        reader(stack, topics.dead_letters, committed=True) as buried,
    ):
        await fleet.send(*jobs)
        # While jobs go to the first tier, while they come back from it, and while they are answered.
        for waits in (first, second, results):
            await wait_until(partial(has, waits, 50), within=120, what="50 jobs")
            replica.kill()
            await replica.ended()
            if waits is second:
                fleet.cure()
            await replica.start()

        async def all_there() -> bool:
            return len(ids(await results.all())) == len(jobs)

        await wait_until(all_there, within=120, what="every job's answer")
        await fleet.until_committed()
        assert await replica.stop() == 0
        answered, letters = ids(await results.all()), ids(await buried.all())
    if delivery == "exactly-once":
        assert answered.total() == len(jobs), "each once"
    assert letters.keys() <= answered.keys()


async def test_a_job_that_waits_moves_to_another_replica_and_is_answered_there(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    fleet = await Fleet.made(stack, models, tmp_path)
    one, two = (fleet.replica(name, delays=(5,)) for name in ("one", "two"))
    async with (
        replicas(one, two),
        reader(stack, fleet.topics.retry(1)) as first,
        reader(stack, fleet.topics.results) as results,
    ):
        await fleet.send(*(ailing(number) for number in range(8)))
        await wait_until(partial(has, first, 8), within=60, what="jobs that wait")
        fleet.cure()
        assigned = sum(event["event"] == "partitions_assigned" for event in two.events())
        assert await one.stop() == 0
        await until_it_logged(two, "partitions_assigned", times=assigned + 1)
        await results.until(8, within=60)
        await fleet.until_committed()
        assert await two.stop() == 0
        assert ids(await results.all()) == Counter(f"job-{number}" for number in range(8))
    assert {record.partition for record in first.records} == {0, 1}, "the jobs of two partitions wait on two"
