"""Judges a history: was anything lost, repeated beyond the bound, wrong, or committed too early?

    python -m tests.faults.checker FILE

It knows nothing of the harness, reads nothing but the file, and ends with 1 if a rule is broken.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from tests.faults.history import (
    OK,
    Accepted,
    Committed,
    DeadLetter,
    Ended,
    Ends,
    Event,
    Fault,
    Result,
    Run,
    Worker,
    digest,
    place,
    read,
)

LEAST_COSINE: Final = 0.9999
"""What the wire contract promises between two answers to one job."""
_SHOWN: Final = 5
"""Breaches of one rule that are printed; the rest are counted."""
_TOPIC_GONE: Final = "topic_deleted"
"""The fault that takes away what a topic held."""

_CAME_BACK: Final = "topic_came_back"
"""What the harness notes when somebody else made it again."""

Origin = tuple[str, int, int]


class Breach(msgspec.Struct, frozen=True):
    """One place where a rule is broken."""

    rule: str
    what: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a history shows. It is good if there is no breach."""

    breaches: list[Breach]
    numbers: dict[str, int | str]


class History:
    """The events of one history, by what they are about."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.runs: list[Run] = []
        self.jobs: dict[str, Accepted] = {}
        self.twice: list[Accepted] = []
        self.at_origin: dict[Origin, Accepted] = {}
        self.results: dict[str, list[Result]] = defaultdict(list)
        self.letters: dict[Origin, list[DeadLetter]] = defaultdict(list)
        self.commits: list[Committed] = []
        self.looks: list[tuple[list[Committed], Ends]] = []
        """Commits, and the ends that were asked right after they were read."""
        self.unjudged: list[Committed] = []
        """Commits after the last look at the ends."""
        self.faults: list[Fault] = []
        self.workers: list[Worker] = []
        self.ends: list[Ended] = []
        for event in events:
            self._add(event)

    def _add(self, event: Event) -> None:
        match event:
            case Run():
                self.runs.append(event)
            case Accepted():
                if event.id in self.jobs:
                    self.twice.append(event)
                self.jobs[event.id] = event
                self.at_origin[origin_of(event)] = event
            case Result():
                self.results[event.id].append(event)
            case DeadLetter():
                origin = (event.origin_topic, event.origin_partition, event.origin_offset)
                self.letters[origin].append(event)
            case Committed():
                self.commits.append(event)
                self.unjudged.append(event)
            case Ends():
                self.looks.append((self.unjudged, event))
                self.unjudged = []
            case Fault():
                self.faults.append(event)
            case Worker():
                self.workers.append(event)
            case Ended():
                self.ends.append(event)

    @property
    def run(self) -> Run:
        return self.runs[0]

    def letters_of(self, job: Accepted) -> Sequence[DeadLetter]:
        return self.letters.get(origin_of(job), ())

    def repeats(self) -> Iterator[tuple[Result, Result]]:
        """Each result record beyond the first of its job and part, after that first one."""
        for found in self.results.values():
            first: dict[int, Result] = {}
            for result in found:
                if result.part in first:
                    yield first[result.part], result
                else:
                    first[result.part] = result

    def interruptions(self) -> list[tuple[float, float]]:
        """When something was going on that may repeat jobs: from, to."""
        found: list[tuple[float, float]] = []
        begun: dict[tuple[str, str], float] = {}
        for fault in self.faults:
            key = (fault.name, fault.target)
            if fault.phase == "begin":
                begun[key] = fault.at
            elif key in begun:
                found.append((begun.pop(key), fault.at))
        found += [(at, float("inf")) for at in begun.values()]
        return found + [(worker.at, worker.at) for worker in self.workers]

    def gone_topics(self) -> Mapping[str, float]:
        """Topics that were deleted, and when the last deletion was over."""
        return {fault.target: fault.at for fault in self.faults if fault.name == _TOPIC_GONE}


def origin_of(job: Accepted) -> Origin:
    return job.topic, job.partition, job.offset


# -- rules ---------------------------------------------------------------------------------------------------------------

Rule = Callable[[History], Iterator[str]]


def whole(history: History) -> Iterator[str]:
    """The history has its first and last line, and the brokers kept each job that they acknowledged."""
    if len(history.runs) != 1 or len(history.ends) != 1:
        yield f"{len(history.runs)} beginnings and {len(history.ends)} ends, expected one of each"
        return
    for job in history.twice:
        yield f"job {job.id} lies in the log twice: the harness must give each attempt an id of its own"
    if len(history.jobs) < history.ends[0].acknowledged:
        yield f"{history.ends[0].acknowledged} jobs acknowledged, only {len(history.jobs)} in the log"
    if history.unjudged:
        yield f"{len(history.unjudged)} commits after which nobody asked for the ends"
    for before, after in pairwise(history.commits):
        if after.record <= before.record:
            yield f"the group's record {after.record} at {after.at:.1f} s comes after {before.record}"


def answered(history: History) -> Iterator[str]:
    """Every accepted job has its result, with every part; only a topic that was deleted may take results with it."""
    gone = history.gone_topics()
    for job in history.jobs.values():
        results = history.results.get(job.id, ())
        if is_complete(results):
            continue
        if job.fragile and (history.letters_of(job) or job.at <= gone.get(job.reply_topic, -1.0)):
            continue
        parts = (
            f"{len({result.part for result in results})} of {results[0].parts} parts"
            if results
            else "no result"
        )
        yield f"job {job.id} at {job.topic}/{job.partition}@{job.offset}: {parts}"


def known(history: History) -> Iterator[str]:
    """Every result and every dead letter tells of a job that was accepted."""
    for id, results in history.results.items():
        if id not in history.jobs:
            yield f"{len(results)} results for {id}, which nobody sent"
    for origin in history.letters:
        if origin not in history.at_origin:
            yield f"a dead letter for {origin[0]}/{origin[1]}@{origin[2]}, where no job lies"


def as_expected(history: History) -> Iterator[str]:
    """Good jobs get vectors and bad ones their error, each at the address that it named."""
    for job, result in _pairs(history):
        if job.fragile and result.status == "error":
            continue  # its address may be gone
        said = result.code or result.status
        if said != job.expects:
            yield f"job {job.id}: expected {job.expects}, got {said} at {result.topic}/{result.partition}@{result.offset}"
        elif result.topic != job.reply_topic or job.reply_partition not in (None, result.partition):
            wanted = f"{job.reply_topic}/{'any' if job.reply_partition is None else job.reply_partition}"
            yield f"job {job.id}: answered at {result.topic}/{result.partition} instead of {wanted}"


def vectors_right(history: History) -> Iterator[str]:
    """Every vector is what the model that its result names gives for that text."""
    for job, result in _pairs(history):
        if result.status != OK:
            continue
        if result.cosine is None or not result.cosine >= LEAST_COSINE:
            yield f"job {job.id}: cosine {result.cosine} by {result.model_version}"


def never_twice(history: History) -> Iterator[str]:
    """Jobs of the topics that promise it are answered once, and dead-lettered once."""
    once = history.run.once
    for first, again in history.repeats():
        if (job := history.jobs.get(again.id)) is not None and job.topic in once:
            yield f"job {again.id} part {again.part}: at {_at(first)} and again at {_at(again)}"
    for (topic, partition, offset), letters in history.letters.items():
        if len(letters) > 1 and topic in once:
            yield f"{len(letters)} dead letters for {topic}/{partition}@{offset}"


def repeats_bounded(history: History) -> Iterator[str]:
    """Each fault repeats a bounded number of jobs, and without a fault nothing is repeated."""
    repeats = list(history.repeats())
    interruptions = history.interruptions()
    most = history.run.repeats_each * len(interruptions)
    if len(repeats) > most:
        yield f"{len(repeats)} results repeated, through {len(interruptions)} faults and starts at most {most}"
    for first, again in repeats:
        if not any(
            begin <= again.at and first.at <= end + history.run.slack_s for begin, end in interruptions
        ):
            yield f"job {again.id} part {again.part}: answered again at {again.at:.1f} s, though nothing happened"


def never_ahead(history: History) -> Iterator[str]:
    """A commit covers only jobs whose result, every part of it, or dead letter was in the log before."""
    waiting = _by_partition(history.jobs.values())
    for commits, look in history.looks:
        for commit in commits:
            jobs = waiting.get(commit.partition, [])
            while jobs and commit.offset is not None and jobs[-1].offset < commit.offset:
                job = jobs.pop()
                if not _covered(history, job, look.ends):
                    yield (
                        f"job {job.id} at {commit.partition}@{job.offset} was committed ({commit.offset}, "
                        f"seen at {commit.at:.1f} s) before its result was in the log"
                    )


def never_back(history: History) -> Iterator[str]:
    """The group's offsets only rise, in the order in which Kafka keeps them."""
    newest: dict[str, int] = {}
    for commit in history.commits:
        before = newest.pop(commit.partition, None)
        if before is not None and (commit.offset is None or commit.offset < before):
            said = "nothing" if commit.offset is None else commit.offset
            yield f"{commit.partition}: {before}, then {said} at {commit.at:.1f} s (record {commit.record})"
        if commit.offset is not None:
            newest[commit.partition] = commit.offset


