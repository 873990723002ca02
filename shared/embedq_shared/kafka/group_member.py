"""A member of a consumer group that reads no records: it joins, sends heartbeats, and stores offsets.

aiokafka's own consumer stops reading from the first word of a rebalance until its end, and the end may be a dead member's
session timeout away. So reading is left to a client without a group, and this one is nothing but the membership.

Traps of aiokafka and of Kafka that end here:

- A broker answers the requests of one connection in order. On the connection of a JoinGroup that waits for others, a
  commit would wait, too, and come back as one of a generation that is over; aiokafka then throws the membership away.
  Commits have a connection of their own, and their failure changes nothing.
- aiokafka takes a commit's generation from where the group is, not from what the caller knows. Here the caller says which
  membership an offset belongs to, so the broker refuses what was read under an assignment that is over. That is the
  fence: a partition gets a new owner in a later generation only.
- With two assignors aiokafka joins twice for each rebalance, and two such members never come to rest. So there is one.
- aiokafka's close waits for a JoinGroup under way, and the group then waits for a member that is gone.
- Its errors wait until somebody polls, and the group stands still until then: `check` raises them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    IllegalGenerationError,
    KafkaError,
    NoError,
    NotCoordinatorForGroupError,
    RebalanceInProgressError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import DescribeGroupsRequest
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata

from embedq_shared.kafka.clients import KafkaConnections
from embedq_shared.kafka.requests import StableOffsets, TopicIds, offsets_of, topic_ids_of
from embedq_shared.kafka.stopping import finished

log = logging.getLogger(__name__)

FENCED: Final = (UnknownMemberIdError, IllegalGenerationError, RebalanceInProgressError)
"""What the group's coordinator says of a commit whose membership is not, or not yet, the present one."""

_FOREVER_MS: Final = 10**12
"""aiokafka leaves the group when nobody has polled for so long; this member is never polled."""
_LEAVE_S: Final = 2.0
"""For saying goodbye: a group that does not hear it notices at the end of the session."""
_END_S: Final = 2.0


class Membership(msgspec.Struct, frozen=True):
    """One member in one generation of its group: what a commit must show."""

    member_id: str
    generation: int


class GroupMemberOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to be a member. Times in milliseconds."""

    group: str
    client_id: str
    """The replica's name. A member of the same name that is there before the first join is taken for a dead predecessor."""
    static: bool
    """Whether `client_id` is the member's `group.instance.id` as well (KIP-345)."""
    session_timeout_ms: int
    rebalance_timeout_ms: int
    heartbeat_ms: int


class Follower(Protocol):
    """What is told of the group, and asked. None of it may wait, or raise."""

    def claim(self) -> bytes:
        """What the group's leader should know of us: the user data of the JoinGroup that is about to be sent."""

    def share(
        self, partitions: Mapping[str, Sequence[int]], members: Mapping[str, tuple[Collection[str], bytes]]
    ) -> Mapping[str, tuple[Collection[TopicPartition], bytes]]:
        """As the group's leader: each member's partitions and user data, from its topics and its claim."""

    def assigned(
        self, membership: Membership, partitions: frozenset[TopicPartition], user_data: bytes
    ) -> None:
        """A rebalance is over, and these are ours."""

    def expelled(self) -> None:
        """We are no member any more, and will join as a new one."""


