"""Commits: when they are sent, what their failures cost, and the lag that operators see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError
from structlog.testing import capture_logs

from embedq_consumer.intake import offset_committer
from embedq_consumer.intake.offset_committer import OffsetCommitter
from embedq_consumer.intake.offsets import OffsetLedger
from embedq_consumer.intake.poll_state import PollState
from embedq_consumer.telemetry.metrics import Metrics
from tests.helpers.scripted_consumer import NoCustody, ScriptedConsumer
from tests.helpers.support import wait_until

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


class CountingState(PollState):
    """A poll state that knows how often the commit loop has asked it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    @property
    def rebalancing(self) -> bool:
        self.asked += 1
        return super().rebalancing


class Committing:
    """A committer with the ledger that it reads and a consumer that notes what it commits."""

    def __init__(self, *, interval_s: float = 60.0, max_uncommitted: int = 1000) -> None:
        self.consumer = ScriptedConsumer()
        self.ledger = OffsetLedger()
        self.ledger.assign([A, B])
        self.metrics = Metrics()
        self.state = CountingState()
        self.committed = 0
        self.committer = OffsetCommitter(
            self.consumer,
            self.ledger,
            self.metrics,
            NoCustody(),
            interval_s=interval_s,
            max_uncommitted=max_uncommitted,
        )

    def finish(self, offset: int, partition: TopicPartition = A) -> None:
        self.ledger.finish(self.ledger.begin(partition, offset))
        self.committer.note_finished()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        def count() -> None:
            self.committed += 1

        running = asyncio.create_task(self.committer.run(self.state, count))
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def until_committed(self, times: int) -> None:
        await wait_until(lambda: self.committed >= times, what=f"{times} commits")

    def commits(self, outcome: str) -> float | None:
        return self.metrics.registry.get_sample_value("embedq_commits_total", {"outcome": outcome})

    def lag(self, partition: TopicPartition) -> float | None:
        labels = {"topic": partition.topic, "partition": str(partition.partition)}
        return self.metrics.registry.get_sample_value("embedq_lag_records", labels)


async def test_what_is_finished_is_committed_each_interval() -> None:
    committing = Committing(interval_s=0.001)
    committing.finish(0)
    async with committing.running():
        await committing.until_committed(1)
        committing.finish(1)
        committing.finish(0, B)
        await wait_until(lambda: len(committing.consumer.commits) == 2, what="the second commit")
    assert committing.consumer.commits == [{A: 1}, {A: 2, B: 1}]
    assert committing.commits("ok") == 2


async def test_nothing_finished_is_nothing_to_commit() -> None:
    committing = Committing(interval_s=0.001)
    async with committing.running():
        await committing.until_committed(3)
    assert committing.consumer.commits == []
    assert committing.commits("ok") == 0


async def test_a_commit_comes_early_once_a_quarter_of_what_may_stay_uncommitted_is_finished() -> None:
    committing = Committing(interval_s=3600, max_uncommitted=8)
    async with committing.running():
        committing.finish(0)
        await asyncio.sleep(0)
        assert committing.committed == 0
        committing.finish(1)
        await committing.until_committed(1)
        assert committing.consumer.commits == [{A: 2}]
        committing.finish(2)  # counted from the commit on
        await asyncio.sleep(0)
        assert committing.committed == 1
        committing.finish(3)
        await committing.until_committed(2)


async def test_what_finishes_during_a_commit_brings_the_next_one_forward_too() -> None:
    committing = Committing(interval_s=3600, max_uncommitted=8)
    committing.consumer.commit_gate = gate = asyncio.Event()
    async with committing.running():
        committing.finish(0)
        committing.finish(1)
        await wait_until(lambda: committing.state.asked == 1, what="the commit")
        committing.finish(2)
        committing.finish(3)
        gate.set()
        await committing.until_committed(2)
    assert committing.consumer.commits == [{A: 2}, {A: 4}]


async def test_the_smallest_bound_commits_after_every_record() -> None:
    committing = Committing(interval_s=3600, max_uncommitted=1)
    async with committing.running():
        committing.finish(0)
        await committing.until_committed(1)