def committed_to_the_end(history: History) -> Iterator[str]:
    """When all is answered, nothing is left to be read again."""
    if not history.ends:
        return
    last = {commit.partition: commit.offset for commit in history.commits}
    for partition, end in history.ends[0].ends.items():
        if end and last.get(partition) != end:
            yield f"{partition}: committed {last.get(partition)}, ends at {end}"


def no_topic_by_accident(history: History) -> Iterator[str]:
    """A topic that was deleted is made again by nobody but its owner."""
    for fault in history.faults:
        if fault.name == _CAME_BACK:
            yield f"{fault.target} was there again at {fault.at:.1f} s"


def only_the_guilty(history: History) -> Iterator[str]:
    """Dead letters are for records that no result can answer, and each of those has one."""
    for job in history.jobs.values():
        letters = history.letters_of(job)
        if letters and not job.buried and not job.fragile:
            yield f"job {job.id} is among the dead letters ({letters[0].code}), and is guilty of nothing"
        elif job.buried and not letters:
            yield f"job {job.id} ({job.expects}) has no dead letter"


RULES: Final[dict[str, Rule]] = {
    "whole": whole,
    "answered": answered,
    "known": known,
    "as expected": as_expected,
    "vectors right": vectors_right,
    "never twice where once is promised": never_twice,
    "repeats bounded": repeats_bounded,
    "commits never ahead": never_ahead,
    "commits never back": never_back,
    "committed to the end": committed_to_the_end,
    "dead letters only for the guilty": only_the_guilty,
    "no topic by accident": no_topic_by_accident,
}


