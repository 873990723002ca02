"""Commits what is safe to commit, as soon as there is something, and says when a commit is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import structlog

from embedq_consumer.group.member import OffsetStore
from embedq_consumer.group.offsets import OffsetLedger
from embedq_consumer.group.ownership import Ownership
from embedq_consumer.group.topic_watch import TopicWatch, mark
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import FENCED, KafkaError, Membership, OffsetAndMetadata, TopicPartition

log = structlog.get_logger()

_COMMIT_S: Final = 10.0
"""A broker that takes longer than this for a commit is in trouble, and the next commit holds all of this one."""
_IDLE_S: Final = 0.5
"""A round comes at least so often, for what goes along with commits: lag, stuck watermarks, errors of the membership."""
_LAST_COMMIT_S: Final = 5.0
"""For a stop's last commit."""
_RETRY_S: Final = 0.05
_COMMITS_A_SPAN: Final = 4
"""A commit comes early once a quarter of the records that may stay uncommitted is finished."""


class Custodian(Protocol):
    """Says of each partition what its commits shall carry besides the offset."""

    def metadata(self, partition: TopicPartition, topic_id: str, *, release: bool) -> str | None:
        """At most 4,096 bytes, JSON with `topic_id` in it; None: the partition must not be committed yet. `release`: it is
        given up by this commit."""

    def want(self, partition: TopicPartition, epoch: int) -> None:
        """It shall be committed."""


