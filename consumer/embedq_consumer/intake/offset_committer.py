"""Commits what is safe to commit, again and again, and measures the lag."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from embedq_consumer.intake.jobs_consumer import JobsConsumer
from embedq_consumer.intake.offsets import OffsetLedger
from embedq_consumer.intake.poll_state import PollState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import CommitFailedError, IllegalStateError, KafkaError, TopicPartition

log = structlog.get_logger()

_COMMIT_S: Final = 10.0
"""A broker that takes longer than this for a commit is in trouble, and the next commit holds all of this one."""
_COMMITS_A_SPAN: Final = 4
"""A commit comes early once a quarter of the records that may stay uncommitted is finished."""


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
        *,
        interval_s: float,
        max_uncommitted: int,
    ) -> None:
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

    async def commit(self) -> None:
        """Commit what is safe now."""
        async with self._committing:
            self._finished = 0
            offsets, epoch = self._ledger.committable(), self._ledger.epoch
            if not offsets:
                return
            try:
                async with asyncio.timeout(_COMMIT_S):
                    await self._consumer.commit(offsets)
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