def check(events: Iterable[Event]) -> Verdict:
    """Hold a history against every rule."""
    history = History(events)
    if len(history.runs) != 1:  # the other rules need it
        return Verdict(breaches=[Breach("whole", said) for said in whole(history)], numbers={})
    breaches = [Breach(name, said) for name, rule in RULES.items() for said in rule(history)]
    return Verdict(breaches=breaches, numbers=_numbers(history))


def is_complete(results: Sequence[Result]) -> bool:
    """Whether these hold each part of one answer."""
    parts: dict[int, set[int]] = defaultdict(set)
    for result in results:
        parts[result.parts].add(result.part)
    return any(found >= set(range(count)) for count, found in parts.items())


def _covered(history: History, job: Accepted, ends: Mapping[str, int]) -> bool:
    below = [
        result
        for result in history.results.get(job.id, ())
        if result.offset < ends.get(place(result.topic, result.partition), 0)
    ]
    if is_complete(below):
        return True
    if not job.fragile:
        return False
    # What its topic held may have been deleted with it, and offsets began anew.
    return bool(
        history.letters_of(job) or history.results.get(job.id) or job.reply_topic in history.gone_topics()
    )


def _pairs(history: History) -> Iterator[tuple[Accepted, Result]]:
    for id, results in history.results.items():
        if (job := history.jobs.get(id)) is not None:
            for result in results:
                yield job, result


