"""A client's connection, over fakes of the sender and the reply reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from embedq_sdk.errors import KafkaUnavailable, TopicMissing
from embedq_sdk.transport import kafka_transport
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.kafka_transport import KafkaTransport
from embedq_sdk.transport.pending_jobs import PendingJob
from embedq_shared.topics import Topics
from tests.helpers.support import wait_until


class Link:
    """What sender and reply reader have in common: opened, run, closed, each perhaps with an error."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.calls: list[Any] = []
        self.refuses: Exception | None = None
        self.fails = asyncio.Event()
        self.fault: Exception | None = None

    async def open(self, *args: Any) -> None:
        self.calls.append(("open", *args))
        if self.refuses is not None:
            raise self.refuses

    async def run(self) -> None:
        self.calls.append(("run",))
        await self.fails.wait()
        if self.fault is not None:
            raise self.fault

    async def watch(self) -> None:
        self.calls.append(("watch",))
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.calls.append(("close",))

    @property
    def did(self) -> list[str]:
        return [call[0] for call in self.calls]


class Sender(Link):
    broken = False

    def put(self, job: Any) -> None:
        self.calls.append(("put", job))


class Reader(Link):
    partition = 5
    quiet = 0.0

    async def open(self, *args: Any) -> set[str]:  # type: ignore[override]
        await super().open(*args)
        return {"t.jobs", "t.jobs.bulk", "t.replies", "t.jobs.big", "t.jobs.big.bulk"}

    async def topics(self) -> set[str]:
        return set()

    def silent_for(self, now: float) -> float:
        return self.quiet


class Connected:
    """A transport and the fakes below it."""

    def __init__(self, instance: str | None = None) -> None:
        self.faults: list[BaseException] = []
        self.calls: list[str] = []
        self.records: list[Any] = []
        self.transport = KafkaTransport(
            KafkaConnection.of("fake:9092", {}),
            Topics("t"),
            instance,
            deliver=self.records.append,
            broken=self.faults.append,
            refused=self.faults.append,
            moved=lambda: self.calls.append("moved"),
        )
        self.sender: Any = self.transport._sender
        self.reader: Any = self.transport._replies

    @property
    def choose(self) -> Callable[[int], int]:
        chosen: Callable[[int], int] = self.reader.args[2]
        return chosen


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_transport, "Sender", Sender)
    monkeypatch.setattr(kafka_transport, "ReplyReader", Reader)


async def test_the_reader_is_at_its_place_before_the_sender_can_send() -> None:
    connected = Connected()
    await connected.transport.open(5.0)
    await wait_until(lambda: "watch" in connected.reader.did, what="the tasks")

    assert connected.reader.calls[0] == ("open", ["t.jobs", "t.jobs.bulk", "t.replies"], 5.0)
    assert 0.1 <= connected.sender.calls[0][1] <= 5.0
    assert connected.transport.reply_partition == 5
    router = connected.transport.router
    assert (router.knows(None), router.knows("an alias")) == (True, False), "there is a pool"
    await connected.transport.close()
    assert connected.sender.did == ["open", "run", "close"]
    assert connected.reader.did == ["open", "run", "watch", "close"]
    assert connected.faults == []
    await connected.transport.close()  # again
    assert connected.reader.did == ["open", "run", "watch", "close"]


async def test_a_reader_that_cannot_open_leaves_the_sender_alone() -> None:
    connected = Connected()
    connected.reader.refuses = TopicMissing(servers="s", topic="t")

    with pytest.raises(TopicMissing):
        await connected.transport.open(1.0)
    assert connected.sender.did == []


async def test_a_sender_that_cannot_open_closes_the_reader_again() -> None:
    connected = Connected()
    connected.sender.refuses = KafkaUnavailable(servers="s", reason="r")

    with pytest.raises(KafkaUnavailable):
        await connected.transport.open(0.05)
    assert connected.sender.calls == [("open", 0.1)]
    assert connected.reader.did == ["open", "close"]


@pytest.mark.parametrize("fault", [ZeroDivisionError("x"), None])
async def test_a_task_that_ends_by_itself_is_reported(fault: Exception | None) -> None:
    connected = Connected()
    await connected.transport.open(1.0)
    connected.sender.fault = fault
    connected.sender.fails.set()
    await wait_until(lambda: bool(connected.faults), what="the report")

    (reported,) = connected.faults
    if fault is not None:
        assert reported is fault
    else:
        assert str(reported) == "embedq-job-sender ended. This is a bug."
    await connected.transport.close()


def test_an_instance_name_chooses_the_same_partition_every_time() -> None:
    first, again, other = Connected("pod-7"), Connected("pod-7"), Connected("pod-8")

    assert [first.choose(n) for n in range(1, 50)] == [again.choose(n) for n in range(1, 50)]
    assert [first.choose(n) for n in range(1, 50)] != [other.choose(n) for n in range(1, 50)]
    assert all(0 <= first.choose(n) < n for n in range(1, 50))


def test_without_a_name_clients_spread_over_the_partitions() -> None:
    assert len({Connected().choose(1000) for _ in range(20)}) > 1


def test_a_broker_is_silent_if_it_refuses_or_answers_no_fetch() -> None:
    connected = Connected()
    assert not connected.transport.silent
    connected.reader.quiet = 1.3
    assert connected.transport.silent
    connected.reader.quiet, connected.sender.broken = 0.0, True
    assert connected.transport.silent


def test_jobs_go_to_the_sender_and_errors_name_the_servers() -> None:
    connected = Connected()
    job: Any = object()
    sent: PendingJob = job
    connected.transport.send(sent)

    assert connected.sender.calls == [("put", job)]
    assert connected.reader.args[3] == connected.records.append
    connected.reader.args[5]()
    assert connected.calls == ["moved"]
    assert str(connected.transport.unavailable("gone")) == "Kafka at fake:9092 does not answer: gone"
