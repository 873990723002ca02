"""The checker finds what it is there for: each rule is broken by hand here, and by chance below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import checker, history
from tests.faults.history import (
    Accepted,
    Committed,
    DeadLetter,
    Ended,
    Ends,
    Event,
    Fault,
    HistoryWriter,
    Mode,
    Result,
    Run,
    Worker,
)

JOBS, RESULTS, REPLIES, FRAGILE, DEAD = "t.jobs", "t.results", "t.replies", "t.fragile", "t.dlq"


def run(mode: Mode = "at-least-once", repeats_each: int = 10) -> Run:
    return Run(
        at=0.0,
        seed=1,
        mode=mode,
        kafka="4.1.0",
        model="tiny",
        workers=3,
        once=(JOBS,) if mode == "exactly-once" else (),
        repeats_each=repeats_each,
        slack_s=5.0,
    )


def good(mode: Mode = "at-least-once") -> list[Event]:
    """Four jobs, one bad and one to a client, one result in two parts; a worker is killed, and one job repeated by it unless
    the mode forbids it; all in order."""
    events: list[Event] = [
        run(mode),
        Worker(at=0.1, name="w0", event="started"),
        Accepted(at=1.0, id="a", topic=JOBS, partition=0, offset=0, reply_topic=RESULTS),
        Accepted(at=1.0, id="b", topic=JOBS, partition=0, offset=1, reply_topic=REPLIES, reply_partition=2),
        Accepted(
            at=1.0,
            id="c",
            topic=JOBS,
            partition=0,
            offset=2,
            expects="malformed",
            buried=True,
            reply_topic=RESULTS,
        ),
        Accepted(at=1.0, id="d", topic=JOBS, partition=1, offset=0, reply_topic=RESULTS),
        Result(at=2.0, id="a", topic=RESULTS, partition=0, offset=0, status="ok", cosine=1.0),
        Result(at=2.0, id="b", topic=REPLIES, partition=2, offset=0, status="ok", cosine=0.99995),
        Result(at=2.1, id="c", topic=RESULTS, partition=1, offset=0, status="error", code="malformed"),
        DeadLetter(
            at=2.2,
            topic=DEAD,
            partition=0,
            offset=0,
            origin_topic=JOBS,
            origin_partition=0,
            origin_offset=2,
            code="malformed",
        ),
        Committed(at=2.5, record=3, partition=f"{JOBS}/0", offset=2),
        Ends(at=2.5, ends={f"{RESULTS}/0": 1, f"{RESULTS}/1": 1, f"{REPLIES}/2": 1}),
        Fault(at=3.0, name="kill", target="w0", phase="begin"),
        Worker(at=3.0, name="w0", event="ended", code=-9),
        Fault(at=3.1, name="kill", target="w0", phase="end"),
        Worker(at=3.5, name="w0", event="started"),
        Result(
            at=4.0, id="d", topic=RESULTS, partition=0, offset=1, status="ok", part=0, parts=2, cosine=1.0
        ),
        Result(
            at=4.0, id="d", topic=RESULTS, partition=0, offset=2, status="ok", part=1, parts=2, cosine=1.0
        ),
    ]
    if mode == "at-least-once":
        events.append(Result(at=4.1, id="b", topic=REPLIES, partition=2, offset=1, status="ok", cosine=1.0))
    return [
        *events,
        Committed(at=5.0, record=7, partition=f"{JOBS}/0", offset=3),
        Committed(at=5.0, record=8, partition=f"{JOBS}/1", offset=1),
        Ends(at=5.0, ends={f"{RESULTS}/0": 3, f"{RESULTS}/1": 1, f"{REPLIES}/2": 2, f"{DEAD}/0": 1}),
        Ended(at=6.0, ends={f"{JOBS}/0": 3, f"{JOBS}/1": 1, f"{JOBS}/2": 0}, acknowledged=4),
    ]


def broken(events: Sequence[Event]) -> list[str]:
    """The rules that a history breaks, each once."""
    return list(dict.fromkeys(breach.rule for breach in checker.check(events).breaches))


def change(events: Sequence[Event], which: Callable[[Event], bool], **fields: Any) -> list[Event]:
    """The same with other fields in the events that `which` picks; there must be one."""
    assert any(map(which, events))
    return [msgspec.structs.replace(event, **fields) if which(event) else event for event in events]


def without(events: Sequence[Event], which: Callable[[Event], bool]) -> list[Event]:
    assert any(map(which, events))
    return [event for event in events if not which(event)]


def result_of(id: str, part: int | None = None) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Result) and event.id == id and (part is None or event.part == part)


def is_last_look(event: Event) -> bool:
    return isinstance(event, Ends) and event.at == 5.0


def is_last_commit(event: Event) -> bool:
    return isinstance(event, Committed) and event.record == 7


@pytest.mark.parametrize("mode", ["at-least-once", "exactly-once"])
def test_a_good_history_breaks_nothing(mode: Mode) -> None:
    verdict = checker.check(good(mode))
    assert not verdict.breaches
    assert verdict.numbers["jobs accepted"] == 4
    assert verdict.numbers["result records repeated"] == (1 if mode == "at-least-once" else 0)
    assert verdict.numbers["faults"] == "1 kill"
    assert verdict.numbers["ends of workers"] == "1 × -9"


def test_the_longest_pause_is_from_one_answer_to_the_next_while_a_job_waits() -> None:
    # From c's answer at 2.1 s to d's at 4.0 s: d waited.
    assert checker.longest_pause(checker.History(good())) == pytest.approx(1.9)
    late = Accepted(at=50.0, id="q", topic=JOBS, partition=2, offset=0, reply_topic=RESULTS)
    answer = Result(at=53.5, id="q", topic=RESULTS, partition=3, offset=0, status="ok", cosine=1.0)
    assert checker.longest_pause(checker.History([*good()[:-1], late, answer])) == pytest.approx(3.5)


def test_a_job_without_a_result_is_lost() -> None:
    assert "answered" in broken(without(good(), result_of("a")))


def test_a_job_without_one_of_its_parts_is_lost() -> None:
    assert "answered" in broken(without(good(), result_of("d", part=1)))


def test_parts_of_two_different_splits_do_not_make_a_whole() -> None:
    assert "answered" in broken(change(good(), result_of("d", part=1), parts=3))


def test_a_result_of_nobodys_job_is_found() -> None:
    assert "known" in broken(change(good(), result_of("a"), id="z"))


def test_a_dead_letter_of_nobodys_job_is_found() -> None:
    changed = change(good(), lambda event: isinstance(event, DeadLetter), origin_offset=9)
    assert broken(changed) == ["known", "dead letters only for the guilty"]


def test_an_error_for_a_good_job_is_found() -> None:
    assert broken(change(good(), result_of("a"), status="error", code="internal", cosine=None)) == [
        "as expected"
    ]


def test_a_partial_answer_to_a_good_job_is_found() -> None:
    assert broken(change(good(), result_of("a"), status="partial")) == ["as expected"]


def test_vectors_for_a_bad_job_are_found() -> None:
    assert broken(change(good(), result_of("c"), status="ok", code=None, cosine=1.0)) == ["as expected"]


@pytest.mark.parametrize("wrong", [{"topic": RESULTS}, {"partition": 1}])
def test_an_answer_at_another_address_is_found(wrong: dict[str, Any]) -> None:
    assert "as expected" in broken(change(good(), result_of("b"), **wrong))


@pytest.mark.parametrize("cosine", [None, 0.9998, -1.0])
def test_a_wrong_vector_is_found(cosine: float | None) -> None:
    assert broken(change(good(), result_of("a"), cosine=cosine)) == ["vectors right"]


def test_more_repeats_than_the_faults_explain_are_found() -> None:
    repeats = [
        Result(at=4.2, id="a", topic=RESULTS, partition=3, offset=n, status="ok", cosine=1.0)
        for n in range(50)
    ]
    events = good()
    assert broken([*events[:-1], *repeats, events[-1]]) == ["repeats bounded"]


def test_a_repeat_though_nothing_happened_is_found() -> None:
    events = good()
    late = [
        Result(at=90.0, id="q", topic=RESULTS, partition=3, offset=0, status="ok", cosine=1.0),
        Result(at=91.0, id="q", topic=RESULTS, partition=3, offset=1, status="ok", cosine=1.0),
    ]
    job = Accepted(at=89.0, id="q", topic=JOBS, partition=2, offset=0, reply_topic=RESULTS)
    commit: list[Event] = [
        Committed(at=92.0, record=9, partition=f"{JOBS}/2", offset=1),
        Ends(at=92.0, ends={f"{RESULTS}/3": 2}),
    ]
    end = Ended(at=99.0, ends={f"{JOBS}/2": 1}, acknowledged=5)
    assert broken([*events[:-1], job, *late, *commit, end]) == ["repeats bounded"]
    during = Fault(at=90.5, name="freeze", target="w1", phase="begin")
    assert broken([*events[:-1], job, during, *late, *commit, end]) == []


TWICE = "never twice where once is promised"


def test_any_repeat_is_found_in_exactly_once_mode() -> None:
    assert broken([run("exactly-once"), *good("at-least-once")[1:]]) == [TWICE]


def test_a_repeat_in_a_lane_that_does_not_promise_it_is_none_in_exactly_once_mode() -> None:
    other = msgspec.structs.replace(run("exactly-once"), once=("t.jobs.bulk",))
    assert broken([other, *good("at-least-once")[1:]]) == []


def test_a_repeated_dead_letter_is_found_in_exactly_once_mode() -> None:
    events = good("exactly-once")
    (letter,) = [event for event in events if isinstance(event, DeadLetter)]
    again = msgspec.structs.replace(letter, offset=1)
    assert broken([*events[:-1], again, events[-1]]) == [TWICE]


def test_a_commit_before_the_result_was_in_the_log_is_found() -> None:
    assert broken(change(good(), is_last_look, ends={f"{RESULTS}/0": 3, f"{REPLIES}/2": 2})) == [
        "commits never ahead"
    ]


def test_a_commit_before_the_last_part_was_in_the_log_is_found() -> None:
    ends = {f"{RESULTS}/0": 2, f"{RESULTS}/1": 1, f"{REPLIES}/2": 2, f"{DEAD}/0": 1}
    assert broken(change(good(), is_last_look, ends=ends)) == ["commits never ahead"]


def test_a_commit_after_which_nobody_asked_for_the_ends_is_found() -> None:
    assert broken(without(good(), is_last_look)) == ["whole"]


def test_a_group_log_that_was_read_in_another_order_is_found() -> None:
    assert broken(change(good(), is_last_commit, record=2)) == ["whole"]
    assert broken(change(good(), is_last_commit, record=3)) == ["whole"]


@pytest.mark.parametrize("offset", [1, 0, None])
def test_a_commit_that_goes_back_or_vanishes_is_found(offset: int | None) -> None:
    events = good()
    back: list[Event] = [
        Committed(at=4.5, record=4, partition=f"{JOBS}/0", offset=offset),
        Ends(at=4.5, ends={}),
    ]
    assert broken([*events[:-4], *back, *events[-4:]]) == ["commits never back"]


def test_a_commit_that_goes_back_and_forth_between_two_looks_is_found() -> None:
    """As an onlooker who only asks now and then would not see it."""
    events = good()
    back = [
        Committed(at=4.5, record=4, partition=f"{JOBS}/0", offset=1),
        Committed(at=4.5, record=5, partition=f"{JOBS}/0", offset=2),
    ]
    assert broken([*events[:-4], *back, *events[-4:]]) == ["commits never back"]


def test_one_commit_said_twice_and_one_of_another_partition_go_nowhere_back() -> None:
    events = good()
    again = [
        Committed(at=4.5, record=4, partition=f"{JOBS}/0", offset=2),
        Committed(at=4.5, record=5, partition=f"{JOBS}/1", offset=0),
    ]
    assert broken([*events[:-4], *again, *events[-4:]]) == []


def test_a_partition_that_is_not_committed_to_its_end_is_found() -> None:
    behind = [event for event in good() if not (isinstance(event, Committed) and event.record == 8)]
    assert broken(behind) == ["committed to the end"]


def test_a_dead_letter_for_an_innocent_job_is_found() -> None:
    changed = change(good(), lambda event: isinstance(event, DeadLetter), origin_offset=0)
    assert broken(changed) == ["dead letters only for the guilty"]


def test_a_guilty_job_without_its_dead_letter_is_found() -> None:
    assert broken(without(good(), lambda event: isinstance(event, DeadLetter))) == [
        "dead letters only for the guilty"
    ]


def test_a_job_that_the_brokers_acknowledged_and_lost_is_found() -> None:
    assert broken(change(good(), lambda event: isinstance(event, Ended), acknowledged=5)) == ["whole"]


def test_a_history_that_was_cut_off_is_found() -> None:
    assert "whole" in broken(good()[:-1])
    assert broken(good()[1:]) == ["whole"]
    assert broken([]) == ["whole"]


def fragile(*more: Event) -> list[Event]:
    """Beside the good history: a job to an address that faults may take away, and what became of it."""
    events = good()
    job = Accepted(
        at=1.0,
        id="f",
        topic=JOBS,
        partition=3,
        offset=0,
        reply_topic=FRAGILE,
        reply_partition=0,
        fragile=True,
    )
    commit: list[Event] = [
        Committed(at=5.5, record=9, partition=f"{JOBS}/3", offset=1),
        Ends(at=5.5, ends={f"{RESULTS}/0": 9, f"{DEAD}/0": 9}),
    ]
    return [*events[:-1], job, *more, *commit, Ended(at=6.0, ends={f"{JOBS}/3": 1}, acknowledged=5)]


def test_a_fragile_job_may_be_answered_by_an_error_and_a_dead_letter() -> None:
    error = Result(
        at=5.0, id="f", topic=RESULTS, partition=0, offset=8, status="error", code="invalid_header"
    )
    letter = DeadLetter(
        at=5.0,
        topic=DEAD,
        partition=0,
        offset=8,
        origin_topic=JOBS,
        origin_partition=3,
        origin_offset=0,
        code="undeliverable",
    )
    assert broken(fragile(error, letter)) == []
    assert broken(fragile(letter)) == []


def test_a_fragile_job_may_lose_its_result_with_its_topic_and_with_nothing_else() -> None:
    deleted = [
        Fault(at=3.0, name="topic_deleted", target=FRAGILE, phase="begin"),
        Fault(at=3.5, name="topic_deleted", target=FRAGILE, phase="end"),
    ]
    assert broken(fragile(*deleted)) == []
    other = [msgspec.structs.replace(event, target="another") for event in deleted]
    assert broken(fragile(*other)) == ["answered", "commits never ahead"]
    assert broken(fragile()) == ["answered", "commits never ahead"]


def test_a_topic_that_comes_back_by_itself_is_found() -> None:
    events = good()
    back = Fault(at=4.5, name="topic_came_back", target=FRAGILE, phase="begin")
    assert broken([*events[:-1], back, events[-1]]) == ["no topic by accident"]


def test_a_wrong_vector_for_a_fragile_job_is_found() -> None:
    wrong = Result(at=5.0, id="f", topic=FRAGILE, partition=0, offset=0, status="ok", cosine=0.5)
    assert broken(fragile(wrong)) == ["vectors right"]


# -- by chance -----------------------------------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn, mode: Mode = "at-least-once") -> list[Event]:
    """What a right service leaves behind: jobs on two partitions, results in one or two parts, repeats after kills, commits
    at any time up to the first unanswered job."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    logs: dict[str, int] = {}
    events: list[Event] = [run(mode, repeats_each=1000)]
    offsets: dict[str, int] = {}
    record = 0
    at = 1.0
    for partition, count in enumerate(counts):
        events += [
            Accepted(
                at=at,
                id=f"{partition}-{offset}",
                topic=JOBS,
                partition=partition,
                offset=offset,
                reply_topic=RESULTS,
            )
            for offset in range(count)
        ]

    def answer(partition: int, offset: int) -> None:
        parts = 1 + (partition + offset) % 2
        for part in range(parts):
            to = draw(st.integers(0, 2))
            name = history.place(RESULTS, to)
            events.append(
                Result(
                    at=at,
                    id=f"{partition}-{offset}",
                    topic=RESULTS,
                    partition=to,
                    offset=logs.setdefault(name, 0),
                    status="ok",
                    part=part,
                    parts=parts,
                    cosine=1.0,
                )
            )
            logs[name] += 1

    def commit(partition: int) -> None:
        nonlocal record
        record += draw(st.integers(1, 3))  # other groups' records, and the members', lie between
        name = history.place(JOBS, partition)
        events.append(Committed(at=at, record=record, partition=name, offset=offsets[name]))

    position = [0] * len(counts)
    while any(position[p] < count for p, count in enumerate(counts)):
        at += 1.0
        partition = draw(st.sampled_from([p for p, count in enumerate(counts) if position[p] < count]))
        answer(partition, position[partition])
        position[partition] += 1
        step = draw(st.sampled_from(["", "commit", "kill"] if mode == "at-least-once" else ["", "commit"]))
        if step == "commit":
            offsets[history.place(JOBS, partition)] = position[partition]
            commit(partition)
            events.append(Ends(at=at, ends=dict(logs)))
        elif step == "kill":
            events.append(Worker(at=at, name="w", event="ended", code=-9))
            position[partition] = offsets.get(history.place(JOBS, partition), 0)
            if len(events) > 200:  # not for ever
                break
    for partition, count in enumerate(counts):
        for offset in range(position[partition], count):
            answer(partition, offset)
        offsets[history.place(JOBS, partition)] = count
        commit(partition)
    events.append(Ends(at=at, ends=dict(logs)))
    events.append(Ended(at=at + 2, ends=dict(offsets), acknowledged=sum(counts)))
    return events


