"""What a rebalance makes of the ledger, and what goes to the group in turn."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from embedq_consumer.group import HandOver, OffsetCommitter, OffsetLedger, Ownership, TopicWatch
from embedq_consumer.group.assignor import encode_claim
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import Membership
from tests.helpers.metric_values import sample_value
from tests.helpers.scripted_consumer import ScriptedMember

A, B, C = (TopicPartition("jobs", number) for number in range(3))


class Group:
    """A hand-over with the ledger that it keeps in line; the test is the loop that calls it."""

    def __init__(self, *, drain_s: float = 60.0) -> None:
        self.member = ScriptedMember()
        self.ledger = OffsetLedger()
        self.ownership = Ownership()
        self.metrics = Metrics()
        self.changes = 0
        topics = TopicWatch(self.member, self.ledger, self.metrics)
        self.committer = OffsetCommitter(
            self.member,
            self.ledger,
            self.ownership,
            topics,
            self.metrics,
            interval_s=60.0,
            max_uncommitted=1000,
        )
        self.hand_over = HandOver(
            self.member, self.ledger, self.ownership, self.committer, topics, self.metrics, drain_s=drain_s
        )
        self.hand_over.follow(["jobs"], self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def value(self, name: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}")


async def test_a_new_partition_is_in_the_ledger_once_its_start_is_known() -> None:
    group = Group()
    group.member.stored[A] = 5
    group.member.assign(A, B)
    assert (group.ledger.partitions, group.changes) == (frozenset(), 1)
    await group.hand_over.step()
    assert [group.ledger.position(partition) for partition in (A, B)] == [5, None]
    assert group.ownership.reading == {A, B}
    assert group.changes == 2
    assert group.value("assigned_partitions") == 2
    assert group.value("rebalances_total") == 1


async def test_nothing_is_asked_while_nothing_is_new() -> None:
    group = Group()
    group.member.assign(A)
    await group.hand_over.step()
    group.member.assign(A)
    await group.hand_over.step()
    assert group.member.calls.count("committed") == 1


async def test_a_coordinator_that_refuses_at_once_is_not_asked_without_a_pause() -> None:
    """Such a refusal needs no network, as after a member's end: a loop that asks again at once lets nothing else run."""
    group = Group()
    group.member.open_errors = [KafkaConnectionError()] * 1000
    group.member.assign(A)
    committing = asyncio.create_task(group.committer.run(group.hand_over.step))
    with capture_logs() as logs:
        for _ in range(20):
            await asyncio.sleep(0)
    committing.cancel()
    with suppress(asyncio.CancelledError):
        await committing
    assert [line["event"] for line in logs] == ["committed_offsets_unknown"]


async def test_all_that_is_released_is_gone_before_the_group_is_asked_for_one_rebalance() -> None:
    group = Group()
    group.member.assign(A, B, C)
    await group.hand_over.step()
    slow = group.ledger.begin(A, 0)
    group.ledger.start(slow)
    group.ledger.begin(A, 1)  # which waits, and is its next owner's
    group.member.assign(C, release=[A, B])
    await group.hand_over.step()
    assert group.ownership.releasing == {A}
    assert "rejoin" not in group.member.calls
    group.ledger.finish(slow)
    await group.hand_over.step()
    await group.hand_over.step()
    assert group.member.calls.count("rejoin") == 1
    assert group.ledger.partitions == {C}
    assert group.member.stored == {A: 1}


async def test_a_release_that_a_second_rebalance_asks_for_again_is_not_given_more_time() -> None:
    group = Group(drain_s=0.0)
    group.member.assign(A)
    await group.hand_over.step()
    group.ledger.start(group.ledger.begin(A, 0))
    group.member.assign(release=[A])
    group.member.assign(release=[A])
    with capture_logs() as logs:
        await group.hand_over.step()
    assert ("released_undrained", 1) in [(line["event"], line.get("jobs")) for line in logs]
    assert "rejoin" in group.member.calls


async def test_the_leader_shares_out_among_all_and_asks_owners_to_release() -> None:
    group = Group()
    shares = group.hand_over.share(
        {"jobs": [0, 1]},
        {"owner": (["jobs"], encode_claim(3, [A, B])), "new": (["jobs"], encode_claim(-1, []))},
    )
    assert [len(partitions) for partitions, _ in shares.values()] == [1, 0]
    group.member.assign(A, B)
    group.hand_over.assigned(Membership("me", 2), frozenset(shares["owner"][0]), shares["owner"][1])
    assert len(group.ownership.releasing) == 1


async def test_who_is_expelled_says_so_and_keeps_nothing() -> None:
    group = Group()
    group.member.assign(A)
    await group.hand_over.step()
    with capture_logs() as logs:
        group.member.expel()
    assert [line["event"] for line in logs] == ["expelled_from_group"]
    assert group.ledger.partitions == frozenset()
    assert group.value("assigned_partitions") == 0
