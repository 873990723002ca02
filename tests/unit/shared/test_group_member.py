"""The group's member without a broker: what it does when the coordinator's answers are bad."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupLoadInProgressError,
    IllegalGenerationError,
    NotCoordinatorForGroupError,
    UnknownMemberIdError,
)
from aiokafka.structs import OffsetAndMetadata

from embedq_shared.kafka import GroupMember, GroupMemberOptions, Membership

A, B = TopicPartition("jobs", 0), TopicPartition("jobs.bulk", 3)


class Committed(NamedTuple):
    topics: list[Any]


class Fetched(NamedTuple):
    topics: list[Any]
    error_code: int


class Coordinator:
    """Stands for aiokafka's: it answers what it was told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        self.member_id = "me"
        self.resets = 0
        self.deaths = 0

    async def ask(self, request: Any) -> object:
        self.asked.append(request)
        return self.answer

    def reset_generation(self) -> None:
        self.resets += 1

    def coordinator_dead(self) -> None:
        self.deaths += 1


def member(answer: object) -> tuple[GroupMember, Coordinator]:
    options = GroupMemberOptions(
        group="g",
        client_id="r",
        static=False,
        session_timeout_ms=10_000,
        rebalance_timeout_ms=60_000,
        heartbeat_ms=300,
    )
    made = GroupMember({"bootstrap_servers": "localhost:1"}, options)
    coordinator = Coordinator(answer)
    made._coordinator = coordinator  # type: ignore[assignment]
    return made, coordinator


OFFSETS = {A: OffsetAndMetadata(7, ""), B: OffsetAndMetadata(9, "text")}


async def test_a_commit_shows_the_membership_that_it_was_given() -> None:
    made, coordinator = member(Committed([("jobs", [(0, 0)]), ("jobs.bulk", [(3, 0)])]))
    await made.commit(Membership("me", 4), OFFSETS)
    [request] = coordinator.asked
    assert (request._consumer_group_generation_id, request._consumer_id) == (4, "me")
    assert request._topics == [("jobs", [(0, 7, "")]), ("jobs.bulk", [(3, 9, "text")])]


async def test_a_commit_of_a_generation_that_is_over_is_refused_and_the_membership_goes_on() -> None:
    made, coordinator = member(Committed([("jobs", [(0, 22)])]))
    with pytest.raises(IllegalGenerationError):
        await made.commit(Membership("me", 4), OFFSETS)
    assert coordinator.resets == 0


@pytest.mark.parametrize(("member_id", "resets"), [("me", 1), ("former", 0)])
async def test_a_member_that_the_coordinator_does_not_know_joins_anew_unless_it_has_since(
    member_id: str, resets: int
) -> None:
    made, coordinator = member(Committed([("jobs", [(0, 25)])]))
    with pytest.raises(UnknownMemberIdError):
        await made.commit(Membership(member_id, 4), OFFSETS)
    assert coordinator.resets == resets


async def test_another_broker_is_the_coordinator_now() -> None:
    made, coordinator = member(Committed([("jobs", [(0, 16)])]))
    with pytest.raises(NotCoordinatorForGroupError):
        await made.commit(Membership("me", 4), OFFSETS)
    assert coordinator.deaths == 1


async def test_stored_offsets_come_with_their_text_and_none_where_nothing_was_stored() -> None:
    made, _ = member(
        Fetched([("jobs", [(0, 7, -1, "text", 0, {})], {}), ("jobs.bulk", [(3, -1, -1, "", 0, {})], {})], 0)
    )
    assert await made.committed([A, B]) == {A: OffsetAndMetadata(7, "text"), B: None}


@pytest.mark.parametrize(
    "answer",
    [Fetched([], 14), Fetched([("jobs", [(0, -1, -1, "", 14, {})], {})], 0)],
    ids=["group", "partition"],
)
async def test_offsets_that_are_not_loaded_yet_are_no_answer(answer: Fetched) -> None:
    """Else the partition would be read from its beginning."""
    made, _ = member(answer)
    with pytest.raises(GroupLoadInProgressError):
        await made.committed([A])


async def test_a_member_that_never_joined_has_nothing_to_leave() -> None:
    made, _ = member(None)
    made._coordinator = None
    made.check()
    assert await made.close(1.0) is None
