"""Runs a decoder over many inputs, and notes what nobody documented: exceptions, slow inputs, memory that grows."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import psutil

from tests.fuzz.decoders import Decoder

SLOW_S: Final = 0.5
"""Processor time of one input: a thousand times what it takes, and below what anybody would notice."""
GROWTH_BYTES: Final = 48 * 1024 * 1024
"""Resident memory after the first tenth of the inputs, and at the end: what an allocator may keep, and no leak of a hundred
bytes an input over a million."""
_SHOWN: Final = 300
"""Characters of an input that is shown."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of finding, with its first input: `number` is what the decoder draws it by."""

    kind: str
    where: str
    number: int
    input: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found."""

    inputs: int
    seconds: float
    outcomes: dict[str, int]
    problems: list[Problem]
    times: dict[str, int]
    """How often each problem came, by its kind and place."""
    slowest_s: float
    slowest: int
    growth_bytes: int


def fuzz(
    decoder: Decoder,
    inputs: int,
    *,
    first: int = 0,
    slow_s: float = SLOW_S,
    growth_bytes: int = GROWTH_BYTES,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Hand the inputs from number `first` on to the decoder."""
    outcomes: Counter[str] = Counter()
    times: Counter[str] = Counter()
    problems: dict[str, Problem] = {}
    slowest, slowest_s = first, 0.0
    process = psutil.Process()
    warm = max(1, inputs // 10)
    before = process.memory_info().rss
    started = time.monotonic()

    def note(kind: str, where: str, number: int, given: Any) -> None:
        times[f"{kind} {where}"] += 1
        problems.setdefault(
            f"{kind} {where}", Problem(kind=kind, where=where, number=number, input=repr(given)[:_SHOWN])
        )

    for number in range(first, first + inputs):
        given = decoder.input(number)
        begun = time.thread_time()
        try:
            outcomes[decoder.decode(given)] += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  # any is the finding, a panic of native code too
            outcomes["FINDING"] += 1
            note(type(error).__name__, f"{_place(error)}: {str(error)[:100]}", number, given)
        took = time.thread_time() - begun
        if took > slowest_s:
            slowest, slowest_s = number, took
        if took > slow_s:
            note("slow", f"{took:.2f} s", number, given)
        done = number - first + 1
        if done == warm:
            before = process.memory_info().rss
        if done % 100_000 == 0:
            say(f"{done} inputs, {len(problems)} problems, {done / (time.monotonic() - started):.0f}/s")
    growth = process.memory_info().rss - before
    if growth > growth_bytes:
        note("growth", f"{growth >> 20} MiB", first, None)
    return Outcome(
        inputs=inputs,
        seconds=time.monotonic() - started,
        outcomes=dict(outcomes.most_common()),
        problems=list(problems.values()),
        times=dict(times),
        slowest_s=slowest_s,
        slowest=slowest,
        growth_bytes=growth,
    )


def _place(error: BaseException) -> str:
    """Where it was raised: of our own files the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "embedq_" in frame.filename] or list(frames)
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "?"


def report(name: str, seed: int, found: Outcome) -> str:
    """What a person reads."""
    head = (
        f"{name}: {found.inputs} inputs of seed {seed} in {found.seconds:.0f} s, {len(found.problems)} problems; "
        f"slowest {found.slowest_s * 1000:.1f} ms (number {found.slowest}), memory {found.growth_bytes / 2**20:+.1f} MiB"
    )
    lines = [head, "  " + ", ".join(f"{count} {outcome}" for outcome, count in found.outcomes.items())]
    for problem in found.problems:
        count = found.times[f"{problem.kind} {problem.where}"]
        lines += [
            f"  {problem.kind} at {problem.where}: {count} times, first --only {problem.number}: {problem.input}"
        ]
    return "\n".join(lines)
