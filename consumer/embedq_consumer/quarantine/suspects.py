"""Which polled records may be worked on now: most at once, suspects in small groups or alone. Pure, one owner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from embedq_consumer.group import Ticket
from embedq_consumer.intake.records import Death, Record
from embedq_consumer.quarantine.custody import Claimant, Custody, acquitted, encode
from embedq_shared.kafka import TopicPartition

GROUP: Final = 32
"""Suspects that run together, of all partitions: few enough that running each of them alone takes half a second, many enough
that the first hundreds, which were started first most likely, take little time."""
_MOST_GROUP: Final = 512
"""Each group that survives is followed by one of twice its size, up to this: so the thirty thousand records which a dead process
may have read are some seventy groups. Running each of so many alone takes ten seconds, and is asked for by a second death only."""
BURST_S: Final = 0.5
"""How long suspects may run one after the other before what waits for them gets its turn."""


class Polled(msgspec.Struct, frozen=True):
    """A record of a poll, and why it could not be read, if it could not."""

    record: Record
    unread: str | None = None

    @property
    def offset(self) -> int:
        """Its place in its partition."""
        return self.record.ticket.offset


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What to do next: commit `marks` (as `Suspects.metadata` says them); once the brokers have them, hand over `run`, and
    `condemned` with their history. The first `free` of `run` are no suspects: they wait for their turn. With `others`, what
    waits for its turn gets one.
    """

    marks: Mapping[TopicPartition, Custody]
    run: Sequence[Polled] = ()
    free: int = 0
    others: bool = False
    condemned: Sequence[tuple[Record, tuple[Death, ...]]] = ()


class _Case:
    """One partition in one assignment."""

    __slots__ = ("alone", "clear", "custody", "dirty", "epoch", "held", "on_trial", "released")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.custody: Custody | None = None  # what the commits say is not known yet
        self.clear = False  # no suspects
        self.dirty = False  # what `custody` says is not committed yet
        self.alone = False  # the commits may say that one of its records runs alone
        self.held: deque[Polled] = deque()
        self.on_trial: set[int] = set()
        self.released = False  # given up: nothing more begins

    @property
    def is_free(self) -> bool:
        """Whether its records may run at once."""
        return self.clear and not self.dirty and not self.held and not self.released

    def change(self, custody: Custody) -> None:
        self.custody = custody
        self.clear = custody == acquitted(custody)
        self.dirty = True


