"""Transactions that a consumer group fences, and offsets that no open transaction can still change (KIP-447).

aiokafka 0.14 sends offsets into a transaction without saying which member of which generation sends them, so that a
broker cannot refuse those of a replica that lost its partitions; and it reads committed offsets without waiting for
open transactions. Both need requests of `requests.py`; everything else of a transaction is aiokafka's own.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.errors import (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    IllegalGenerationError,
    InvalidProducerEpoch,
    KafkaError,
    NoError,
    NotCoordinatorError,
    ProducerFenced,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.producer.sender import Sender, TxnOffsetCommitHandler
from aiokafka.structs import OffsetAndMetadata

from embedq_shared.kafka.group_member import Membership
from embedq_shared.kafka.producing import Appendable, PartitionwiseProducer
from embedq_shared.kafka.requests import StableOffsets, TxnOffsetCommit, offsets_of

_FENCED_INSTANCE_ID: Final = 82
"""An error code that aiokafka has no class for."""
_RETRY_S: Final = 0.05
"""Between two looks at an offset that an open transaction may still change."""


class FencedMember(msgspec.Struct, frozen=True, kw_only=True):
    """Who commits: one member of a consumer group, in one generation of it."""

    group: str
    membership: Membership


class MemberFenced(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """The group has gone on without this member or generation: its partitions may belong to another one."""


# -- offsets in a transaction ---------------------------------------------------------------------------------------------


class _FencedOffsets(TxnOffsetCommitHandler):  # type: ignore[misc]  # aiokafka has no type information
    """aiokafka's own handler, but that the request names the member, and that its refusal leaves the transaction as it is.

    aiokafka's `error_transaction` forgets which partitions the transaction has, and an abort of one that has none is not sent
    to the brokers: they would take what comes next for the same transaction, and commit both.
    """

    def __init__(
        self, sender: Sender, offsets: dict[TopicPartition, OffsetAndMetadata], member: FencedMember
    ) -> None:
        super().__init__(sender, offsets, member.group)
        self._member = member
        self._backoff_s: float = self._default_backoff

    def create_request(self) -> TxnOffsetCommit:
        manager = self._sender._txn_manager
        topics: dict[str, list[tuple[int, int, int, str, dict[int, bytes]]]] = defaultdict(list)
        for partition, offset in sorted(self._offsets.items()):
            topics[partition.topic].append((partition.partition, offset.offset, -1, offset.metadata, {}))
        return TxnOffsetCommit(
            manager.transactional_id,
            self._member.group,
            manager.producer_id,
            manager.producer_epoch,
            self._member.membership.generation,
            self._member.membership.member_id,
            None,
            [(topic, partitions, {}) for topic, partitions in topics.items()],
            {},
        )

    def handle_response(self, response: Any) -> float | None:
        codes = {
            TopicPartition(topic, partition): code
            for topic, partitions, _ in response.errors
            for partition, code, _ in partitions
        }
        if fenced := next((code for code in codes.values() if _is_fenced(code)), None):
            _, _, sent = self._sender._txn_manager._pending_txn_offsets.popleft()
            sent.set_exception(MemberFenced(f"error {fenced}"))
            return None
        for partition, code in codes.items():
            error = for_code(code)
            if error is NoError:
                self._sender._txn_manager.offset_committed(
                    partition, self._offsets[partition].offset, self._member.group
                )
            elif error in (CoordinatorNotAvailableError, NotCoordinatorError, RequestTimedOutError):
                self._sender._coordinator_dead(CoordinationType.GROUP)
                return self._backoff_s
            elif error in (CoordinatorLoadInProgressError, UnknownTopicOrPartitionError):
                return self._backoff_s
            elif error is InvalidProducerEpoch:
                raise ProducerFenced
            else:
                self._sender._txn_manager.error_transaction(error())
                return None
        return None


def _is_fenced(code: int) -> bool:
    return code == _FENCED_INSTANCE_ID or for_code(code) in (IllegalGenerationError, UnknownMemberIdError)


class FencedProducer(PartitionwiseProducer):
    """A transactional producer whose offsets are taken from the present generation of a group alone.

    `member` must be set before `send_offsets_to_transaction`, which raises `MemberFenced` if the group has gone on: then
    the transaction must be aborted. After any other failure in a transaction the producer must be replaced by another one
    of its name, whose start ends the transaction: aiokafka's own abort does not reach the brokers then.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.member: FencedMember | None = None
        self._sender._do_txn_offset_commit = self._commit_offsets

    def append(
        self, topic: str, partition: int, records: Sequence[Appendable]
    ) -> tuple[asyncio.Future[Any], int]:
        """The same, within the transaction."""
        self._txn_manager.maybe_add_partition_to_txn(TopicPartition(topic, partition))
        return super().append(topic, partition, records)

    async def transaction_broken(self) -> None:
        """Wait until the transaction can only be aborted, or the producer has ended."""
        await asyncio.wait({self._txn_manager.wait_for_transaction_end()})

    def refusal_of(self, topic: str) -> KafkaError | None:
        """Why the transaction was broken for the sake of this topic, if it was."""
        waiter = self._txn_manager.wait_for_transaction_end()
        error = waiter.exception() if waiter is not None and waiter.done() else None
        if isinstance(error, TopicAuthorizationFailedError) and topic in error.args[0]:
            return TopicAuthorizationFailedError(topic)
        return None

    async def _commit_offsets(self, offsets: dict[TopicPartition, OffsetAndMetadata], group_id: str) -> None:
        """In place of `Sender._do_txn_offset_commit`."""
        if not offsets:
            return
        if self.member is None or self.member.group != group_id:
            raise RuntimeError("offsets were sent for a group whose member is not known. This is a bug.")
        try:
            node = await self._sender._find_coordinator(CoordinationType.GROUP, group_id)
        except KafkaError as error:
            self._txn_manager.error_transaction(error)
            return
        await _FencedOffsets(self._sender, offsets, self.member).do(node)


async def stable_offsets(
    client: AIOKafkaClient, group: str, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata | None]:
    """A group's committed offset of each partition, None where it never committed; waits for open transactions to end.

    Tries again for as long as the coordinator moves or loads: the caller sets the deadline.

    Raises:
        KafkaError: the broker refuses, for instance for want of a right.
    """
    request = StableOffsets(group, partitions)
    while True:
        try:
            node = await client.coordinator_lookup(CoordinationType.GROUP, group)
            return offsets_of(await client.send(node, request, group=ConnectionGroup.COORDINATION))
        except KafkaError as error:
            if not error.retriable:
                raise
        await asyncio.sleep(_RETRY_S)
