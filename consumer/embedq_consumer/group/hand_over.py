"""Partitions come and go: a new one is opened at its committed offset, one that moves is drained and released."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import structlog

from embedq_consumer.group.assignor import decode_claim, decode_release, encode_release, share
from embedq_consumer.group.member import Member
from embedq_consumer.group.offset_committer import OffsetCommitter
from embedq_consumer.group.offsets import OffsetLedger
from embedq_consumer.group.ownership import Change, Ownership
from embedq_consumer.group.topic_watch import TopicWatch
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import KafkaError, Membership, TopicPartition

log = structlog.get_logger()

_OPEN_S: Final = 5.0
"""A coordinator that takes longer than this to say where a partition begins is asked again."""


class HandOver:
    """Follows the group, and brings the ledger in line with it.

    Invariants:
        - A partition is in the ledger from its opening to its release or loss; in each such epoch it begins at the offset
          that was committed when it was opened.
        - A released partition is drained and committed, or `drain_s` is over. Nobody else has it before.
        - Of a lost partition nothing is committed any more. What is in flight is answered all the same.
        - A partition whose topic was deleted and made again is lost, and opened again, in the same step.
    """

    # More than six parameters: a rebalance changes whatever is kept of a partition.
    def __init__(
        self,
        member: Member,
        ledger: OffsetLedger,
        ownership: Ownership,
        committer: OffsetCommitter,
        topics: TopicWatch,
        metrics: Metrics,
        *,
        drain_s: float,
    ) -> None:
        self._member = member
        self._ledger = ledger
        self._ownership = ownership
        self._committer = committer
        self._topics = topics
        self._metrics = metrics
        self._drain_s = drain_s
        self._releasing_since: dict[TopicPartition, float] = {}
        self._changed: Callable[[], None] = lambda: None
        self.joined = asyncio.Event()
        """Set once the group has given us our partitions, even if there are none."""

    def follow(self, topics: Iterable[str], changed: Callable[[], None]) -> None:
        """Join the group; `changed` is called whenever other partitions are to be read than before, or
        one is ours no more."""
        self._changed = changed
        names = list(topics)
        self._topics.follow(names, self._remade)
        self._member.join(names, self)

    # -- what the group says, and asks --------------------------------------------------------------------------------

    def claim(self) -> bytes:
        """The user data of our next JoinGroup."""
        return self._ownership.claim()

    def share(
        self, partitions: Mapping[str, Sequence[int]], members: Mapping[str, tuple[Collection[str], bytes]]
    ) -> Mapping[str, tuple[Collection[TopicPartition], bytes]]:
        """Everybody's partitions, where we are the leader."""
        shares = share(
            partitions, {member: (topics, decode_claim(claim)) for member, (topics, claim) in members.items()}
        )
        return {
            member: (its.partitions, encode_release(its.release) if its.release else b"")
            for member, its in shares.items()
        }

    def assigned(
        self, membership: Membership, partitions: frozenset[TopicPartition], user_data: bytes
    ) -> None:
        """A rebalance is over."""
        release = decode_release(user_data)
        change = self._ownership.assigned(membership, partitions, release)
        log.info(
            "partitions_assigned",
            count=len(partitions),
            added=len(change.added),
            released=len(self._ownership.releasing),
            lost=len(change.lost),
            generation=membership.generation,
        )
        self._metrics.rebalances.inc()
        self._apply(change)
        self.joined.set()

    def expelled(self) -> None:
        """The group went on without us: we were silent for longer than a session, or somebody removed us."""
        log.warning("expelled_from_group")
        self._apply(self._ownership.expelled())

    def went_back(self, partition: TopicPartition) -> None:
        """Its records begin below what was taken of it: where it begins is asked for again, and whose offsets they are."""
        log.warning("partition_went_back", topic=partition.topic, partition=partition.partition)
        self._ownership.reopen(partition)
        self._committer.hurry()
        self._changed()

    def _remade(self, partitions: frozenset[TopicPartition]) -> None:
        """Their topic is another one than that whose records were taken."""
        self._ledger.drop(partitions)
        self._forget(partitions)
        for partition in partitions:
            self._ownership.reopen(partition)
        self._committer.hurry()
        self._changed()

    def _apply(self, change: Change) -> None:
        self._ledger.drop(change.lost)
        self._forget(change.lost)
        now = time.monotonic()
        self._releasing_since = {
            partition: self._releasing_since.get(partition, now) for partition in self._ownership.releasing
        }
        self._metrics.assigned.set(len(self._ownership))
        self._committer.hurry()
        self._changed()

    # -- what we do about it ------------------------------------------------------------------------------------------

    async def step(self) -> None:
        """Right after a commit: open what is new, and give up what is done.

        Raises:
            KafkaError: the membership cannot go on.
        """
        self._member.check()
        await self._open()
        await self._release(time.monotonic())

    async def _open(self) -> None:
        opening, membership = self._ownership.opening, self._ownership.membership
        if not opening:
            return
        try:
            async with asyncio.timeout(_OPEN_S):
                await self._topics.look()
                stored = await self._member.committed(opening)
        except (KafkaError, TimeoutError) as error:
            log.warning("committed_offsets_unknown", reason=type(error).__name__)
            self._committer.again_soon()
            return
        if membership != self._ownership.membership:
            self._committer.hurry()  # a partition may have been another replica's since
            return
        for partition in opening:
            start = self._topics.start(partition, stored[partition])
            self._ledger.add(partition, start.offset, topic_id=start.topic_id, is_new=start.is_new)
            self._ownership.opened(partition)
        self._changed()

    async def _release(self, now: float) -> None:
        due = {partition for partition in self._ownership.releasing if self._is_drained(partition, now)}
        if due:
            # Without an answer the commit is sent again with the next round, until there is no more time for it.
            committed = await self._committer.commit(release=due)
            gone = {p for p in due if committed or self._is_overdue(p, now)} & self._ownership.releasing
            for partition in gone:
                if left := self._ledger.in_flight(partition):
                    log.warning(
                        "released_undrained", topic=partition.topic, partition=partition.partition, jobs=left
                    )
                self._ownership.released(partition)
            self._ledger.drop(gone)
            self._forget(gone)
            self._metrics.assigned.set(len(self._ownership))
            self._changed()
        if self._ownership.take_rejoin():
            self._member.rejoin()

    def _is_drained(self, partition: TopicPartition, now: float) -> bool:
        return not self._ledger.in_flight(partition) or self._is_overdue(partition, now)

    def _is_overdue(self, partition: TopicPartition, now: float) -> bool:
        return now >= self._releasing_since.get(partition, now) + self._drain_s

    def _forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Another replica measures their lag from now on."""
        for partition in partitions:
            self._metrics.lag.labels(partition.topic, partition.partition).set(0)
