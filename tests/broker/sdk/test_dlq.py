"""`embedq dlq` as an operator uses it: another process, a real Kafka, letters as the service writes them."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition

from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.group import Ticket
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.records import Record
from embedq_sdk.admin import dead_letter_box
from embedq_sdk.admin.dead_letter_box import dead_letters
from embedq_sdk.admin.dead_letters import LetterFilter
from embedq_sdk.admin.topics import create_topics
from embedq_shared.codec import Envelope
from embedq_shared.headers import parse
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import Topics
from tests.helpers.command_line import Done, run_embedq

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


class Desk:
    """A dead-letter topic of its own, and the command line in front of it."""

    def __init__(self, servers: str, topics: Topics, producer: AIOKafkaProducer) -> None:
        self.servers = servers
        self.topics = topics
        self._producer = producer

    async def bury(
        self,
        id: str,
        *,
        partition: int = 0,
        code: str = "malformed",
        origin: str = "",
        value: bytes | None = None,
        bare: bool = False,
        written: int = 1_700_000_000_000,
        headers: tuple[tuple[str, bytes], ...] = (),
    ) -> None:
        """Write a letter as the service does."""
        job = Record(
            ticket=Ticket(TopicPartition(origin or self.topics.jobs, partition), 1, 500),
            lane="interactive",
            key=id.encode(),
            value=value or json.dumps({"input": f"text of {id}", "id": id}).encode(),
            headers=headers,
            timestamp_ms=written,
            timestamp_type=0,
            polled_at=0.0,
        )
        rejection = Rejection(
            error=ErrorBody.of(code, "expected something else"),  # type: ignore[arg-type]
            format="json",
            headers=parse(headers),
            envelope=Envelope(),
            dead_letter=True,
        )
        encoder = ResultEncoder(self.topics, "group", 900_000, replica="r0")
        reply = encoder.of_rejection(job, rejection)
        letter = (encoder.bare_dead_letter if bare else encoder.dead_letter)(reply, partition)
        await self._producer.send_and_wait(
            letter.topic,
            letter.value,
            key=letter.key,
            partition=letter.partition,
            headers=letter.headers,
            timestamp_ms=letter.timestamp_ms,
        )

    async def dlq(self, *arguments: str, within: float = 60.0) -> Done:
        """Run `embedq dlq`."""
        environ = {"EMBEDQ_KAFKA_SERVERS": self.servers, "EMBEDQ_TOPIC_PREFIX": self.topics.prefix}
        return await run_embedq("dlq", *arguments, environ=environ, within=within)

    async def listed(self, *arguments: str) -> list[str]:
        """The ids of the letters that are listed."""
        done = await self.dlq("list", "--json", *arguments)
        assert (done.code, done.err) == (0, "")
        return [line["id"] for line in done.lines()]

    async def jobs(self) -> list[ConsumerRecord]:
        """Everything on the job topics."""
        return await self.read(*self.topics.lanes)

    async def read(self, *names: str) -> list[ConsumerRecord]:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.servers, auto_offset_reset="earliest")
        await consumer.start()
        try:
            partitions = [TopicPartition(name, number) for name in names for number in range(2)]
            consumer.assign(partitions)
            await consumer.seek_to_beginning()
            ends = await consumer.end_offsets(partitions)
            found: list[ConsumerRecord] = []
            while any([await consumer.position(one) < ends[one] for one in partitions]):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
            return found
        finally:
            await consumer.stop()


@asynccontextmanager
async def _desk(servers: str) -> AsyncIterator[Desk]:
    topics = Topics(f"dlq-{uuid.uuid4().hex[:8]}")
    await create_topics(servers, prefix=topics.prefix, partitions=2, reply_partitions=1)
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    await producer.start()
    try:
        yield Desk(servers, topics, producer)
    finally:
        await producer.stop()


@pytest.fixture
async def desk(servers: str) -> AsyncIterator[Desk]:
    async with _desk(servers) as found:
        yield found


async def test_letters_are_listed_by_what_they_say(desk: Desk) -> None:
    await desk.bury("a", code="crashed", written=1_000)
    await desk.bury("b", partition=1, origin=desk.topics.bulk, written=2_000)
    await desk.bury("c", headers=(("reply-topic", b"elsewhere"),), written=3_000)
    assert sorted(await desk.listed()) == ["a", "b", "c"]
    assert await desk.listed("--code", "crashed") == ["a"]
    assert sorted(await desk.listed("--code", "crashed", "--code", "malformed")) == ["a", "b", "c"]
    assert await desk.listed("--topic", desk.topics.bulk) == ["b"]
    assert await desk.listed("--id", "b") == ["b"]
    assert await desk.listed("--reply-topic", "elsewhere") == ["c"]
    assert await desk.listed(
        "--since", "1970-01-01T00:00:02+00:00", "--until", "1970-01-01T00:00:03+00:00"
    ) == ["b"]
    assert await desk.listed("--since", "1h") == []
    assert await desk.listed("--at", "1:0") == ["b"]
    assert len(await desk.listed("--limit", "2")) == 2
    plain = await desk.dlq("list", "--code", "crashed")
    assert plain.out.split("\t")[:3] == ["0:0", "1970-01-01T00:00:01Z", "crashed"]
    assert plain.err == "embedq: 1 dead letters\n"


async def test_a_letter_is_shown_with_its_record(desk: Desk) -> None:
    await desk.bury("a", code="crashed", headers=(("correlation-id", b"\xff\x01"),))
    text = (await desk.dlq("show", "0:0")).out
    assert "crashed: expected something else" in text
    assert f"{desk.topics.jobs}-0-500" in text
    assert r"correlation-id: \xff\x01" in text
    assert '"input": "text of a"' in text
    raw = await desk.dlq("show", "0:0", "--value")
    assert json.loads(raw.out) == {"input": "text of a", "id": "a"}
    [shown] = (await desk.dlq("show", "0:0", "--json")).lines()
    assert shown["letter"]["error_code"] == "crashed"
    missing = await desk.dlq("show", "0:9")
    assert (missing.code, missing.err) == (1, "embedq: There is no dead letter at 0:9\n")
    assert (await desk.dlq("show", "9:0")).code == 1
    assert (await desk.dlq("show", "nowhere")).code == 2


async def test_a_replay_sends_the_record_as_it_was_once(desk: Desk) -> None:
    own = (("correlation-id", b"c"), ("deadline", b"5"))
    await desk.bury("a", partition=1, headers=own)
    await desk.bury("b", origin=desk.topics.bulk)
    await desk.bury("c", code="crashed")
    dry = await desk.dlq("replay", "--code", "malformed", "--dry-run")
    assert (dry.code, dry.out) == (0, "2 would be replayed\n")
    assert await desk.jobs() == []

    done = await desk.dlq("replay", "--code", "malformed")
    assert (done.code, done.out, done.err) == (0, "2 of 2 replayed\n", "")
    found = {record.key: record for record in await desk.jobs()}
    assert found.keys() == {b"a", b"b"}
    first = found[b"a"]
    assert (first.topic, first.partition, first.headers) == (desk.topics.jobs, 1, own)
    assert json.loads(first.value) == {"input": "text of a", "id": "a"}
    assert (found[b"b"].topic, found[b"b"].headers) == (desk.topics.bulk, ())

    again = await desk.dlq("replay", "--code", "malformed", "--json")
    assert again.lines() == [{"total": 0, "replayed": 0, "failed": [], "dry_run": False}]
    assert await desk.listed() == ["c"]
    assert sorted(await desk.listed("--all")) == ["a", "b", "c"]
    assert len(await desk.jobs()) == 2
    assert (await desk.dlq("replay", "--id", "c", "--without-deadline")).code == 0


async def test_what_cannot_be_replayed_is_named_and_stays(desk: Desk) -> None:
    await desk.bury("forged", origin="__consumer_offsets")
    await desk.bury("bare", bare=True)
    await desk.bury("good")
    done = await desk.dlq("replay", "--everything")
    assert (done.code, done.out) == (1, "1 of 3 replayed\n")
    assert done.err.splitlines() == [
        "embedq: 0:0 not replayed: it came from __consumer_offsets, which is no job topic of this service",
        "embedq: 0:1 not replayed: only the record's place is here, not its content",
    ]
    assert [record.key for record in await desk.jobs()] == [b"good"]
    assert len(await desk.listed()) == 2


async def test_an_interrupted_replay_goes_on_where_it_was(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter_box, "_CHUNK", 3)
    ids = [f"job-{number}" for number in range(10)]
    for id in ids:
        await desk.bury(id)
    async with dead_letters(desk.servers, topic_prefix=desk.topics.prefix) as box:
        found = await box.find(LetterFilter())
        replaying = asyncio.create_task(_replay_until(box, found, replayed=6))
        await replaying
    assert await desk.listed() == ids[6:]
    done = await desk.dlq("replay", "--everything")
    assert done.out == "4 of 4 replayed\n"
    assert sorted(record.key.decode() for record in await desk.jobs()) == sorted(ids)


async def _replay_until(box: dead_letter_box.DeadLetterBox, found: Any, *, replayed: int) -> None:
    updates = box.replay(found, rate=1000.0)
    async for update in updates:
        if update.replayed >= replayed:
            break
    await updates.aclose()


async def test_a_replay_keeps_to_its_rate(desk: Desk) -> None:
    for number in range(4):
        await desk.bury(f"{number}")
    loop = asyncio.get_running_loop()
    async with dead_letters(desk.servers, topic_prefix=desk.topics.prefix) as box:
        found = await box.find(LetterFilter())
        started = loop.time()
        async for update in box.replay(found, rate=2.0):
            last = update
    assert last.replayed == 4
    assert loop.time() - started >= 1.0, "two, and a second later the next two"


async def test_dropped_letters_go_from_the_list_and_from_the_beginning_of_the_topic(desk: Desk) -> None:
    for id in ("a", "b", "c"):
        await desk.bury(id)
    assert (await desk.dlq("drop", "--id", "a", "--dry-run")).out == "1 would be dropped\n"
    assert (await desk.dlq("drop", "--id", "a")).code == 1, "nobody said yes"
    assert await desk.listed() == ["a", "b", "c"]

    middle = await desk.dlq("drop", "--id", "b", "--yes")
    assert (middle.code, middle.out) == (0, "1 dropped, 0 records deleted\n")
    assert await desk.listed() == ["a", "c"]
    first = await desk.dlq("drop", "--id", "a", "--yes", "--json")
    assert first.lines() == [{"dropped": 1, "freed": 2, "refused": None}]
    assert await desk.listed("--all") == ["c"]
    letters = [record.key for record in await desk.read(desk.topics.dead_letters) if record.key]
    assert letters == [b"c"]


async def test_a_letter_that_came_after_the_look_is_not_deleted(desk: Desk) -> None:
    await desk.bury("a")
    async with dead_letters(desk.servers, topic_prefix=desk.topics.prefix) as box:
        found = await box.find(LetterFilter())
        await desk.bury("late")
        report = await box.drop(found)
    assert (report.dropped, report.freed) == (1, 1)
    assert await desk.listed() == ["late"]


@pytest.mark.parametrize("command", ["replay", "drop"])
async def test_all_letters_are_meant_only_if_that_is_said(desk: Desk, command: str) -> None:
    unsaid = await desk.dlq(command)
    assert unsaid.code == 2
    assert "--everything" in unsaid.err
    both = await desk.dlq(command, "--everything", "--id", "a")
    assert both.code == 2


async def test_wrong_times_and_positions_are_wrong_usage(desk: Desk) -> None:
    for arguments in (("--since", "yesterday"), ("--at", "3"), ("--until", "2026-13-01")):
        done = await desk.dlq("list", *arguments)
        assert done.code == 2
        assert "expected" in done.err


async def test_a_missing_topic_and_a_missing_broker_are_one_line(servers: str, tmp_path: Path) -> None:
    missing = await run_embedq(
        *("dlq", "list"), environ={"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": "nobody-has"}
    )
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "nobody-has.dlq" in missing.err
    away = await run_embedq(*("dlq", "list"), environ={"EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1"})
    assert (away.code, away.err.count("\n")) == (3, 1)
