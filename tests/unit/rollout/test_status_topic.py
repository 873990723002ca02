"""Statuses come in the topic's order, and what is none is passed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from embedq_consumer.rollout.status_topic import StatusTopic
from embedq_shared.codec import encode_record
from embedq_shared.topics import Topics
from tests.unit.lifecycle.test_control_topic import Consumer
from tests.unit.rollout.test_member import a_status


def record(key: bytes | None, value: bytes | None) -> Any:
    return SimpleNamespace(key=key, value=value, headers=())


class StatusConsumer(Consumer):
    """The same, of another partition."""

    def assign(self, partitions: list[Any]) -> None:
        [partition] = partitions
        assert (partition.topic, partition.partition) == (Topics().status, 0)


async def test_statuses_tombstones_and_garbage_are_told_apart_and_what_comes_later_is_followed() -> None:
    status = a_status("r")
    good = record(b"r", encode_record(status))
    consumers: list[Consumer] = []

    def make(**options: Any) -> Any:
        consumers.append(
            StatusConsumer([good, record(b"s", None), record(b"t", b"\xff"), record(None, b"{}")])
        )
        return consumers[0]

    topic = StatusTopic({}, Topics(), make)
    assert [(said.key, said.status) for said in await topic.open()] == [("r", status), ("s", None)]
    consumers[0].records.append(record(b"r", encode_record(status)))
    assert [said.key for said in await topic.next()] == ["r"]
    await topic.close()
    assert consumers[0].stopped
