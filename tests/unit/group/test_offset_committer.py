"""Commits: when they are sent, which membership they show, and what their failures cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    IllegalGenerationError,
    KafkaConnectionError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from structlog.testing import capture_logs

from embedq_consumer.group import offset_committer
from embedq_consumer.group.offset_committer import OffsetCommitter
from embedq_consumer.group.offsets import OffsetLedger
from embedq_consumer.group.ownership import Ownership
from embedq_consumer.group.topic_watch import TopicWatch
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import Membership
from tests.helpers.metric_values import sample_value
from tests.helpers.scripted_consumer import ScriptedMember
from tests.helpers.support import wait_until

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


class Committing:
    """A committer with the ledger that it reads and a member that notes what it commits."""

    def __init__(self, *, interval_s: float = 60.0, max_uncommitted: int = 1000) -> None:
        self.member = ScriptedMember()
        self.member.membership = Membership("me", 1)
        self.ledger = OffsetLedger()
        self.ownership = Ownership()
        self.ownership.assigned(Membership("me", 1), {A, B}, ())
        for partition in (A, B):
            self.ledger.add(partition, None)
        self.metrics = Metrics()
        self.rounds = 0
        self.committer = OffsetCommitter(
            self.member,
            self.ledger,
            self.ownership,
            TopicWatch(self.member, self.ledger, self.metrics),
            self.metrics,
            interval_s=interval_s,
            max_uncommitted=max_uncommitted,
        )

    def finish(self, offset: int, partition: TopicPartition = A) -> None:
        self.ledger.finish(self.ledger.begin(partition, offset))
        self.committer.note_finished()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def count() -> None:
            self.rounds += 1

        running = asyncio.create_task(self.committer.run(count))
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def until_round(self, times: int) -> None:
        await wait_until(lambda: self.rounds >= times, what=f"{times} rounds")

    def commits(self, outcome: str) -> float | None:
        return sample_value(self.metrics.registry, "embedq_commits_total", {"outcome": outcome})


async def test_what_is_finished_is_committed_without_waiting_for_more() -> None:
    committing = Committing(interval_s=0.001)
    async with committing.running():
        await committing.until_round(1)
        committing.finish(0)
        await wait_until(lambda: len(committing.member.commits) == 1, what="the first commit")
        committing.finish(1)
        committing.finish(0, B)
        await wait_until(lambda: len(committing.member.commits) == 2, what="the second commit")
    assert committing.member.commits == [{A: 1}, {A: 2, B: 1}]
    assert committing.commits("ok") == 2


async def test_what_finishes_right_after_a_commit_waits_for_the_interval() -> None:
    committing = Committing(interval_s=3600)
    committing.finish(0)
    async with committing.running():
        await committing.until_round(1)
        committing.finish(1)
        await _steps()
    assert committing.member.commits == [{A: 1}]


async def test_the_first_thing_that_finishes_does_not_wait_for_an_interval_in_which_there_was_nothing() -> (
    None
):
    committing = Committing(interval_s=3600)
    async with committing.running():
        await committing.until_round(1)
        committing.finish(0)
        await wait_until(lambda: bool(committing.member.commits), what="the commit")


async def test_a_round_comes_often_although_a_commit_is_not_due_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offset_committer, "_IDLE_S", 0.001)
    committing = Committing(interval_s=3600)
    committing.finish(0)
    async with committing.running():
        await committing.until_round(1)
        committing.finish(1)
        await committing.until_round(4)
    assert committing.member.commits == [{A: 1}]


async def test_nothing_finished_is_nothing_to_commit_and_a_round_comes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offset_committer, "_IDLE_S", 0.001)
    committing = Committing(interval_s=0.001)
    async with committing.running():
        await committing.until_round(3)
    assert committing.member.commits == []
    assert committing.commits("ok") == 0


async def test_a_commit_comes_early_once_a_quarter_of_what_may_stay_uncommitted_is_finished() -> None:
    committing = Committing(interval_s=3600, max_uncommitted=8)
    committing.finish(0)
    async with committing.running():
        await committing.until_round(1)
        committing.finish(1)
        await _steps()
        assert committing.member.commits == [{A: 1}]
        committing.finish(2)
        await wait_until(lambda: committing.member.commits == [{A: 1}, {A: 3}], what="the early commit")
        committing.finish(3)  # counted from the commit on
        await _steps()
        assert len(committing.member.commits) == 2
        committing.finish(4)
        await wait_until(lambda: len(committing.member.commits) == 3, what="the next early commit")


async def test_what_finishes_during_a_commit_brings_the_next_one_forward_too() -> None:
    committing = Committing(interval_s=3600, max_uncommitted=8)
    committing.member.commit_gate = gate = asyncio.Event()
    committing.finish(0)
    async with committing.running():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        committing.finish(2)
        committing.finish(3)
        gate.set()
        await committing.until_round(2)
    assert committing.member.commits == [{A: 1}, {A: 4}]


async def test_the_smallest_bound_commits_after_every_record() -> None:
    committing = Committing(interval_s=3600, max_uncommitted=1)
    async with committing.running():
        await committing.until_round(1)
        committing.finish(0)
        await committing.until_round(2)
    assert committing.member.commits == [{A: 1}]


async def test_who_waits_for_the_next_round_gets_it_before_the_interval_is_over() -> None:
    committing = Committing(interval_s=3600)
    async with committing.running():
        await committing.until_round(1)
        committing.committer.hurry()
        await committing.until_round(2)


async def test_a_commit_shows_the_membership_under_which_the_partitions_are_ours_and_no_later_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.member.membership = Membership("me", 2)  # the group has moved on, and we have not heard of it
    assert await committing.committer.commit() is False
    assert (committing.commits("fenced"), committing.member.commits) == (1, [])
    committing.ownership.assigned(Membership("me", 2), {A, B}, ())
    assert await committing.committer.commit() is True
    assert (committing.commits("ok"), committing.member.commits) == (1, [{A: 1}])


async def test_without_a_membership_nothing_is_sent() -> None:
    committing = Committing()
    committing.finish(0)
    committing.ownership.expelled()
    assert await committing.committer.commit() is False
    assert [committing.commits(outcome) for outcome in ("ok", "error", "fenced")] == [0, 0, 0]


@pytest.mark.parametrize("error", [UnknownMemberIdError, IllegalGenerationError, RebalanceInProgressError])
async def test_what_is_fenced_is_no_reason_to_end_and_goes_with_the_next_commit_if_it_is_ours_still(
    error: type[Exception],
) -> None:
    committing = Committing()
    committing.finish(0)
    committing.member.commit_errors.append(error())
    await committing.committer.commit()
    assert (committing.commits("fenced"), committing.ledger.committed(A)) == (1, None)
    await committing.committer.commit()
    assert (committing.commits("ok"), committing.ledger.committed(A)) == (1, 1)


async def test_a_commit_that_fails_is_sent_again_with_the_next_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.member.commit_errors.append(KafkaConnectionError())
    with capture_logs() as logs:
        await committing.committer.commit()
    assert [(line["event"], line["reason"]) for line in logs] == [("commit_failed", "KafkaConnectionError")]
    assert committing.commits("error") == 1
    committing.finish(1)
    await committing.committer.commit()
    assert committing.member.commits == [{A: 2}]


async def test_a_broker_that_does_not_answer_costs_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offset_committer, "_COMMIT_S", 0.001)
    committing = Committing()
    committing.finish(0)
    committing.member.commit_gate = asyncio.Event()
    with capture_logs() as logs:
        await committing.committer.commit()
    assert logs[0]["reason"] == "TimeoutError"
    assert committing.commits("error") == 1


async def test_one_commit_at_a_time_so_that_none_is_overtaken_by_an_older_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.member.commit_gate = gate = asyncio.Event()
    first = asyncio.create_task(committing.committer.commit())
    await asyncio.sleep(0)
    committing.finish(1)
    second = asyncio.create_task(committing.committer.commit())
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, second)
    assert committing.member.commits == [{A: 1}, {A: 2}]


async def test_the_answer_to_a_commit_of_an_earlier_epoch_is_not_noted_for_this_one() -> None:
    committing = Committing()
    committing.finish(0)
    committing.member.commit_gate = gate = asyncio.Event()
    commit = asyncio.create_task(committing.committer.commit())
    await asyncio.sleep(0)
    committing.ledger.add(A, None)
    gate.set()
    await commit
    assert committing.ledger.committed(A) is None


async def _steps() -> None:
    """The event loop does all that it can do without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