class Suspects:
    """Holds records back until the commits say who works on them, and suspects until it is their turn. What it lets through
    waits, unless it is a suspect, until clients' turns have it started.

    Invariants:
        - No record of a partition is worked on before a commit that names this process as its owner.
        - Suspects of a partition run in the order of their offsets, and the records after them wait.
        - While a suspect runs alone, nothing else that was started is unfinished, of any partition, and nothing may start.
        - A trial begins once the brokers have its mark, and nothing else of its partition (of any, if it is alone) begins
          before they have the mark that it is over.
        - Records that wait for suspects that run alone get a turn each `burst_s`.
    """

    def __init__(self, claimant: Claimant, *, group: int = GROUP, burst_s: float = BURST_S) -> None:
        self.claimant = claimant
        self._least_group = group
        self._group_size = group
        self._burst_s = burst_s
        self._cases: dict[TopicPartition, _Case] = {}
        self._stale: list[Polled] = []
        self._started: set[Ticket] = set()  # and not answered
        self._shut = False  # a suspect has to run alone
        self._burst_ends: float | None = None

    # -- what happens -------------------------------------------------------------------------------------------------

    def take(self, polled: Iterable[Polled]) -> tuple[list[Polled], bool]:
        """Records of a poll, in order. Returned are those that may be worked on at once, and whether others are held."""
        at_once: list[Polled] = []
        held = False
        for each in polled:
            case = self._case(each.record.ticket)
            if case.is_free and not self._shut:
                at_once.append(each)
            else:
                case.held.append(each)
                held = True
        return at_once, held

    def all_free(self, records: Iterable[Record]) -> bool:
        """Whether all these of a poll may be worked on at once: the usual case, in which they need not be looked at singly."""
        if self._shut:
            return False
        partition: TopicPartition | None = None
        for record in records:
            ticket = record.ticket
            if ticket.partition is not partition:
                if not self._case(ticket).is_free:
                    return False
                partition = ticket.partition
        return True

    def started(self, ticket: Ticket) -> None:
        """Work on a record that was let through begins."""
        self._started.add(ticket)

    def finish(self, ticket: Ticket) -> bool:
        """A record that was started is answered: it survived. True if that may let others run.

        A second time, or of one that is still held (the intake may give up a record at any time), changes nothing.
        """
        self._started.discard(ticket)
        case = self._cases.get(ticket.partition)
        if case is None or case.epoch != ticket.epoch or ticket.offset not in case.on_trial:
            return self._shut and not self._started
        case.on_trial.remove(ticket.offset)
        if not case.on_trial and case.custody is not None:
            case.change(msgspec.structs.replace(case.custody, trial_until=0, alone=False))
        return True

    def want(self, partition: TopicPartition, epoch: int) -> None:
        """The partition's offset shall be committed, though none of its records came."""
        self._case(Ticket(partition, epoch, -1))

    def claim(self, partition: TopicPartition, epoch: int, custody: Custody) -> None:
        """What the commits said of a partition, taken over. Nothing if it was assigned anew since they were read."""
        case = self._cases.get(partition)
        if case is not None and case.epoch == epoch:
            case.change(custody)

    def committed(self, marks: Mapping[TopicPartition, Custody]) -> None:
        """The brokers have these."""
        for partition, custody in marks.items():
            case = self._cases.get(partition)
            if case is not None and case.custody is custody:
                case.dirty = False
                case.alone = custody.alone

    def drop_stale(self, is_current: Callable[[TopicPartition, int], bool]) -> list[Polled]:
        """Forget partitions that were given up. Returned are their records that were held: another replica has them."""
        for partition, case in list(self._cases.items()):
            if not is_current(partition, case.epoch):
                self._stale += case.held
                del self._cases[partition]
        stale, self._stale = self._stale, []
        return stale

    # -- what follows from it -----------------------------------------------------------------------------------------

    def unclaimed(self) -> dict[TopicPartition, int]:
        """Partitions of which it is not known what their commits say, and their epochs."""
        return {partition: case.epoch for partition, case in self._cases.items() if case.custody is None}

    def pending(self, marks: Mapping[TopicPartition, Custody]) -> list[TopicPartition]:
        """The partitions of a step that are still as they were then."""
        return [
            partition
            for partition, custody in marks.items()
            if (case := self._cases.get(partition)) is not None and case.custody is custody
        ]

    def metadata(self, partition: TopicPartition, topic_id: str = "", *, release: bool) -> str | None:
        """What a commit of this partition says besides the offset; None: it must not be committed yet.

        `release`: the partition is given up, for good: what is held of it stays held.
        """
        case = self._cases.get(partition)
        if case is None or case.custody is None:
            return None
        case.released = case.released or release
        return encode(case.custody.released() if case.released else case.custody, topic_id)

    @property
    def suspected(self) -> int:
        """Partitions with suspects."""
        return sum(case.custody is not None and not case.clear for case in self._cases.values())

    @property
    def may_start(self) -> bool:
        """Whether records that were let through and wait may be started."""
        return not self._shut and not any(case.alone for case in self._cases.values())

    def next(self, now: float, *, waiting: bool = False) -> Step | None:
        """What to do at `now` (seconds of any monotonic clock); None: wait for what is under way. `waiting`: records that were
        let through wait for their turn."""
        condemned = list(self._condemned())
        free, trial, others = ([], [], False) if condemned else self._chosen(now, waiting=waiting)
        marks = {
            partition: case.custody
            for partition, case in self._cases.items()
            if case.dirty and case.custody is not None
        }
        if not (marks or free or trial or condemned or others):
            return None
        return Step(marks=marks, run=[*free, *trial], free=len(free), others=others, condemned=condemned)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _case(self, ticket: Ticket) -> _Case:
        case = self._cases.get(ticket.partition)
        if case is None or case.epoch != ticket.epoch:
            if case is not None:
                self._stale += case.held
            case = self._cases[ticket.partition] = _Case(ticket.epoch)
        return case

    def _known(self) -> Iterator[tuple[_Case, Custody]]:
        """The partitions whose commits are known and that hold records, judged by the first of these."""
        for case in self._cases.values():
            if case.held and case.custody is not None and not case.released:
                self._judge(case)
                yield case, case.custody

    def _judge(self, case: _Case) -> None:
        """Suspicion ends with the last record that it is about."""
        custody = case.custody
        if custody is None or case.clear or not case.held or case.on_trial:
            return
        if not custody.has_suspects(case.held[0].offset):
            case.change(acquitted(custody))

    def _condemned(self) -> Iterator[tuple[Record, tuple[Death, ...]]]:
        for case, custody in self._known():
            while case.held and case.held[0].offset < custody.condemned_until:
                condemned = case.held.popleft()
                case.on_trial.add(condemned.offset)  # the partition waits until it is among the dead letters
                yield condemned.record, custody.deaths

    def _chosen(self, now: float, *, waiting: bool) -> tuple[list[Polled], list[Polled], bool]:
        """Those that are free, suspects whose trial begins, and whether what waits gets a turn."""
        if any(case.custody is not None and case.custody.alone for case in self._cases.values()):
            return [], [], False
        heads = [case for case, custody in self._known() if case.held[0].offset < custody.alone_until]
        self._shut = bool(heads)
        if not heads:
            self._burst_ends = None
            return self._freed(), self._group(), False
        if self._started:
            return [], [], False
        if self._burst_ends is not None and now >= self._burst_ends:
            self._burst_ends = None
            free, trial = self._freed(), self._group()
            if free or trial or waiting:
                return free, trial, True
        if self._burst_ends is None:
            self._burst_ends = now + self._burst_s
        return [], self._on_trial(heads[0], 1, alone=True), False

    def _freed(self) -> list[Polled]:
        """Held records of partitions without suspects."""
        found: list[Polled] = []
        for case, _ in self._known():
            if case.clear:
                found += case.held
                case.held.clear()
        return found

    def _group(self) -> list[Polled]:
        """The next suspects that run together; none while some do."""
        if any(case.on_trial for case in self._cases.values()):
            return []
        cases = [
            case
            for case, custody in self._known()
            if custody.alone_until <= case.held[0].offset and custody.has_suspects(case.held[0].offset)
        ]
        if not cases:
            if not self.suspected:
                self._group_size = self._least_group
            return []
        share = max(1, self._group_size // len(cases))
        chosen = [one for case in cases[: self._group_size] for one in self._on_trial(case, share)]
        self._group_size = min(2 * self._group_size, max(_MOST_GROUP, self._least_group))
        return chosen

    def _on_trial(self, case: _Case, most: int, *, alone: bool = False) -> list[Polled]:
        """Take the next suspects of a partition, at most so many, and mark them."""
        custody = case.custody
        if custody is None:
            raise RuntimeError("a partition is tried before its commits are known. This is a bug.")
        until = custody.alone_until if alone else custody.careful_until
        most = most if alone else min(most, custody.careful_left)
        chosen: list[Polled] = []
        while case.held and len(chosen) < most and case.held[0].offset < until:
            chosen.append(case.held.popleft())
        case.on_trial = {one.offset for one in chosen}
        case.alone = case.alone or alone
        left = custody.careful_left if alone else max(0, custody.careful_left - len(chosen))
        case.change(
            msgspec.structs.replace(
                custody, careful_left=left, trial_until=chosen[-1].offset + 1, alone=alone
            )
        )
        return chosen