def _by_partition(jobs: Iterable[Accepted]) -> dict[str, list[Accepted]]:
    """Highest offset first, so that the lowest is popped first."""
    found: dict[str, list[Accepted]] = defaultdict(list)
    for job in jobs:
        found[place(job.topic, job.partition)].append(job)
    for each in found.values():
        each.sort(key=lambda job: job.offset, reverse=True)
    return found


def _at(result: Result) -> str:
    return f"{result.topic}/{result.partition}@{result.offset}"


def _numbers(history: History) -> dict[str, int | str]:
    repeated = Counter(again.id for _, again in history.repeats())
    unanswered = sum(1 for job in history.jobs.values() if not is_complete(history.results.get(job.id, ())))
    faults = Counter(fault.name for fault in history.faults if fault.phase == "begin")
    ended = Counter(str(worker.code) for worker in history.workers if worker.event == "ended")
    return {
        "mode": history.run.mode,
        "seed": history.run.seed,
        "kafka": history.run.kafka,
        "model": history.run.model,
        "seconds": round(history.ends[0].at) if history.ends else "unknown",
        "jobs accepted": len(history.jobs),
        "jobs without a whole result": unanswered,
        "result records": sum(map(len, history.results.values())),
        "result records repeated": repeated.total(),
        "jobs repeated": len(repeated),
        "dead letters": sum(map(len, history.letters.values())),
        "commits seen": len(history.commits),
        "longest time without an answer": f"{longest_pause(history):.1f} s",
        "faults": ", ".join(f"{count} {name}" for name, count in sorted(faults.items())) or "none",
        "ends of workers": ", ".join(f"{count} × {code}" for code, count in sorted(ended.items())) or "none",
    }


def longest_pause(history: History) -> float:
    """Seconds from one result to the next while jobs waited, at most."""
    seen: list[tuple[float, int]] = [(job.at, 1) for job in history.jobs.values()]
    answered: set[str] = set()
    for result in sorted((each for found in history.results.values() for each in found), key=lambda r: r.at):
        seen.append((result.at, 0 if result.id in answered else -1))
        answered.add(result.id)
    longest, waiting, since = 0.0, 0, 0.0
    for at, change in sorted(seen):
        if change == 1:
            since = at if waiting == 0 else since
        elif waiting:
            longest, since = max(longest, at - since), at
        waiting += change
    return longest


def report(path: Path, verdict: Verdict) -> str:
    """What a person reads."""
    lines = [f"{name:<36} {value}" for name, value in verdict.numbers.items()]
    lines.append(f"{'digest':<36} sha256:{digest(path)}")
    for rule in RULES:
        found = [breach for breach in verdict.breaches if breach.rule == rule]
        lines.append(f"{rule:<36} {'holds' if not found else f'BROKEN {len(found)} times'}")
        lines += [f"    {breach.what}" for breach in found[:_SHOWN]]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Judge one file: 0 if every rule holds, 1 if not, 2 for a wrong call."""
    if len(arguments) != 1:
        print("usage: python -m tests.faults.checker FILE", file=sys.stderr)  # noqa: T201
        return 2
    path = Path(arguments[0])
    verdict = check(read(path))
    print(report(path, verdict))  # noqa: T201
    return 1 if verdict.breaches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
