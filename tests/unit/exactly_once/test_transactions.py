"""One transaction and what became of it, over producers that do as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from aiokafka.errors import KafkaConnectionError, KafkaError, MessageSizeTooLargeError

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.exactly_once.transactions import Transactions
from embedq_shared.kafka import TopicPartition
from embedq_shared.kafka.transactions import FencedMember, MemberFenced

A = TopicPartition("jobs.bulk", 0)
MEMBER = FencedMember(group="g", generation=3, member_id="m")
RECORD = Outgoing(topic="results", partition=None, key=None, value=b"x", headers=[])


class Broker:
    """What the producers of a test meet: the steps that fail, and the group's offset."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, list[BaseException]] = {}
        self.hangs: set[str] = set()
        self.reasons: list[KafkaError | None] = []
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

    async def send(self, records: Sequence[Outgoing]) -> Sequence[KafkaError | None]:
        await self._broker.step("send")
        reasons, self._broker.reasons = self._broker.reasons, []
        return reasons or [None] * len(records)

    async def add_offsets(self, offsets: Mapping[TopicPartition, int], member: FencedMember) -> None:
        await self._broker.step("offsets")
        self._offset = offsets[A]

    async def commit(self) -> None:
        await self._broker.step("commit")
        self._broker.offset = self._offset

    async def abort(self) -> None:
        await self._broker.step("abort")

    async def committed(
        self, group: str, partitions: Sequence[TopicPartition]
    ) -> Mapping[TopicPartition, int | None]:
        await self._broker.step("committed")
        return dict.fromkeys(partitions, self._broker.offset)

    async def abandon(self) -> None:
        self._broker.calls.append("abandon")


def parts() -> tuple[Broker, Transactions]:
    broker = Broker()
    return broker, Transactions(lambda: FakeProducer(broker), attempt_s=0.05)


async def test_records_and_offsets_are_committed_in_this_order() -> None:
    broker, transactions = parts()
    attempt = await transactions.publish([RECORD], {A: 7}, MEMBER)
    assert attempt.outcome == "committed"
    assert broker.calls == ["start", "begin", "send", "offsets", "commit"]
    assert (await transactions.publish([RECORD], {A: 8}, MEMBER)).outcome == "committed"
    assert broker.calls.count("start") == 1
    await transactions.close()


async def test_a_refused_record_undoes_the_transaction_and_is_named() -> None:
    broker, transactions = parts()
    broker.reasons = [None, error := MessageSizeTooLargeError()]
    attempt = await transactions.publish([RECORD, RECORD], {A: 7}, MEMBER)
    assert (attempt.outcome, list(attempt.reasons)) == ("refused", [None, error])
    assert broker.calls[-1] == "abort"
    assert broker.offset is None


async def test_a_group_that_has_gone_on_undoes_the_transaction() -> None:
    broker, transactions = parts()
    broker.fails["offsets"] = [MemberFenced()]
    assert (await transactions.publish([RECORD], {A: 7}, MEMBER)).outcome == "fenced"
    assert broker.calls[-1] == "abort"


@pytest.mark.parametrize("step", ["start", "begin", "send", "offsets"])
@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_step_that_fails_before_the_commit_costs_the_producer_and_publishes_nothing(
    step: str, how: str
) -> None:
    broker, transactions = parts()
    if how == "fails":
        broker.fails[step] = [KafkaConnectionError()]
    else:
        broker.hangs.add(step)
    assert (await transactions.publish([RECORD], {A: 7}, MEMBER)).outcome == "failed"
    assert broker.calls[-1] == "abandon"
    assert broker.offset is None
    assert (await transactions.publish([RECORD], {A: 7}, MEMBER)).outcome == "committed"
    assert broker.offset == 7


@pytest.mark.parametrize("took_place", [True, False])
async def test_a_commit_without_an_answer_is_looked_up_by_the_next_producer(took_place: bool) -> None:
    broker, transactions = parts()
    broker.hangs.add("commit")
    assert (await transactions.publish([RECORD], {A: 7}, MEMBER)).outcome == "in_doubt"
    broker.offset = 7 if took_place else 3
    with pytest.raises(RuntimeError, match="in doubt"):
        await transactions.publish([RECORD], {A: 8}, MEMBER)
    broker.fails["start"] = [KafkaConnectionError()]
    assert await transactions.resolve() is None
    assert await transactions.resolve() is took_place
    assert broker.calls[-2:] == ["start", "committed"]
    assert (await transactions.publish([RECORD], {A: 8}, MEMBER)).outcome == "committed"


async def test_an_abort_that_fails_leaves_the_rest_to_the_next_producer() -> None:
    broker, transactions = parts()
    broker.reasons = [MessageSizeTooLargeError()]
    broker.fails["abort"] = [KafkaConnectionError()]
    assert (await transactions.publish([RECORD], {A: 7}, MEMBER)).outcome == "refused"
    assert broker.calls[-1] == "abandon"
