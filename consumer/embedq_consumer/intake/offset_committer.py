"""Commits what is safe to commit, again and again, and measures the lag."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, Protocol

import structlog

from embedq_consumer.intake.jobs_consumer import JobsConsumer
from embedq_consumer.intake.offsets import OffsetLedger
from embedq_consumer.intake.poll_state import PollState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import CommitFailedError, IllegalStateError, KafkaError, TopicPartition, read_commits

log = structlog.get_logger()

_COMMIT_S: Final = 10.0
"""A broker that takes longer than this for a commit is in trouble, and the next commit holds all of this one."""
_COMMITS_A_SPAN: Final = 4
"""A commit comes early once a quarter of the records that may stay uncommitted is finished."""


class Custodian(Protocol):
    """Says of each partition what its commits shall carry besides the offset."""

    def metadata(self, partition: TopicPartition, *, release: bool) -> str | None:
        """At most 4,096 bytes; None: the partition must not be committed yet. `release`: it is given up by this commit."""

    def want(self, partition: TopicPartition, epoch: int) -> None:
        """It shall be committed."""


class OffsetCommitter:
    """Brings the ledger's offsets to the broker.

    Invariants:
        - Offsets come from the ledger alone, so no commit passes an unfinished record.
        - One commit at a time, so that none is overtaken by an older one.
        - The loop commits nothing during a rebalance; the revocation itself commits once, while the partitions are ours.
        - A failed commit costs repeated work at most, so it never ends the process.
    """

    def __init__(
        self,
        consumer: JobsConsumer,
        ledger: OffsetLedger,
        metrics: Metrics,
        custodian: Custodian,
        *,
        interval_s: float,
        max_uncommitted: int,
    ) -> None:
        self._custodian = custodian
        self._consumer = consumer
        self._ledger = ledger
        self._metrics = metrics
        self._interval_s = interval_s
        self._early_at = max(1, max_uncommitted // _COMMITS_A_SPAN)
        self._finished = 0  # since the last commit
        self._early = asyncio.Event()
        self._committing = asyncio.Lock()

    def note_finished(self) -> None:
        """One more record may be committable."""
        self._finished += 1
        if self._finished >= self._early_at:
            self._early.set()

    async def run(self, state: PollState, committed: Callable[[], None]) -> None:
        """Commit each interval, or earlier if much is finished. `committed` is called after each."""
        while True:
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._early.wait()
            except TimeoutError:
                pass
            self._early.clear()  # before the commit: what finishes during it may bring the next one forward
            if not state.rebalancing:
                await self.commit()
                committed()
            if not state.rebalancing:  # one may have begun meanwhile
                self._measure()

    async def commit(
        self,
        also: Collection[TopicPartition] = (),
        *,
        release: Collection[TopicPartition] = (),
        allowed: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Commit what is safe now. True if the brokers took it, or if there was nothing.

        `also` are committed even if their offsets did not rise, since what the custodian says of them did change.
        `release` are given up. `allowed` is asked when the commit before is over: the partitions may be another's by then.
        """
        async with self._committing:
            if not allowed():
                return False
            self._finished = 0
            epoch = self._ledger.epoch
            texts, offsets = self._due(also, release)
            if not offsets:
                return True
            try:
                async with asyncio.timeout(_COMMIT_S):
                    await self._consumer.commit(
                        {partition: (offset, texts[partition]) for partition, offset in offsets.items()}
                    )
            except (CommitFailedError, IllegalStateError):
                # The partitions belong to another replica, which repeats the work.
                self._metrics.commits.labels("fenced").inc()
            except (KafkaError, TimeoutError) as error:
                self._metrics.commits.labels("error").inc()
                log.warning("commit_failed", reason=type(error).__name__)
            else:
                self._metrics.commits.labels("ok").inc()
                if epoch == self._ledger.epoch:
                    self._ledger.note_committed(offsets)
                return True
            return False

    def _due(
        self, also: Collection[TopicPartition], release: Collection[TopicPartition]
    ) -> tuple[dict[TopicPartition, str], dict[TopicPartition, int]]:
        """What to commit, as texts and offsets. A partition of which the custodian knows nothing yet is left out."""
        offsets = self._ledger.committable()
        for partition in (*also, *release):
            if (safe := self._ledger.safe(partition)) is not None:
                offsets[partition] = safe
        texts = {}
        for partition in list(offsets):
            text = self._custodian.metadata(partition, release=partition in release)
            if text is not None:
                texts[partition] = text
                continue
            del offsets[partition]
            if partition not in release:
                self._custodian.want(partition, self._ledger.epoch)
        return texts, offsets

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """These belong to another replica, which measures their lag from now on."""
        for partition in partitions:
            self._metrics.lag.labels(partition.topic, partition.partition).set(0)

    def _measure(self) -> None:
        for partition in self._ledger.partitions:
            end = self._consumer.highwater(partition)
            done = self._ledger.committed(partition)
            if end is not None and done is not None:
                self._metrics.lag.labels(partition.topic, partition.partition).set(max(0, end - done))


class GroupCommits:
    """The group's commits, for the one who says what they carry (the `Custodian`)."""

    def __init__(
        self, consumer: JobsConsumer, ledger: OffsetLedger, committer: OffsetCommitter, state: PollState
    ) -> None:
        self._consumer = consumer
        self._ledger = ledger
        self._committer = committer
        self._state = state

    def is_current(self, partition: TopicPartition, epoch: int) -> bool:
        """Whether the partition is still assigned as it was in that epoch."""
        return self._ledger.is_current(partition, epoch)

    async def write(self, partitions: Collection[TopicPartition]) -> bool:
        """Commit these now, whether their offsets rose or not. True if the brokers took it."""
        return await self._committer.commit(partitions, allowed=lambda: self._state.may_commit)

    async def read(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, tuple[int | None, str]]:
        """The stored offset of each partition and the text that came with it.

        Raises:
            KafkaError: what the brokers say.
        """
        return await read_commits(self._consumer, partitions)

    async def ends(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions end.

        Raises:
            KafkaError: what the brokers say.
        """
        return await self._consumer.end_offsets(partitions)