@given(histories())
def test_what_a_right_service_leaves_behind_breaks_nothing(events: list[Event]) -> None:
    assert broken(events) == []


@given(histories(mode="exactly-once"), st.data())
def test_in_exactly_once_mode_one_repeat_anywhere_is_found(events: list[Event], data: st.DataObject) -> None:
    results = [event for event in events if isinstance(event, Result)]
    again = msgspec.structs.replace(data.draw(st.sampled_from(results)), offset=10_000)
    where = data.draw(st.integers(1, len(events) - 1))
    assert TWICE in broken([*events[:where], again, *events[where:]])


@given(histories(), st.data())
def test_a_job_whose_every_result_is_lost_is_found(events: list[Event], data: st.DataObject) -> None:
    jobs = [event for event in events if isinstance(event, Accepted)]
    lost = data.draw(st.sampled_from(jobs)).id
    left = [event for event in events if not (isinstance(event, Result) and event.id == lost)]
    assert {"answered", "commits never ahead"} <= set(broken(left))


@given(histories(), st.data())
def test_a_commit_that_comes_before_a_result_below_it_is_found(
    events: list[Event], data: st.DataObject
) -> None:
    """The first answer to a job moves behind the commit that covers it."""
    commits = [event for event in events if isinstance(event, Committed)]
    job = data.draw(st.sampled_from([event for event in events if isinstance(event, Accepted)]))
    name = history.place(job.topic, job.partition)
    covering = next(
        commit for commit in commits if commit.partition == name and (commit.offset or 0) > job.offset
    )
    early = [
        msgspec.structs.replace(event, offset=event.offset + 10_000)
        if isinstance(event, Result) and event.id == job.id
        else event
        for event in events
    ]
    assert checker.check(events).breaches == []
    breaches = [breach for breach in checker.check(early).breaches if breach.rule == "commits never ahead"]
    assert len(breaches) == 1
    assert f"seen at {covering.at:.1f} s" in breaches[0].what


