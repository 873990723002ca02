"""Which partitions are ours, and what we do with each. Pure: events in, decisions out; one owner (`HandOver`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from embedq_consumer.group.assignor import encode_claim
from embedq_shared.kafka import Membership, TopicPartition

Stage = Literal["opening", "reading", "releasing"]
"""From an assignment to the next owner.

- opening: it is ours, and its committed offset is not known yet.
- reading: it gives records.
- releasing: it gives none. It is ours alone until what was taken is answered and committed.
"""

_NO_GENERATION = -1


class Change(msgspec.Struct, frozen=True):
    """What an event did: partitions that came, and those that went without being released."""

    added: frozenset[TopicPartition] = frozenset()
    lost: frozenset[TopicPartition] = frozenset()


class Ownership:
    """Knows the present membership, and the stage of each partition.

    Invariants:
        - A partition that was ours before a rebalance and is after it stays in its stage: what was taken and where we read
          on do not change. One that was to be released and is assigned again is read again.
        - What is ours at a JoinGroup is claimed in it, so nobody else can get it before we have released it.
        - After the last release that an assignment asked for, exactly one rejoin is due; also if a partition was released
          before the assignment arrived.
        - With no membership nothing is ours.
    """

    def __init__(self) -> None:
        self._stages: dict[TopicPartition, Stage] = {}
        self._rejoin_due = False
        self.membership: Membership | None = None
        """What a commit of our partitions must show."""

    # -- what happens -------------------------------------------------------------------------------------------------

    def assigned(
        self,
        membership: Membership,
        partitions: Collection[TopicPartition],
        release: Collection[TopicPartition],
    ) -> Change:
        """A rebalance is over: `partitions` are ours, those of `release` are to be given up."""
        before = self._stages
        self.membership = membership
        self._rejoin_due = bool(release)
        self._stages = {partition: "releasing" for partition in release if partition in before}
        for partition in partitions:
            stage = before.get(partition, "opening")
            self._stages[partition] = "reading" if stage == "releasing" else stage
        return Change(
            added=frozenset(self._stages.keys() - before.keys()),
            lost=frozenset(before.keys() - self._stages.keys()),
        )

    def expelled(self) -> Change:
        """The group knows us no more, and gives what was ours to others."""
        lost = frozenset(self._stages)
        self._stages = {}
        self._rejoin_due = False
        self.membership = None
        return Change(lost=lost)

    def opened(self, partition: TopicPartition) -> None:
        """Its committed offset is known."""
        if self._stages.get(partition) == "opening":
            self._stages[partition] = "reading"

    def reopen(self, partition: TopicPartition) -> None:
        """Its topic is another one than before: where it begins is asked for again, unless it is to be given up anyway."""
        if self._stages.get(partition) == "reading":
            self._stages[partition] = "opening"

    def released(self, partition: TopicPartition) -> None:
        """Nothing of it is left to do."""
        if self._stages.get(partition) != "releasing":
            raise RuntimeError("a partition was released that is not to be. This is a bug.")
        del self._stages[partition]

    def take_rejoin(self) -> bool:
        """Whether the group should be asked for a rebalance now, which this counts as done."""
        due = self._rejoin_due and not self.releasing
        if due:
            self._rejoin_due = False
        return due

    # -- what follows from it -----------------------------------------------------------------------------------------

    def claim(self) -> bytes:
        """Our user data of a JoinGroup."""
        return encode_claim(self.membership.generation if self.membership else _NO_GENERATION, self._stages)

    def stage(self, partition: TopicPartition) -> Stage | None:
        """Of one partition, None if it is not ours."""
        return self._stages.get(partition)

    @property
    def opening(self) -> frozenset[TopicPartition]:
        """Partitions whose committed offset is to be fetched."""
        return self._in("opening")

    @property
    def reading(self) -> frozenset[TopicPartition]:
        """Partitions that give records."""
        return self._in("reading")

    @property
    def releasing(self) -> frozenset[TopicPartition]:
        """Partitions that are to be drained and given up."""
        return self._in("releasing")

    def __len__(self) -> int:
        return len(self._stages)

    def _in(self, stage: Stage) -> frozenset[TopicPartition]:
        return frozenset(partition for partition, its in self._stages.items() if its == stage)
