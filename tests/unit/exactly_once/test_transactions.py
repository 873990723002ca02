"""One transaction and what became of it, over producers that do as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    UnknownTopicOrPartitionError,
)

from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_consumer.exactly_once.transactions import Attempt, Offsets, Parcel, Transactions
from embedq_shared.kafka import FencedMember, MemberFenced, Membership, OffsetAndMetadata, TopicPartition

A = TopicPartition("jobs.bulk", 0)
MEMBER = FencedMember(group="g", membership=Membership("m", 3))
RECORD = Parcel(
    record=Outgoing(topic="results", partition=0, key=None, value=b"x", headers=[]),
    place=("results", 0),
    alone=False,
)


class Broker:
    """What the producers of a test meet: the steps that fail, and the group's offset."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, list[BaseException]] = {}
        self.hangs: set[str] = set()
        self.reasons: list[KafkaError | None] = []
        self.missing: dict[Place, KafkaError] = {}
        self.offset: int | None = None

    async def step(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hangs:
            self.hangs.discard(name)
            await asyncio.Event().wait()
        if self.fails.get(name):
            raise self.fails[name].pop(0)


class FakeProducer:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._offset: int | None = None

    async def start(self) -> None:
        await self._broker.step("start")

    async def begin(self) -> None:
        await self._broker.step("begin")

    async def look_up(self, places: Collection[Place]) -> Mapping[Place, KafkaError]:
        await self._broker.step("look_up")
        return self._broker.missing

    async def send(self, parcels: Sequence[Parcel], within: float) -> Sequence[KafkaError | None]:
        await self._broker.step("send")
        reasons, self._broker.reasons = self._broker.reasons, []
        return reasons or [None] * len(parcels)

    async def add_offsets(self, offsets: Offsets, member: FencedMember) -> None:
        await self._broker.step("offsets")
        self._offset = offsets[A].offset

    async def commit(self) -> None:
        await self._broker.step("commit")
        self._broker.offset = self._offset

    async def abort(self) -> None:
        await self._broker.step("abort")

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata | None]:
        await self._broker.step("committed")
        offset = self._broker.offset
        return dict.fromkeys(partitions, None if offset is None else OffsetAndMetadata(offset, ""))

    async def abandon(self) -> None:
        self._broker.calls.append("abandon")


def parts() -> tuple[Broker, Transactions]:
    broker = Broker()
    return broker, Transactions(lambda: FakeProducer(broker), attempt_s=0.05)


async def publish(transactions: Transactions, offset: int, *, records: int = 1) -> Attempt:
    return await transactions.publish([RECORD] * records, {A: OffsetAndMetadata(offset, "")}, MEMBER)


async def test_records_and_offsets_are_committed_in_this_order() -> None:
    broker, transactions = parts()
    attempt = await publish(transactions, 7, records=1)
    assert attempt.outcome == "committed"
    assert broker.calls == ["start", "look_up", "begin", "send", "offsets", "commit"]
    assert (await publish(transactions, 8, records=1)).outcome == "committed"
    assert broker.calls.count("start") == 1
    await transactions.close()


async def test_a_place_that_is_not_there_costs_no_transaction() -> None:
    broker, transactions = parts()
    broker.missing = {("results", 0): (error := UnknownTopicOrPartitionError())}
    attempt = await publish(transactions, 7, records=2)
    assert (attempt.outcome, list(attempt.reasons)) == ("refused", [error, error])
    assert broker.calls == ["start", "look_up"]


async def test_a_refused_record_costs_the_producer_whose_sequence_has_a_gap_and_is_named() -> None:
    broker, transactions = parts()
    broker.reasons = [None, error := MessageSizeTooLargeError()]
    attempt = await publish(transactions, 7, records=2)
    assert (attempt.outcome, list(attempt.reasons)) == ("refused", [None, error])
    assert broker.calls[-1] == "abandon"
    assert broker.offset is None


async def test_a_group_that_has_gone_on_undoes_the_transaction() -> None:
    broker, transactions = parts()
    broker.fails["offsets"] = [MemberFenced()]
    assert (await publish(transactions, 7, records=1)).outcome == "fenced"
    assert broker.calls[-1] == "abort"


@pytest.mark.parametrize("step", ["start", "look_up", "begin", "send", "offsets"])
@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_step_that_fails_before_the_commit_costs_the_producer_and_publishes_nothing(
    step: str, how: str
) -> None:
    broker, transactions = parts()
    if how == "fails":
        broker.fails[step] = [KafkaConnectionError()]
    else:
        broker.hangs.add(step)
    assert (await publish(transactions, 7, records=1)).outcome == "failed"
    assert broker.calls[-1] == "abandon"
    assert broker.offset is None
    assert (await publish(transactions, 7, records=1)).outcome == "committed"
    assert broker.offset == 7


@pytest.mark.parametrize("took_place", [True, False])
async def test_a_commit_without_an_answer_is_looked_up_by_the_next_producer(took_place: bool) -> None:
    broker, transactions = parts()
    broker.hangs.add("commit")
    assert (await publish(transactions, 7, records=1)).outcome == "in_doubt"
    broker.offset = 7 if took_place else 3
    with pytest.raises(RuntimeError, match="in doubt"):
        await publish(transactions, 8, records=1)
    broker.fails["start"] = [KafkaConnectionError()]
    assert await transactions.resolve() is None
    assert await transactions.resolve() is took_place
    assert broker.calls[-2:] == ["start", "committed"]
    assert (await publish(transactions, 8, records=1)).outcome == "committed"


async def test_an_abort_that_fails_leaves_the_rest_to_the_next_producer() -> None:
    broker, transactions = parts()
    broker.fails["offsets"] = [MemberFenced()]
    broker.fails["abort"] = [KafkaConnectionError()]
    assert (await publish(transactions, 7, records=1)).outcome == "fenced"
    assert broker.calls[-1] == "abandon"
