"""What the service needs of its group membership, and how the real one is configured."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Protocol

from embedq_shared.kafka import (
    Follower,
    GroupMember,
    GroupMemberOptions,
    Membership,
    OffsetAndMetadata,
    TopicPartition,
)

HEARTBEAT_MS: Final = 300
"""A member hears of a rebalance by its next heartbeat, and a partition on the move waits for two of them. Each costs the
coordinator a few microseconds; a hundred replicas send it 333 a second."""
_HEARTBEATS_A_SESSION: Final = 3
"""Two may be lost."""


class OffsetStore(Protocol):
    """Where a new owner of a partition begins, and where it leaves word of how far it is.

    Transactions would replace both: offsets sent with the results, and a start that is asked for once the former owner's
    transaction has ended.
    """

    async def committed(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata | None]:
        """The stored offsets; raises `KafkaError` if nothing can be said now."""

    async def commit(
        self, membership: Membership, offsets: Mapping[TopicPartition, OffsetAndMetadata]
    ) -> Collection[TopicPartition]:
        """Store the next offsets to read; returned are partitions that are not there, whose offsets were not stored.

        Raises `KafkaError`, or one of `FENCED` where the membership is not the present one."""


class TopicIdSource(Protocol):
    """Tells topics of the same name apart."""

    async def topic_ids(self, topics: Collection[str]) -> Mapping[str, str]:
        """The id of each topic that is there and has one; raises `KafkaError` if nothing can be said now."""


class Member(OffsetStore, TopicIdSource, Protocol):
    """The part of `GroupMember` that the service uses; a scripted one stands in for it in tests."""

    async def start(self) -> None:
        """Connect."""

    def join(self, topics: Iterable[str], follower: Follower) -> None:
        """Become a member, and stay one."""

    def check(self) -> None:
        """Raise what ended the membership."""

    def rejoin(self) -> None:
        """Ask for a rebalance."""

    async def close(self, within: float) -> str | None:
        """Leave; None, or why the group did not hear it."""


def make_member(
    kafka: Mapping[str, Any],
    *,
    group: str,
    replica: str,
    static: bool,
    session_timeout_ms: int,
    rebalance_timeout_ms: int,
) -> Member:
    """The real one; `kafka` is what each client needs to reach the brokers."""
    return GroupMember(
        kafka,
        GroupMemberOptions(
            group=group,
            client_id=replica,
            static=static,
            session_timeout_ms=session_timeout_ms,
            rebalance_timeout_ms=rebalance_timeout_ms,
            heartbeat_ms=min(HEARTBEAT_MS, session_timeout_ms // _HEARTBEATS_A_SESSION),
        ),
    )
