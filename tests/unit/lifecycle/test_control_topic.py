"""The control topic over a consumer in memory: which commands come out, and what is passed and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import encode_record
from embedq_shared.fleet import Routes
from embedq_shared.kafka import TopicPartition, Unreadable
from embedq_shared.messages import Control, Split
from embedq_shared.topics import Topics
from tests.helpers.metric_values import sample_value

PARTITION = TopicPartition("embed.control", 0)


def command(version: int, alias: str = "default", command_id: str = "c") -> Control:
    return Control(alias=alias, version=version, path=f"/models/{version}", command_id=command_id)


def record(value: bytes | None, key: bytes = b"default") -> Any:
    return SimpleNamespace(topic=PARTITION.topic, partition=0, key=key, value=value)


def bad() -> Any:
    return record(Unreadable(0, "why"))


def of(found: Control | Split) -> Any:
    return record(encode_record(found), found.alias.encode())


class Consumer:
    """One partition in memory. A bad record comes as one whose value is an `Unreadable`, as the Kafka room's consumer has it."""

    def __init__(self, records: Sequence[Any], **options: Any) -> None:
        self.records = list(records)
        self.options = options
        self.at = 0
        self.ends = len(self.records)
        self.stopped = False
        self._client = SimpleNamespace(_sasl_mechanism="PLAIN", hosts=())

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        self.stopped = True

    def assign(self, partitions: list[TopicPartition]) -> None:
        assert partitions == [PARTITION]

    async def seek_to_beginning(self, partition: TopicPartition) -> None:
        self.at = 0

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self.ends)

    async def position(self, partition: TopicPartition) -> int:
        return self.at

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.at = offset

    async def getmany(
        self, partition: TopicPartition, *, timeout_ms: int, max_records: int | None = None
    ) -> dict[TopicPartition, list[Any]]:
        await asyncio.sleep(0)
        found = self.records[self.at : self.at + (max_records or 500)]
        for n, each in enumerate(found):
            each.offset = self.at + n
        self.at += len(found)
        return {partition: found} if found else {}


def control_of(records: Sequence[Any]) -> tuple[ControlTopic, Consumer, Metrics]:
    made: list[Consumer] = []

    def make(**options: Any) -> Any:
        made.append(Consumer(records, **options))
        return made[0]

    metrics = Metrics()
    control = ControlTopic({"bootstrap_servers": "a:1"}, Topics(), "default", metrics, make)
    return control, made[0], metrics


def ignored(metrics: Metrics) -> float | None:
    return sample_value(metrics.registry, "embedq_reloads_total", {"outcome": "ignored"})


async def test_the_newest_command_is_that_with_the_highest_version() -> None:
    control, consumer, _ = control_of([of(command(2)), of(command(3)), of(command(1))])

    newest = await control.open()

    assert newest is not None
    assert newest.version == 3
    assert consumer.options["enable_auto_commit"] is False
    assert "group_id" not in consumer.options


async def test_of_two_commands_with_one_version_the_first_counts() -> None:
    control, _, _ = control_of([of(command(1, command_id="first")), of(command(1, command_id="second"))])

    newest = await control.open()

    assert newest is not None
    assert newest.command_id == "first"


async def test_splits_are_learned_from_the_records_of_all_aliases_and_are_no_faults() -> None:
    weights = Split(alias="ab", version=1, command_id="s", split={"default": 1, "other": 3})
    control, consumer, metrics = control_of([of(command(1)), of(weights), of(command(2, alias="other"))])
    routes = Routes()
    control._routes = routes
    splits = routes.splits

    newest = await control.open()

    assert newest is not None
    assert (newest.version, splits.weights()) == (1, {"ab": {"default": 1, "other": 3}})
    consumer.records += [of(msgspec.structs.replace(weights, version=2, split={})), of(command(3))]
    assert [found.version for found in await control.next()] == [3]
    assert (splits.weights(), ignored(metrics)) == ({}, 0)


async def test_an_empty_topic_has_no_newest_command() -> None:
    control, _, _ = control_of([])

    assert await control.open() is None


async def test_what_is_no_command_is_counted_and_passed_and_other_aliases_are_not_even_counted() -> None:
    control, _, metrics = control_of(
        [
            bad(),
            of(command(1)),
            record(b"[]"),
            record(None),
            record(encode_record(command(9, alias="other")), key=b"default"),
            of(command(7, alias="other")),
            bad(),
            bad(),
            of(command(2)),
            bad(),
        ]
    )

    newest = await control.open()

    assert newest is not None
    assert newest.version == 2
    assert ignored(metrics) == 4 + 3


async def test_later_commands_come_in_order_and_are_waited_for() -> None:
    control, consumer, metrics = control_of([of(command(1))])
    await control.open()

    waiting = asyncio.ensure_future(control.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    consumer.records += [bad(), of(command(2)), of(command(3))]
    found = await waiting
    while len(found) < 2:
        found += await control.next()

    assert [each.version for each in found] == [2, 3]
    assert ignored(metrics) == 1


async def test_closing_stops_the_consumer() -> None:
    control, consumer, _ = control_of([])
    await control.open()
    await control.close()

    assert consumer.stopped


async def test_a_topic_that_cannot_be_read_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq_shared.kafka.whole_partition._READ_S", 0.05)
    control, consumer, _ = control_of([])
    consumer.ends = 1

    with pytest.raises(TimeoutError):
        await control.open()