async def test_nothing_is_committed_during_a_rebalance() -> None:
    committing = Committing(interval_s=0.001)
    committing.state.revoke()
    committing.finish(0)
    async with committing.running():
        await wait_until(lambda: committing.state.asked >= 6, what="three rounds of the loop")
        assert committing.consumer.commits == []
        committing.state.give_up()
        committing.state.assign()
        await committing.until_committed(1)
    assert committing.consumer.commits == [{A: 1}]


@pytest.mark.parametrize("error", [CommitFailedError("fenced"), IllegalStateError("not assigned")])
async def test_partitions_that_belong_to_another_replica_are_no_reason_to_end(error: Exception) -> None:
    committing = Committing()
    committing.finish(0)
    committing.consumer.commit_errors.append(error)
    await committing.committer.commit()
    assert (committing.commits("fenced"), committing.ledger.committed(A)) == (1, None)
    await committing.committer.commit()
    assert (committing.commits("ok"), committing.ledger.committed(A)) == (1, 1)


async def test_a_commit_that_fails_is_sent_again_with_the_next_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.consumer.commit_errors.append(KafkaConnectionError())
    with capture_logs() as logs:
        await committing.committer.commit()
    assert [(line["event"], line["reason"]) for line in logs] == [("commit_failed", "KafkaConnectionError")]
    assert committing.commits("error") == 1
    committing.finish(1)
    await committing.committer.commit()
    assert committing.consumer.commits == [{A: 2}]


async def test_a_broker_that_does_not_answer_costs_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offset_committer, "_COMMIT_S", 0.001)
    committing = Committing()
    committing.finish(0)
    committing.consumer.commit_gate = asyncio.Event()
    with capture_logs() as logs:
        await committing.committer.commit()
    assert logs[0]["reason"] == "TimeoutError"
    assert committing.commits("error") == 1


async def test_one_commit_at_a_time_so_that_none_is_overtaken_by_an_older_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.consumer.commit_gate = gate = asyncio.Event()
    first = asyncio.create_task(committing.committer.commit())
    await asyncio.sleep(0)
    committing.finish(1)
    second = asyncio.create_task(committing.committer.commit())
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, second)
    assert committing.consumer.commits == [{A: 1}, {A: 2}]


async def test_the_answer_to_a_commit_of_an_earlier_epoch_is_not_noted_for_this_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.consumer.commit_gate = gate = asyncio.Event()
    commit = asyncio.create_task(committing.committer.commit())
    await asyncio.sleep(0)
    committing.ledger.assign([A])
    gate.set()
    await commit
    assert committing.ledger.committed(A) is None


async def test_the_lag_is_what_lies_between_the_commit_and_the_end_of_the_partition() -> None:
    committing = Committing(interval_s=0.001)
    committing.consumer.write(A, *[b"x"] * 5)
    committing.finish(0)
    async with committing.running():
        await wait_until(lambda: committing.lag(A) == 4, what="the lag")
    assert committing.lag(B) is None  # its end is not known, and nothing of it is committed
    committing.committer.forget([A])
    assert committing.lag(A) == 0


async def test_an_end_that_is_older_than_the_commit_is_no_negative_lag() -> None:
    committing = Committing(interval_s=0.001)
    committing.consumer.write(A, b"x")
    committing.finish(5)
    async with committing.running():
        await wait_until(lambda: committing.lag(A) is not None, what="the lag")
    assert committing.lag(A) == 0


async def test_no_lag_is_measured_after_a_rebalance_has_begun_during_the_commit() -> None:
    committing = Committing(interval_s=0.001)
    committing.consumer.write(A, b"x", b"y")
    committing.finish(0)
    committing.consumer.commit_gate = gate = asyncio.Event()
    async with committing.running():
        await wait_until(lambda: committing.state.asked == 1, what="the commit")
        committing.state.revoke()
        gate.set()
        await wait_until(lambda: committing.state.asked >= 4, what="another round")
    assert committing.committed == 1
    assert committing.lag(A) is None
