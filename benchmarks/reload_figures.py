"""What the events of a reload say: how long no micro-batch ran, what the trial took, and who waited. Pure; times are seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """One micro-batch, as the service logs it: from when the device was free for it until its vectors were on the host."""

    begin: float
    end: float
    tokens: int
    texts: int
    version: str

    @property
    def seconds(self) -> float:
        """For how long it ran."""
        return self.end - self.begin


class Call(NamedTuple):
    """One call of a client: when it was made, how long it took, and which model answered."""

    sent: float
    seconds: float
    version: str


class Spans(NamedTuple):
    """A reload: its command, the status after its swap, and the one that said READY."""

    command: float
    swap: float
    ready: float


def at(event: Mapping[str, Any]) -> float:
    """When something was logged, as `time.time()`."""
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def micro_batches(events: Iterable[Mapping[str, Any]]) -> list[MicroBatch]:
    """Of a service's log, by their end."""
    found = [
        MicroBatch(end - event["seconds"], end, event["tokens"], event["texts"], event["model_version"])
        for event in events
        if event["event"] == "micro_batch"
        for end in [at(event)]
    ]
    return sorted(found, key=lambda batch: batch.end)


def figures(batches: Sequence[MicroBatch], spans: Spans, quiet_s: float) -> dict[str, Any]:
    """What one reload did to the device: seconds, and tokens a second.

    The old model's last micro-batch and the first one after it of another model that is not on trial are its pause. `quiet_s` are
    the seconds before its command in which nothing else went on.
    """
    old = serving_before(batches, spans.command)
    before = [b for b in batches if b.version == old and spans.command - quiet_s <= b.end <= spans.command]
    during = [b for b in batches if spans.command < b.end and b.begin < spans.ready + 1]
    last_old = max(b.end for b in (*before, *during) if b.version == old)
    ours = [b for b in batches if b.version != old and b.begin >= max(spans.command, last_old)]
    # Where the slot was empty, what stood trial before the swap ran after the old model's last one, too.
    served = [b for b in ours if b.end > spans.swap]
    first_new = min(served, key=lambda b: b.begin)
    trial = [b for b in during if b.version != old and b.end <= spans.swap and b.begin < first_new.begin]
    serving = [b for b in during if b.version == old] + [b for b in served if b.begin < spans.ready + 1]
    ends = [spans.command, *sorted(b.end for b in serving)]
    usual = half_of_the_time([b.seconds for b in before])
    return {
        "micro_batch_s": usual,
        "pause_s": first_new.begin - last_old,
        "beyond_a_micro_batch_s": first_new.begin - last_old - usual,
        "longest_without_an_answer_s": max((b - a for a, b in pairwise(ends)), default=0.0),
        "trial_micro_batches": len(trial),
        "trial_s": sum(b.seconds for b in trial),
        "tokens_per_s_before": rate(before, spans.command - quiet_s, spans.command),
        "tokens_per_s_during": rate(serving, spans.command, last_old),
        "swapped_at": first_new.begin,
    }


def serving_before(batches: Sequence[MicroBatch], when: float) -> str:
    """The version whose micro-batch was the last one to end before."""
    return max((b for b in batches if b.end <= when), key=lambda b: b.end).version


def rate(batches: Iterable[MicroBatch], begin: float, end: float) -> float:
    """Tokens a second of those that ended within the span."""
    return sum(b.tokens for b in batches if begin < b.end <= end) / max(1e-9, end - begin)


def half_of_the_time(seconds: Sequence[float]) -> float:
    """The length of micro-batch at whose half the device's time is: many short ones between long ones count for what they take."""
    ordered = np.sort(np.array(seconds))
    if not len(ordered):
        return float("nan")
    share = np.cumsum(ordered) / ordered.sum()
    return float(ordered[np.searchsorted(share, 0.5)])


def latency(calls: Iterable[Call], begin: float, end: float) -> dict[str, float]:
    """Milliseconds of the calls that were made within the span."""
    taken = [call.seconds * 1000 for call in calls if begin <= call.sent < end]
    if not taken:
        return {"calls": 0}
    p50, p99 = np.percentile(taken, [50, 99]).tolist()
    return {
        "calls": len(taken),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(max(taken), 1),
    }


def steps(statuses: Sequence[Mapping[str, Any]], command_id: str, command: float) -> dict[str, float]:
    """Seconds of each step of a command, by its name, and of all of them (`ready`); from the statuses' own times.

    The time before the first status is `noticed`.
    """
    found: dict[str, float] = {}
    name, since = "noticed", command
    for status in statuses:
        if status["command_id"] == command_id and status["step"] != name:
            now = status["at"] / 1000
            found[name] = round(found.get(name, 0.0) + now - since, 3)
            name, since = status["step"], now
    found["ready"] = round(since - command, 3)
    return found


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """p50 and the most."""
    return {"p50": round(float(np.median(numbers)), 4), "max": round(max(numbers), 4)}
