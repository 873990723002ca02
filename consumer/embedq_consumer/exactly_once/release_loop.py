"""The loop that publishes what is due, again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from embedq_consumer.exactly_once.held_results import Held, HeldResults, Release
from embedq_consumer.exactly_once.transactions import Transactions
from embedq_shared.backoff import backoff
from embedq_shared.kafka import KafkaError
from embedq_shared.kafka.transactions import Generation

_MAX_BYTES: Final = 16 * 1024 * 1024
"""Of one transaction: readers wait for its end, and an aborted one is sent again."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0

Mend = Callable[[Held, Sequence[KafkaError | None]], Held]
"""An answer that the brokers take, in place of one with records that they refuse."""


class ReleaseLoop:
    """Holds complete answers and publishes them with their offsets, `interval_s` after the first at the earliest.

    Invariants:
        - One transaction at a time; its answers are concluded only once it is known to be committed.
        - Release and member are taken in the same step: offsets of a partition that is lost after it are fenced.
    """

    def __init__(
        self,
        held: HeldResults,
        transactions: Transactions,
        member: Callable[[], Generation | None],
        mend: Mend,
        conclude: Callable[[Sequence[Held]], None],
        *,
        interval_s: float,
    ) -> None:
        self._held = held
        self._transactions = transactions
        self._member = member
        self._mend = mend
        self._conclude = conclude
        self._interval_s = interval_s
        self._changed = asyncio.Event()

    def hold(self, answers: Sequence[Held]) -> None:
        """These are complete."""
        self._held.hold(answers)
        self._changed.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        failures = 0
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._interval_s)
            self._changed.clear()
            while (release := self._next()) is not None:
                failures = 0 if await self._publish(*release) else failures + 1
                if failures:
                    await asyncio.sleep(
                        backoff(failures - 1, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
                    )

    def _next(self) -> tuple[Release, Generation | None] | None:
        self._conclude(self._held.take_lost())
        release = self._held.release(_MAX_BYTES)
        return None if release is None else (release, self._member())

    async def _publish(self, release: Release, member: Generation | None) -> bool:
        """One transaction; False if it is to be tried again after a pause."""
        if member is None:
            return False  # a rebalance is under way
        records = [record for answer in release.answers for record in answer.records]
        attempt = await self._transactions.publish(records, release.offsets, member)
        committed = attempt.outcome == "committed"
        if attempt.outcome == "in_doubt":
            committed = await self._resolved()
        if committed:
            self._held.published(release)
            self._conclude(release.answers)
            return True
        if attempt.outcome == "refused":
            self._held.hold(self._mended(release, attempt.reasons))
            return True
        return False

    async def _resolved(self) -> bool:
        tries = 0
        while (committed := await self._transactions.resolve()) is None:
            await asyncio.sleep(backoff(tries, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
            tries += 1
        return committed

    def _mended(self, release: Release, reasons: Sequence[KafkaError | None]) -> list[Held]:
        found = []
        rest = iter(reasons)
        for answer in release.answers:
            of_answer = [next(rest) for _ in answer.records]
            if any(reason is not None for reason in of_answer):
                found.append(self._mend(answer, of_answer))
        return found