class ReplacedMember(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """Another process took over this static member's name."""


class GroupMember:
    """Membership in a consumer group, from `join` to `close`."""

    def __init__(self, kafka: Mapping[str, Any], options: GroupMemberOptions) -> None:
        self._kafka = kafka
        self._options = options
        self._client: Any = None
        self._coordinator: _Coordinator | None = None

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: no broker answers.
        """
        self._client = KafkaConnections(
            **self._kafka,
            client_id=self._options.client_id,
            # A JoinGroup waits for the whole rebalance.
            request_timeout_ms=self._options.rebalance_timeout_ms + 15_000,
            metadata_max_age_ms=60_000,
        )
        await self._client.bootstrap()

    def join(self, topics: Iterable[str], follower: Follower) -> None:
        """Ask to join, and stay a member from then on; `follower` hears of it."""
        subscription = SubscriptionState()
        subscription.register_fetch_waiters(set())
        subscription.subscribe(topics=set(topics))
        self._client.set_topics(subscription.subscription.topics)
        self._coordinator = _Coordinator(self._client, subscription, follower, self._options)

    def check(self) -> None:
        """Raise what aiokafka keeps for the next poll.

        Raises:
            KafkaError: the membership cannot go on: no right to the group, an inconsistent protocol, a taken name.
        """
        if self._coordinator is not None:
            self._coordinator.check_errors()

    def rejoin(self) -> None:
        """Ask for a rebalance."""
        self._joined().request_rejoin()

    async def commit(
        self, membership: Membership, offsets: Mapping[TopicPartition, OffsetAndMetadata]
    ) -> frozenset[TopicPartition]:
        """Store the next offsets to read; returned are partitions that are not there, whose offsets were not stored.

        Raises:
            KafkaError: nothing is known of the outcome, or one of `FENCED`: nothing was stored.
        """
        request = OffsetCommitRequest(
            self._options.group,
            membership.generation,
            membership.member_id,
            OffsetCommitRequest.DEFAULT_RETENTION_TIME,
            _by_topic((p, (p.partition, stored.offset, stored.metadata)) for p, stored in offsets.items()),
        )
        response = await self._ask(request)
        codes = {
            TopicPartition(topic, number): code
            for topic, partitions in response.topics
            for number, code in partitions
        }
        # A deleted topic must not hide what became of the others.
        missing = {p for p, code in codes.items() if for_code(code) is UnknownTopicOrPartitionError}
        try:
            self._raise_for(code for partition, code in codes.items() if partition not in missing)
        except UnknownMemberIdError:
            coordinator = self._joined()
            if coordinator.member_id == membership.member_id:
                coordinator.reset_generation()  # as the next heartbeat would
            raise
        return frozenset(missing)

    async def committed(
        self, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """The stored offsets, None where there is none, once no open transaction can change them.

        Raises:
            KafkaError: the coordinator is not there, still loads them, or a transaction is open: ask again.
        """
        response = await self._ask(StableOffsets(self._options.group, partitions))
        self._note_if_moved(response.error_code)
        found = offsets_of(response)
        return {partition: found.get(partition) for partition in partitions}

    async def topic_ids(self, topics: Collection[str]) -> dict[str, str]:
        """The id of each of these topics that is there; none from a broker older than 2.8. The coordinator is asked, as it
        is for commits, so that no other broker's trouble delays these.

        Raises:
            KafkaError: nothing can be said now.
        """
        try:
            return topic_ids_of(await self._ask(TopicIds(topics)))
        except NotImplementedError:  # aiokafka: the broker has no such version
            return {}

    async def close(self, within: float) -> str | None:
        """Leave the group at once, whatever it is doing, and disconnect: None, or why that was not heard, in one word.

        A static member does not leave: the group waits for its next process, for as long as a session lasts.
        """
        client, self._client = self._client, None
        if client is None:
            return None
        problem = None
        coordinator, self._coordinator = self._coordinator, None
        if coordinator is not None:
            problem = await finished(coordinator.leave(), min(_LEAVE_S, within))
            await finished(coordinator.end(), _END_S)
        return await finished(client.close(), within) or problem

    async def _ask(self, request: Any) -> Any:
        """One request to the group's coordinator, on a connection where no JoinGroup waits."""
        return await self._joined().ask(request)

    def _raise_for(self, codes: Iterable[int]) -> None:
        for code in codes:
            self._note_if_moved(code)
            if (kind := for_code(code)) is not NoError:
                raise kind()

    def _note_if_moved(self, code: int) -> None:
        if for_code(code) in (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
            self._joined().coordinator_dead()

    def _joined(self) -> _Coordinator:
        if self._coordinator is None:
            raise KafkaError("no member of the group any more")
        return self._coordinator


class _Coordinator(GroupCoordinator):  # type: ignore[misc]  # aiokafka has no type information
    """aiokafka's side of the membership. It tells the follower, and cleans up before it joins."""

    def __init__(
        self, client: Any, subscription: Any, follower: Follower, options: GroupMemberOptions
    ) -> None:
        self._follower = follower
        self._options = options
        self._adapter = _Assignor(follower)
        self._was_member = False
        self._leaving = False
        super().__init__(
            client,
            subscription,
            group_id=options.group,
            group_instance_id=options.client_id if options.static else None,
            session_timeout_ms=options.session_timeout_ms,
            heartbeat_interval_ms=options.heartbeat_ms,
            rebalance_timeout_ms=options.rebalance_timeout_ms,
            max_poll_interval_ms=_FOREVER_MS,
            enable_auto_commit=False,
            assignors=(self._adapter,),
        )

    async def ask(self, request: Any) -> Any:
        """One request on the connection that no JoinGroup uses."""
        await self.ensure_coordinator_known()
        if self.coordinator_id is None:
            raise GroupCoordinatorNotAvailableError
        return await self._client.send(self.coordinator_id, request, group=ConnectionGroup.DEFAULT)

    def reset_generation(self) -> None:
        """aiokafka: the coordinator does not know this member any more."""
        was_member = self.generation > 0
        super().reset_generation()
        if was_member and not self._leaving:
            self._follower.expelled()

    async def ensure_active_group(self, subscription: Any, prev_assignment: Any) -> Any:
        """aiokafka: join."""
        if not self._was_member and not self._options.static:
            await self._remove_predecessors()
        elif self._was_member and self._options.static and self.generation < 0:
            await self._check_not_replaced()
        return await super().ensure_active_group(subscription, prev_assignment)

    async def _on_join_complete(
        self, generation: int, member_id: str, protocol: str, member_assignment_bytes: bytes
    ) -> None:
        """aiokafka: the group has answered SyncGroup."""
        await super()._on_join_complete(generation, member_id, protocol, member_assignment_bytes)
        self._was_member = True
        self._follower.assigned(
            Membership(member_id, generation),
            frozenset(self._subscription.assigned_partitions()),
            self._adapter.received,
        )

    async def leave(self) -> None:
        """Say goodbye on the free connection, so that it is heard while a JoinGroup waits."""
        self._leaving = True
        # A heartbeat may hear that we left before this answer comes, and what it wakes would join again.
        self._coordination_task.cancel()
        if self.member_id and self.coordinator_id is not None and not self._options.static:
            await self.ask(LeaveGroupRequest(self.group_id, self.member_id))

    async def end(self) -> None:
        """End aiokafka's tasks."""
        self.generation = -1  # else its close says goodbye, too
        self._coordination_task.cancel()
        await asyncio.wait({self._coordination_task})
        await self.close()

    async def _namesakes(self) -> list[str]:
        """Ids of other members with our client id."""
        response = await self.ask(DescribeGroupsRequest([self.group_id]))
        return [
            member_id
            for described in response.groups
            for member_id, client_id, *_ in described[5]
            if client_id == self._options.client_id and member_id != self.member_id
        ]

    async def _remove_predecessors(self) -> None:
        """A killed process of this replica is still a member: without it the group need not wait for its session's end."""
        try:
            for member_id in await self._namesakes():
                await self.ask(LeaveGroupRequest(self.group_id, member_id))
                log.warning("predecessor removed from group %s: %s", self.group_id, member_id)
        except KafkaError as error:  # the join meets the same trouble, and says so; else the group waits
            log.warning("group %s not searched for a predecessor: %s", self.group_id, type(error).__name__)

    async def _check_not_replaced(self) -> None:
        """A static member that rejoins under a taken name would throw out the process that took it, for ever in turns."""
        if await self._namesakes():
            raise ReplacedMember(f"another process is the group's static member {self._options.client_id!r}")


class _Assignor:
    """What aiokafka takes for an assignor.

    Its name is that of round robin, the protocol of embedq's former replicas: a group must agree on one name, and the
    user data that the two differ in is none of its business. So replicas of both kinds form one group. Where a former
    one is the leader, partitions go round and none is handed over in two steps.
    """

    name = "roundrobin"

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self.received = b""
        """The user data of the latest assignment."""

    def metadata(self, topics: Iterable[str]) -> Any:
        """Ours, for a JoinGroup."""
        return ConsumerProtocolMemberMetadata(0, sorted(topics), self._follower.claim())

    def assign(self, cluster: Any, members: Mapping[str, Any]) -> dict[str, Any]:
        """Everybody's, as the leader."""
        topics = {topic for metadata in members.values() for topic in metadata.subscription}
        shares = self._follower.share(
            {topic: sorted(cluster.partitions_for_topic(topic) or ()) for topic in topics},
            {
                member: (frozenset(metadata.subscription), metadata.user_data or b"")
                for member, metadata in members.items()
            },
        )
        return {
            member: ConsumerProtocolMemberAssignment(
                0, _by_topic((p, p.partition) for p in sorted(partitions)), user_data
            )
            for member, (partitions, user_data) in shares.items()
        }

    def on_assignment(self, assignment: Any) -> None:
        """Ours, from the leader."""
        self.received = assignment.user_data or b""


def _by_topic(items: Iterable[tuple[TopicPartition, Any]]) -> list[tuple[str, list[Any]]]:
    """As Kafka's requests want it: each topic once."""
    found: dict[str, list[Any]] = {}
    for partition, item in items:
        found.setdefault(partition.topic, []).append(item)
    return list(found.items())
