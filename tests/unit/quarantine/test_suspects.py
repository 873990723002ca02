"""Which records may run: by example, and in a small world where processes die of records, of operators, and of bad luck."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_consumer.group import OffsetLedger, Ticket
from embedq_consumer.intake.records import Record
from embedq_consumer.quarantine.custody import Claimant, Custody, decode, encode, has_died, take_over
from embedq_consumer.quarantine.suspects import Polled, Step, Suspects
from embedq_shared.kafka import TopicPartition

A, B = TopicPartition("t.jobs", 0), TopicPartition("t.jobs", 1)
ME = Claimant(owner="me", replica="me", span=10)


def polled(offsets: Iterable[int], partition: TopicPartition = A, epoch: int = 1) -> list[Polled]:
    return [
        Polled(
            Record(
                ticket=Ticket(partition, epoch, offset),
                lane="interactive",
                key=None,
                value=b"{}",
                headers=(),
                timestamp_ms=0,
                timestamp_type=0,
                polled_at=0.0,
            )
        )
        for offset in offsets
    ]


def offsets(found: Iterable[Polled]) -> list[int]:
    return [one.offset for one in found]


def claim(suspects: Suspects, partition: TopicPartition = A, **suspicion: int) -> None:
    custody = msgspec.structs.replace(Custody(owner="me", replica="me", span=10), **suspicion)
    suspects.claim(partition, suspects.unclaimed()[partition], custody)


def do(suspects: Suspects, now: float = 0.0) -> Step:
    """The next step, and its marks are committed."""
    step = suspects.next(now)
    assert step is not None
    suspects.committed(step.marks)
    for one in step.run:
        suspects.started(one.record.ticket)
    return step


def finish(suspects: Suspects, found: Iterable[Polled]) -> None:
    for one in found:
        suspects.finish(one.record.ticket)


def test_records_wait_until_the_commits_name_their_owner() -> None:
    suspects = Suspects(ME)
    assert suspects.take(polled([1, 2]))[0] == []
    assert suspects.unclaimed() == {A: 1}
    assert suspects.metadata(A, release=False) is None
    claim(suspects)
    step = suspects.next(0.0)
    assert step is not None
    assert (list(step.marks), offsets(step.run)) == ([A], [1, 2])
    assert decode(suspects.metadata(A, release=False) or "").owner == "me"
    assert suspects.take(polled([3]))[0] == [], "the mark is not committed yet"
    suspects.committed(step.marks)
    assert offsets(do(suspects).run) == [3]
    assert offsets(suspects.take(polled([4, 5]))[0]) == [4, 5]
    assert suspects.next(0.0) is None


def test_after_one_death_records_run_in_groups_and_those_of_other_partitions_go_on() -> None:
    suspects = Suspects(ME, group=4)
    suspects.take(polled(range(10)))
    suspects.take(polled([0], B))
    claim(suspects, careful_until=6, careful_left=100)
    claim(suspects, B)
    first = do(suspects)
    assert offsets(first.run) == [0, 0, 1, 2, 3]
    assert first.marks[A].trial_until == 4
    assert not first.marks[A].alone
    assert suspects.next(0.0) is None
    assert offsets(suspects.take(polled([1], B))[0]) == [1]
    finish(suspects, first.run)
    second = do(suspects)
    assert offsets(second.run) == [4, 5], "the suspects end here"
    finish(suspects, second.run)
    rest = do(suspects)
    assert offsets(rest.run) == [6, 7, 8, 9]
    assert rest.marks[A] == Custody(owner="me", replica="me", span=10)


def test_a_group_that_survives_is_followed_by_one_of_twice_its_size() -> None:
    suspects = Suspects(ME, group=2)
    suspects.take(polled(range(2000)))
    claim(suspects, careful_until=2000, careful_left=2000)
    sizes = []
    while (step := do(suspects)).marks[A].trial_until:
        sizes.append(len(step.run))
        finish(suspects, step.run)
    assert sizes == [2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 466]


def test_no_more_records_are_suspects_than_the_dead_process_may_have_read() -> None:
    suspects = Suspects(ME, group=4)
    suspects.take(polled(range(10)))
    claim(suspects, careful_until=1000, careful_left=6)
    runs = []
    for _ in range(3):
        step = do(suspects)
        runs.append(offsets(step.run))
        finish(suspects, step.run)
    assert runs == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_after_two_deaths_a_record_runs_with_nothing_else_on_the_device() -> None:
    suspects = Suspects(ME)
    suspects.take(polled([0], B))
    claim(suspects, B)
    running = do(suspects).run
    suspects.take(polled(range(3)))
    claim(suspects, alone_until=2)
    assert do(suspects).run == [], "another record runs"
    assert suspects.take(polled([1], B))[0] == [], "others wait"
    finish(suspects, running)
    for offset in (0, 1):
        step = do(suspects)
        assert offsets(step.run) == [offset]
        assert step.marks[A].alone
        assert step.marks[A].trial_until == offset + 1
        assert suspects.next(0.0) is None
        finish(suspects, step.run)
    rest = do(suspects)
    assert sorted(offsets(rest.run)) == [1, 2]
    assert rest.marks[A] == Custody(owner="me", replica="me", span=10), (
        "nothing else runs before that is known"
    )


def test_a_record_that_is_answered_twice_counts_once() -> None:
    suspects = Suspects(ME)
    suspects.take(polled([0, 1], B))
    claim(suspects, B)
    running = do(suspects).run
    suspects.take(polled([7]))
    claim(suspects, alone_until=9)
    finish(suspects, [running[0], running[0]])
    assert do(suspects).run == [], "the other one still runs"
    finish(suspects, running)
    assert offsets(do(suspects).run) == [7]


def test_others_get_a_turn_between_suspects_that_take_long() -> None:
    suspects = Suspects(ME, burst_s=1.0)
    suspects.take(polled(range(9)))
    claim(suspects, alone_until=9)
    suspects.take(polled([0], B))
    claim(suspects, B)
    first = do(suspects, 0.0).run
    finish(suspects, first)
    second = do(suspects, 0.9).run
    finish(suspects, second)
    others = do(suspects, 1.1)
    assert offsets(others.run) == [0]
    assert not others.marks[A].alone
    assert suspects.take(polled([1], B))[0] == []
    assert suspects.next(1.2) is None
    finish(suspects, others.run)
    assert [*offsets(first), *offsets(second), *offsets(do(suspects, 1.3).run)] == [0, 1, 2]


def test_suspects_of_one_death_have_their_turn_with_the_others() -> None:
    suspects = Suspects(ME, group=2, burst_s=1.0)
    suspects.take(polled(range(9)))
    claim(suspects, alone_until=9, careful_until=9, careful_left=9)
    suspects.take(polled(range(5), B))
    claim(suspects, B, careful_until=5, careful_left=5)
    finish(suspects, do(suspects, 0.0).run)
    turn = do(suspects, 1.1)
    assert [(one.record.ticket.partition, one.offset) for one in turn.run] == [(B, 0), (B, 1)]
    assert (turn.marks[B].trial_until, turn.marks[B].alone, turn.marks[A].trial_until) == (2, False, 0)
    assert suspects.next(1.2) is None
    finish(suspects, turn.run)
    assert do(suspects, 1.3).marks[A].alone


def test_a_condemned_record_is_not_run_and_the_partition_waits_until_it_is_dead_lettered() -> None:
    suspects = Suspects(ME)
    suspects.take(polled([7, 8]))
    claim(suspects, condemned_until=8)
    step = do(suspects)
    [(record, _)] = step.condemned
    assert record.ticket.offset == 7
    assert step.run == []
    assert suspects.next(0.0) is None
    suspects.finish(record.ticket)
    assert offsets(do(suspects).run) == [8]


def test_records_of_a_partition_that_was_given_up_are_dropped() -> None:
    suspects = Suspects(ME)
    suspects.take(polled([1, 2]))
    suspects.take(polled([5], B))
    assert offsets(suspects.drop_stale(lambda partition, epoch: partition == B)) == [1, 2]
    assert suspects.unclaimed() == {B: 1}
    suspects.take(polled([5], B, epoch=2))
    assert offsets(suspects.drop_stale(lambda partition, epoch: epoch == 2)) == [5]
    assert suspects.unclaimed() == {B: 2}


def test_a_claim_that_was_read_before_a_rebalance_is_not_used_after_it() -> None:
    suspects = Suspects(ME)
    suspects.take(polled([1]))
    suspects.take(polled([1], epoch=2))
    suspects.claim(A, 1, Custody(owner="me"))
    assert suspects.unclaimed() == {A: 2}


def test_after_a_partition_is_given_up_nothing_of_it_begins_and_its_commits_name_nobody() -> None:
    suspects = Suspects(ME, group=1)
    suspects.take(polled([1, 2]))
    claim(suspects, careful_until=9, careful_left=9)
    finish(suspects, do(suspects).run)
    released = decode(suspects.metadata(A, release=True) or "")
    assert (released.owner, released.trial_until, released.careful_until) == ("", 0, 9)
    assert suspects.metadata(A, release=False) == encode(released)
    assert suspects.take(polled([3]))[0] == []
    step = suspects.next(0.0)
    assert step is None or step.run == []


def test_a_partition_without_records_is_committed_once_it_is_known() -> None:
    suspects = Suspects(ME)
    suspects.want(A, 1)
    assert suspects.unclaimed() == {A: 1}
    claim(suspects)
    assert list(do(suspects).marks) == [A]
    assert suspects.metadata(A, release=False) is not None


def test_partitions_with_suspects_are_counted() -> None:
    suspects = Suspects(ME)
    suspects.take(polled([1]))
    suspects.take(polled([1], B))
    claim(suspects, careful_until=9, careful_left=9)
    claim(suspects, B)
    assert suspects.suspected == 1


# -- a world of its own ---------------------------------------------------------------------------------------------------


class Died(Exception):
    """The process ends here."""


class World:
    """What outlives a process: partitions with records, and what the group has committed."""

    def __init__(self, sizes: dict[TopicPartition, int], killers: set[tuple[TopicPartition, int]]) -> None:
        self.sizes = sizes
        self.killers = killers
        self.commits: dict[TopicPartition, tuple[int, str]] = {}
        self.answered: set[tuple[TopicPartition, int]] = set()
        self.condemned: dict[tuple[TopicPartition, int], int] = {}
        self.died_alone: Counter[tuple[TopicPartition, int]] = Counter()
        self.lives = 0

    @property
    def done(self) -> bool:
        return all(self.commits.get(partition, (0, ""))[0] >= size for partition, size in self.sizes.items())


class Process:
    """One life: it polls, commits and runs records in any order, until something kills it."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        world.lives += 1
        self.claimant = Claimant(owner=f"life-{world.lives}", replica="r", span=12)
        self.suspects = Suspects(self.claimant, group=4, burst_s=2.0)
        self.ledger = OffsetLedger()
        for partition in world.sizes:
            self.ledger.add(partition, world.commits.get(partition, (None, ""))[0])
        self.waiting: list[Record] = []
        self.running: list[Record] = []
        self.now = 0.0

    def live(self, *, patience: int) -> None:
        """Until everything is done; an operator's SIGKILL comes after `patience` turns."""
        for _ in range(patience):
            if self.world.done:
                return
            self.turn()
        raise Died

    def turn(self) -> None:
        self.now += 0.3
        self.chance.choice([*[self.poll, self.step, self.start, self.answer] * 2, self.commit])()

    def poll(self) -> None:
        for partition, size in self.world.sizes.items():
            start = self.ledger.position(partition)
            if start is None:
                start = self.world.commits.get(partition, (0, ""))[0]
            if start - self.world.commits.get(partition, (0, ""))[0] >= 8:
                continue
            found = [Polled(one.record) for one in polled(range(start, min(size, start + 4)), partition)]
            for one in found:
                self.ledger.begin(partition, one.offset)
            self.waiting += [one.record for one in self.suspects.take(found)[0]]

    def start(self) -> None:
        """Clients take turns: in any order."""
        if self.waiting and self.suspects.may_start:
            self.hand_over([self.waiting.pop(self.chance.randrange(len(self.waiting)))])

    def step(self) -> None:
        for partition, epoch in self.suspects.unclaimed().items():
            committed, text = self.world.commits.get(partition, (0, ""))
            before = decode(text)
            end = self.world.sizes[partition]
            custody = take_over(before, committed, end, claimant=self.claimant, now_ms=0)
            if has_died(before, self.claimant) and before.alone and before.trial_until > committed:
                self.world.died_alone[partition, committed] += 1
            self.suspects.claim(partition, epoch, custody)
        step = self.suspects.next(self.now, waiting=bool(self.waiting))
        if step is None:
            return
        self.commit(*step.marks)
        self.suspects.committed(step.marks)
        self.waiting += [one.record for one in step.run[: step.free]]
        self.hand_over(one.record for one in step.run[step.free :])
        if step.others:
            self.hand_over(self.waiting)
            self.waiting = []
        for record, deaths in step.condemned:
            place = (record.ticket.partition, record.ticket.offset)
            self.world.condemned[place] = len(deaths)
            self.finish(record)

    def hand_over(self, found: Iterable[Record]) -> None:
        for started in found:
            self.running.append(started)
            self.suspects.started(started.ticket)
        custodies = {partition: decode(text) for partition, (_, text) in self.world.commits.items()}
        alone = [
            partition
            for partition, custody in custodies.items()
            if custody.owner == self.claimant.owner
            and custody.alone
            and custody.trial_until > self.world.commits[partition][0]
        ]
        for record in self.running:
            assert custodies[record.ticket.partition].owner == self.claimant.owner, "it works unnamed"
        assert not alone or len(self.running) <= 1, "it is not alone"

    def answer(self) -> None:
        if not self.running:
            return
        record = self.running.pop(self.chance.randrange(len(self.running)))
        if (record.ticket.partition, record.ticket.offset) in self.world.killers:
            raise Died
        self.finish(record)

    def finish(self, record: Record) -> None:
        self.world.answered.add((record.ticket.partition, record.ticket.offset))
        self.ledger.finish(
            Ticket(
                record.ticket.partition, self.ledger.epoch(record.ticket.partition) or 0, record.ticket.offset
            )
        )
        self.suspects.finish(record.ticket)

    def commit(self, *also: TopicPartition) -> None:
        due = self.ledger.committable()
        for partition in also:
            due[partition] = self.ledger.safe(partition) or 0
        for partition, offset in due.items():
            if (text := self.suspects.metadata(partition, release=False)) is not None:
                self.world.commits[partition] = (offset, text)
                self.ledger.note_committed({partition: offset})