class Custodian:
    """Knows nothing of B yet."""

    def __init__(self) -> None:
        self.wanted: list[tuple[TopicPartition, int]] = []

    def metadata(self, partition: TopicPartition, topic_id: str, *, release: bool) -> str | None:
        return None if partition == B else f"release={release}"

    def want(self, partition: TopicPartition, epoch: int) -> None:
        self.wanted.append((partition, epoch))


async def test_a_deleted_topic_does_not_hide_what_became_of_the_others() -> None:
    committing = Committing()
    committing.finish(0)
    committing.finish(0, B)
    committing.member.missing = frozenset({B})
    with capture_logs() as logs:
        assert not await committing.committer.commit()
    assert [line["event"] for line in logs] == ["commit_failed"]
    assert (committing.ledger.committed(A), committing.ledger.committed(B)) == (1, None)


async def test_a_custodian_says_what_goes_with_the_offsets_and_which_must_wait() -> None:
    committing = Committing()
    custodian = Custodian()
    stored: list[dict[TopicPartition, str]] = []

    class Store(ScriptedMember):
        async def commit(self, membership, offsets):  # type: ignore[no-untyped-def]
            stored.append({partition: its.metadata for partition, its in offsets.items()})
            return ()

    committer = OffsetCommitter(
        Store(),
        committing.ledger,
        committing.ownership,
        TopicWatch(committing.member, committing.ledger, committing.metrics),
        committing.metrics,
        custodian,
        interval_s=1.0,
        max_uncommitted=10,
    )
    committing.finish(0)
    committing.finish(0, B)
    assert await committer.commit()
    assert await committer.commit([A])  # although its offset did not rise
    assert await committer.commit(release=[A])
    assert stored == [{A: "release=False"}, {A: "release=False"}, {A: "release=True"}]
    assert custodian.wanted == [(B, committing.ledger.epoch(B))] * 3