@given(histories(), st.data())
def test_a_commit_that_comes_once_more_behind_a_later_one_is_found(
    events: list[Event], data: st.DataObject
) -> None:
    """What a request does that was on its way for too long."""
    commits = [event for event in events if isinstance(event, Committed)]
    late = data.draw(st.sampled_from(commits))
    later = [
        commit
        for commit in commits
        if commit.partition == late.partition and (commit.offset or 0) > (late.offset or 0)
    ]
    again = msgspec.structs.replace(late, record=commits[-1].record + 1)
    breaches = checker.check([*events[:-2], again, *events[-2:]]).breaches
    assert ("commits never back" in {breach.rule for breach in breaches}) == bool(later)


@given(histories(), st.data())
def test_one_wrong_vector_anywhere_is_found(events: list[Event], data: st.DataObject) -> None:
    index = data.draw(st.sampled_from([n for n, event in enumerate(events) if isinstance(event, Result)]))
    events = list(events)
    events[index] = msgspec.structs.replace(events[index], cosine=data.draw(st.floats(-1, 0.99989)))
    assert broken(events) == ["vectors right"]


# -- as a program --------------------------------------------------------------------------------------------------------


def test_it_reads_what_the_writer_wrote_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = HistoryWriter(tmp_path / "history.jsonl")
    for event in good():
        written.add(event)
    written.close()
    assert list(history.read(written.path)) == good()
    assert checker.main([str(written.path)]) == 0
    said = capsys.readouterr().out
    assert f"sha256:{history.digest(written.path)}" in said
    assert "BROKEN" not in said


def test_it_ends_with_1_and_names_the_job_if_a_rule_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = HistoryWriter(tmp_path / "history.jsonl")
    for event in without(good(), result_of("a")):
        written.add(event)
    written.close()
    assert checker.main([str(written.path)]) == 1
    said = capsys.readouterr().out
    assert "BROKEN 1 times" in said
    assert "job a at t.jobs/0@0: no result" in said


def test_without_a_file_it_says_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main([]) == 2
    assert "FILE" in capsys.readouterr().err