def play(world: World, chance: random.Random, *, kills: int) -> None:
    """Processes one after the other, of which an operator kills the first `kills` at any time."""
    while not world.done:
        assert world.lives < 200, "it does not end"
        try:
            Process(world, chance).live(patience=chance.randrange(60) if world.lives < kills else 10_000)
        except Died:
            continue


PLACES = st.tuples(st.sampled_from([A, B]), st.integers(0, 29))


@settings(deadline=None, max_examples=60)
@given(st.sets(PLACES, max_size=4), st.integers(0, 2**32))
def test_killers_are_condemned_by_their_fourth_death_and_nobody_else_is(
    killers: set[tuple[TopicPartition, int]], seed: int
) -> None:
    world = World({A: 30, B: 30}, killers)
    play(world, random.Random(seed), kills=0)
    assert set(world.condemned) == killers
    assert all(deaths >= 4 for deaths in world.condemned.values())
    assert world.lives <= 4 * len(killers) + 1
    assert world.answered == {(partition, offset) for partition in (A, B) for offset in range(30)}


@settings(deadline=None, max_examples=60)
@given(st.sets(PLACES, max_size=2), st.integers(0, 2**32), st.integers(0, 30))
def test_whatever_else_kills_processes_no_record_is_condemned_that_did_not_die_alone_twice(
    killers: set[tuple[TopicPartition, int]], seed: int, kills: int
) -> None:
    world = World({A: 30, B: 30}, killers)
    play(world, random.Random(seed), kills=kills)
    died_twice = {place for place, deaths in world.died_alone.items() if deaths >= 2}
    assert killers <= set(world.condemned) <= died_twice
    assert world.answered == {(partition, offset) for partition in (A, B) for offset in range(30)}


@pytest.mark.parametrize("kills", [5, 50])
def test_killed_again_and_again_before_it_has_read_anything_it_suspects_nobody(kills: int) -> None:
    world = World({A: 5}, set())
    for _ in range(kills):
        process = Process(world, random.Random(1))
        process.poll()
    play(world, random.Random(1), kills=0)
    assert world.condemned == {}