class OffsetCommitter:
    """Brings the ledger's offsets to the broker.

    Invariants:
        - Offsets come from the ledger alone, so no commit passes an unfinished record.
        - One commit at a time, so that none is overtaken by an older one.
        - Each offset says of which topic it is, so that it counts for no other one of the same name.
        - Each shows the membership under which its partitions are ours, so the broker takes none of a partition that
          another replica may have by now.
        - A finished record is committed at once, or `interval_s` after the commit before; sooner if much is finished.
        - A failed commit costs repeated work at most, so it never ends the process.
    """

    # More than six parameters: the five parts that meet in a commit, what it carries, and two bounds.
    def __init__(
        self,
        store: OffsetStore,
        ledger: OffsetLedger,
        ownership: Ownership,
        topics: TopicWatch,
        metrics: Metrics,
        custodian: Custodian | None = None,
        *,
        interval_s: float,
        max_uncommitted: int,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._ownership = ownership
        self._topics = topics
        self._metrics = metrics
        self._custodian = custodian
        self._interval_s = interval_s
        self._early_at = max(1, max_uncommitted // _COMMITS_A_SPAN)
        self._finished = 0  # since the last commit
        self._due_at = 0.0
        self._wanted = asyncio.Event()
        self._urgent = asyncio.Event()
        self._committing = asyncio.Lock()

    def note_finished(self, records: int = 1) -> None:
        """So many more may be committable."""
        self._finished += records
        self._wanted.set()
        if self._finished >= self._early_at:
            self._urgent.set()

    def again_soon(self) -> None:
        """The round under way did not do all: another comes after one interval."""
        self._due_at = time.monotonic() + max(self._interval_s, _RETRY_S)
        self._wanted.set()

    def hurry(self) -> None:
        """Somebody waits for the next round."""
        self._wanted.set()
        self._urgent.set()

    async def run(self, after: Callable[[], Awaitable[None]]) -> None:
        """Commit again and again; each round ends with `after`, and most begin with a commit."""
        while True:
            now = time.monotonic()
            if now >= self._due_at or self._urgent.is_set():
                if self._ledger.committable():
                    self._due_at = now + self._interval_s
                # Before the commit: what finishes during it brings the next one forward.
                self._wanted.clear()
                self._urgent.clear()
                await self.commit()
            await after()
            await _wait(self._wanted, _IDLE_S)
            await _wait(self._urgent, min(_IDLE_S, self._due_at - time.monotonic()))

    async def commit(
        self, also: Collection[TopicPartition] = (), *, release: Collection[TopicPartition] = ()
    ) -> bool:
        """Commit what is safe now. False if there is something that the broker did not take.

        `also` are committed even if their offsets did not rise, since what the custodian says of them did change.
        `release` are given up by this commit.
        """
        async with self._committing:
            await self._topics.look_now_and_then()
            self._finished = 0
            offsets, membership = self._due(also, release), self._ownership.membership
            if not offsets:
                return True
            if membership is None:
                return False
            epochs = {partition: self._ledger.epoch(partition) for partition in offsets}
            try:
                async with asyncio.timeout(_COMMIT_S):
                    missing = await self._store.commit(membership, offsets)
            except FENCED:
                # A rebalance is under way, or over and not heard of. What stays ours is committed after it; the rest is
                # repeated by another replica.
                self._metrics.commits.labels("fenced").inc()
                return False
            except (KafkaError, TimeoutError) as error:
                self._metrics.commits.labels("error").inc()
                log.warning("commit_failed", reason=type(error).__name__)
                return False
            self._metrics.commits.labels("error" if missing else "ok").inc()
            if missing:
                log.warning("commit_failed", reason="UnknownTopicOrPartitionError", partitions=len(missing))
            self._ledger.note_committed(
                {
                    partition: its.offset
                    for partition, its in offsets.items()
                    if partition not in missing and self._ledger.epoch(partition) == epochs[partition]
                }
            )
            return not missing

    async def commit_last(self) -> None:
        """Give up everything. In the middle of a rebalance the group takes no commit, so it is sent again for a while."""
        end = time.monotonic() + _LAST_COMMIT_S
        while not await self.commit(release=self._ledger.partitions):
            if self._ownership.membership is None or time.monotonic() > end:
                log.warning("last_commit_failed")
                return
            await asyncio.sleep(_RETRY_S)

    # -- with a transaction --------------------------------------------------------------------------------------------

    def alone(self) -> AbstractAsyncContextManager[None]:
        """No commit of ours inside: the group would take the later of two, and the lower offset may be the later one."""
        return self._committing

    async def sealed(
        self, offsets: Mapping[TopicPartition, int]
    ) -> tuple[Membership, dict[TopicPartition, OffsetAndMetadata]] | None:
        """These offsets as the group takes them from somebody else than us, and what the commit must show.

        None: not now, since a rebalance is under way, the custodian knows nothing of a partition yet, or a topic was made
        anew: what was taken before is known to be of the topic that is there now.

        Raises:
            KafkaError, TimeoutError: the brokers do not say which topics there are.
        """
        membership = self._ownership.membership
        due = {partition: self._stamped(partition, offset) for partition, offset in offsets.items()}
        epochs = {partition: self._ledger.epoch(partition) for partition in offsets}
        found = {partition: its for partition, its in due.items() if its is not None}
        if membership is None or len(found) < len(due):
            return None
        await self._topics.look()
        if any(self._ledger.epoch(partition) != epoch for partition, epoch in epochs.items()):
            return None
        return membership, found

    def note_committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """The group took these from somebody else."""
        self._metrics.commits.labels("ok").inc()
        self._ledger.note_committed(offsets)

    def _due(
        self, also: Collection[TopicPartition], release: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """What to commit. A partition of which the custodian knows nothing yet is left out."""
        offsets = self._ledger.committable()
        for partition in (*also, *release) if self._custodian else ():
            if (safe := self._ledger.safe(partition)) is not None:
                offsets[partition] = safe
        due = {partition: self._stamped(partition, offset, release) for partition, offset in offsets.items()}
        return {partition: its for partition, its in due.items() if its is not None}

    def _stamped(
        self, partition: TopicPartition, offset: int, release: Collection[TopicPartition] = ()
    ) -> OffsetAndMetadata | None:
        """The offset with what the custodian says of its partition; None if that is nothing yet."""
        topic_id = self._ledger.topic_id(partition)
        if self._custodian is None:
            return OffsetAndMetadata(offset, mark(topic_id))
        text = self._custodian.metadata(partition, topic_id, release=partition in release)
        if text is not None:
            return OffsetAndMetadata(offset, text)
        if (epoch := self._ledger.epoch(partition)) is not None:
            self._custodian.want(partition, epoch)
        return None


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """For the event, and so long at most."""
    if seconds <= 0 or event.is_set():
        return
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
