"""Which records of one `publish` are sent again, alone or never. Pure: outcomes and time are arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_shared.kafka import (
    TOO_LARGE,
    InvalidTopicError,
    KafkaError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

REFUSALS: Final = (
    *TOO_LARGE,
    TopicAuthorizationFailedError,
    InvalidTopicError,
    UnknownTopicOrPartitionError,
)
"""What the broker says about the record itself: sending it again cannot help."""

MAX_BATCH_BYTES: Final = 1_000_000
"""Of the records that the producer sends to a partition at once."""
ATTEMPT_S: Final = 20.0
"""The longest single try. The brokers' own time-out is shorter, so that a longer one means a lost connection."""
LEAST_ATTEMPT_S: Final = 0.2
"""A try just before the deadline still gets this much time."""


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """What one try means for the records and the producer.

    `reason` is one of the failures, None if there was none: a producer that failed must be replaced. `unknown_topics`
    are topics that the broker does not have. `overdue` says that the deadline is over.
    """

    acknowledged: list[int]
    unknown_topics: set[str]
    reason: BaseException | None
    overdue: bool


class SendRound:
    """What has become of the records of one `publish`, which are named by their index.

    Invariants:

    - A record is pending, acknowledged or refused; only pending ones are sent, in order.
    - A record is refused for a reason in `REFUSALS` alone. Every other failure leaves it pending.
    - A small record that the broker calls too large is sent once more, alone, before it is refused: the broker judges
      the size of a batch, not of a record.
    - The deadline is `timeout_s` after the last try that settled a record, or after the beginning.
    """

    def __init__(self, records: Sequence[Outgoing], *, timeout_s: float, now: float) -> None:
        self._records = records
        self._timeout_s = timeout_s
        self._deadline = now + timeout_s
        self._alone: set[int] = set()
        self.pending: Sequence[int] = range(len(records))
        self.outcomes: list[KafkaError | None] = [None] * len(records)
        """For each record None, or why the broker will never take it; valid once nothing is pending."""

    def is_alone(self, index: int) -> bool:
        """Whether this record must share no batch with others."""
        return index in self._alone

    def attempt_s(self, now: float) -> float:
        """The seconds that the next try may take."""
        return min(ATTEMPT_S, max(LEAST_ATTEMPT_S, self._deadline - now))

    def tried(self, failures: Mapping[int, BaseException], now: float) -> Tried:
        """Every pending record was tried, and these failed."""
        acknowledged = [index for index in self.pending if index not in failures]
        again: list[int] = []
        unknown_topics: set[str] = set()
        reason: BaseException | None = None
        for index in [index for index in self.pending if index in failures]:
            reason = error = failures[index]
            if isinstance(error, UnknownTopicOrPartitionError):
                unknown_topics.add(self._records[index].topic)
            if isinstance(error, TOO_LARGE) and index not in self._alone and self._may_share(index):
                self._alone.add(index)
                again.append(index)
            elif isinstance(error, REFUSALS):
                self.outcomes[index] = error
            else:
                again.append(index)
        if len(again) < len(self.pending):
            self._deadline = now + self._timeout_s
        self.pending = again
        return Tried(
            acknowledged=acknowledged,
            unknown_topics=unknown_topics,
            reason=reason,
            overdue=now > self._deadline,
        )

    def _may_share(self, index: int) -> bool:
        """Whether a batch that held this record may have been refused because of others."""
        record = self._records[index]
        return len(record.value or b"") + len(record.key or b"") < MAX_BATCH_BYTES
