"""Each role works with exactly the rights that docs/security.md lists, and can do nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import TopicAuthorizationFailedError

from embedq_sdk import EmbedClient, KafkaRefused, TopicMissing
from embedq_shared.kafka import KafkaOptions
from embedq_shared.topics import Topics
from tests.helpers.command_line import run_embedq
from tests.helpers.rights import Right, grant, rights
from tests.helpers.secured_kafka import SecuredKafka, secured_kafka
from tests.helpers.service_process import Replica, replicas
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

TOPICS: Final = Topics()
ALL: Final = (
    *TOPICS.lanes,
    TOPICS.control,
    TOPICS.results,
    TOPICS.replies,
    TOPICS.status,
    TOPICS.dead_letters,
    TOPICS.retry(1),
)
ROLES: Final = ("service", "caller", "producer", "reader", "operator", "undertaker", "administrator")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """With the rights of the table, and the topics that its administrator made."""
    table = rights()
    groupless = [
        Right("groupless", *right[1:]) for right in table if right.role == "service" and right.kind != "group"
    ]
    with secured_kafka(tmp_path_factory.mktemp("secured")) as running:
        asyncio.run(grant(running.open, [*table, *groupless]))
        create = ("topics", "create", "--partitions", "2", "--reply-partitions", "2")
        done = asyncio.run(run_embedq(*create, environ=running.environ("administrator")))
        assert (done.code, done.err) == (0, "")
        yield running


def replica_of(kafka: SecuredKafka, model: Path, log: Path, user: str, **settings: str) -> Replica:
    environ = {
        name.removeprefix("EMBEDQ_").lower(): value
        for name, value in kafka.environ(user).items()
        if name.startswith("EMBEDQ_")
    }
    return Replica(kafka.stack, TOPICS, model, log, redis=False, **environ | {"group": "embedq"} | settings)


@asynccontextmanager
async def plain(kafka: SecuredKafka, user: str) -> AsyncIterator[AIOKafkaProducer]:
    options = KafkaOptions(servers=kafka.sasl_tls, **kafka.security(user)).client_options()
    client = AIOKafkaProducer(**options, request_timeout_ms=int(patient(5_000)))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def client_of(kafka: SecuredKafka, user: str, **options: Any) -> EmbedClient:
    return EmbedClient(kafka.sasl_tls, **kafka.security(user), **options)


def test_the_table_has_every_role() -> None:
    assert {right.role for right in rights()} == set(ROLES)


async def test_each_role_does_its_work_with_the_rights_of_the_table(
    kafka: SecuredKafka, models: Path, tmp_path: Path
) -> None:
    replica = replica_of(kafka, models / "a", tmp_path / "log", "service", model_root=str(models))
    async with replicas(replica):
        async with client_of(kafka, "caller") as client:
            assert (await client.embed("a text", dimensions=32)).shape == (32,)
            assert (await client.embed(["one", "two"], lane="bulk")).shape[0] == 2

        async with plain(kafka, "producer") as producer:
            await producer.send_and_wait(TOPICS.bulk, json.dumps({"id": "mine", "input": "a text"}).encode())
            await producer.send_and_wait(TOPICS.jobs, b"junk", partition=0)
        async with client_of(kafka, "reader") as client:
            found = []
            async for result in client.results(group="my-readers", from_beginning=True):
                found.append(result.id)
                if len(found) == 2:
                    break
            assert set(found) == {"mine", f"{TOPICS.jobs}-0-0"} or "mine" in found

        status = await run_embedq("status", environ=kafka.environ("operator"))
        assert (status.code, status.err) == (0, "")
        assert "jobs waiting" in status.out
        reload = await run_embedq("reload", str(models / "b"), environ=kafka.environ("operator"))
        assert (reload.code, reload.err) == (0, "")

        options = KafkaOptions(servers=kafka.sasl_tls, **kafka.security("undertaker")).client_options()
        letters = AIOKafkaConsumer(**options, auto_offset_reset="earliest")
        await letters.start()
        try:
            letters.assign([TopicPartition(TOPICS.dead_letters, n) for n in range(2)])
            seen: list[Any] = []

            async def read() -> bool:
                for records in (await letters.getmany(timeout_ms=500)).values():
                    seen.extend(records)
                return bool(seen)

            await wait_until(read, what="the dead letter")
            assert [letter.value for letter in seen] == [b"junk"]
        finally:
            await letters.stop()
        async with plain(kafka, "undertaker") as producer:
            await producer.send_and_wait(TOPICS.jobs, seen[0].value)
        assert await replica.stop() == 0


@pytest.mark.parametrize("role", ROLES)
async def test_no_role_writes_to_a_topic_that_is_not_its_own(kafka: SecuredKafka, role: str) -> None:
    """A producer writes no control messages, a replica no jobs, and nobody but a replica any result."""
    named = {r.name for r in rights() if r.role == role and r.kind == "topic" and "Write" in r.operations}
    may = {topic for topic in ALL if any(fnmatchcase(topic, name) for name in named)}
    wrote = set()
    async with plain(kafka, role) as producer:
        for topic in ALL:
            try:
                await producer.send_and_wait(topic, b"{}", key=b"nobody", partition=0)
                wrote.add(topic)
            except TopicAuthorizationFailedError:
                pass
    assert wrote == may


# -- what a missing right looks like ---------------------------------------------------------------------------------------


async def test_a_call_without_the_right_to_write_jobs_ends_at_once_and_says_so(kafka: SecuredKafka) -> None:
    async with client_of(kafka, "reader") as client:
        with pytest.raises(KafkaRefused, match=r"this user has no right to topic embed\.jobs"):
            await client.embed("a text", timeout=60)


async def test_a_call_without_the_right_to_see_replies_ends_at_once_and_says_so(kafka: SecuredKafka) -> None:
    with pytest.raises(TopicMissing, match=r"has no topic embed\.replies, or does not show it to this user"):
        async with client_of(kafka, "producer"):
            pass


async def test_a_reader_without_the_right_to_its_group_ends_at_once_and_says_so(kafka: SecuredKafka) -> None:
    async with client_of(kafka, "reader") as client:
        with pytest.raises(KafkaRefused, match="this user has no right to consumer group another"):
            async for _ in client.results(group="another"):
                pass


async def test_a_command_without_the_right_is_one_line(kafka: SecuredKafka) -> None:
    status = await run_embedq("status", environ=kafka.environ("caller"))
    create = await run_embedq("topics", "create", "--prefix", "other", environ=kafka.environ("caller"))
    for done in (status, create):
        assert done.code != 0
        assert done.err.count("\n") == 1
    assert "no topic embed.status, or does not show it to this user" in status.err
    assert "no right to" in create.err


@pytest.mark.parametrize(
    ("user", "code", "said"),
    [
        ("caller", 1, "or none that this user may see"),
        ("groupless", 2, "this user has no right to consumer group embedq"),
    ],
)
async def test_a_replica_without_its_rights_ends_at_once_with_one_line(
    kafka: SecuredKafka, models: Path, tmp_path: Path, user: str, code: int, said: str
) -> None:
    replica = replica_of(kafka, models / "a", tmp_path / "log", user)
    await replica.start(ready=False)
    assert await replica.ended() == code
    [failed] = [event for event in replica.events() if event["event"] == "failed"]
    assert said in failed["detail"]
    assert "Traceback" not in replica.log.read_text()
