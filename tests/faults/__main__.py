"""The long mix: `python -m tests.faults --jobs 200000 --seed 7 --mode at-least-once`, which is `make faults`.

Prints the seed, the faults as they come, and what the checker says of the history; ends with 1 if a rule is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.machine import machine
from tests.faults import checker, history, load
from tests.faults.reference import expected
from tests.faults.run import EVERYTHING, Harness, Plan
from tests.faults.schedule import TRANSACTIONAL
from tests.helpers.cluster import Cluster
from tests.helpers.small_disk import small_disk
from tests.helpers.tiny_models import make_tiny_bert, minilm_path

_DISK_MIB: Final = 1024
_DISK_MIB_A_JOB: Final = 1 / 128
"""Of the broker whose disk is filled: more than a long run writes. A job and its results take 3 KB, internal topics included."""


def main() -> int:
    """One run and its judgment."""
    options = _options()
    seed = options.seed if options.seed is not None else random.randrange(10**9)
    directory = Path(options.out or tempfile.mkdtemp(prefix="embedq-faults-")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        seed=seed,
        jobs=options.jobs,
        mode=options.mode,
        faults=tuple(options.faults.split(",")) if options.faults else _everything(options.mode),
        workers=options.workers,
        texts=options.texts,
        window=options.window,
        longest_s=options.longest,
        gaps=options.gaps,
        settle_s=options.settle,
        settings=dict(pair.split("=", 1) for pair in options.set),
    )
    _say(f"seed {seed}, {plan.jobs} jobs, {plan.mode}, in {directory}")
    return asyncio.run(_run(plan, options.model, directory, chosen=bool(options.faults)))


async def _run(plan: Plan, model: str, directory: Path, *, chosen: bool) -> int:
    """`chosen`: the plan's faults are those that somebody asked for, and no others are to come."""
    models = await asyncio.to_thread(_models, model, directory)
    vectors = await asyncio.to_thread(expected, models, load.texts(plan.seed, plan.texts), directory)
    with small_disk(directory / "small-disk", mib=_DISK_MIB + int(plan.jobs * _DISK_MIB_A_JOB)) as disk:
        if disk is None:
            _say("no small disk can be mounted here: no broker's disk will be full")
        elif not chosen:
            plan = msgspec.structs.replace(plan, faults=(*plan.faults, "broker_disk_full"))
        cluster = Cluster(min_insync=2, disks={2: disk} if disk else {})
        await asyncio.to_thread(cluster.start)
        try:
            harness = Harness(plan, cluster, models, vectors, directory, say=_say)
            try:
                path = await harness.run()
            except* AssertionError as group:  # what is missing, the checker says in more detail
                _say(f"the run did not settle: {group.exceptions[0]}")
                path = harness.history.path
        finally:
            await asyncio.to_thread(cluster.close)
    verdict = checker.check(history.read(path))
    _say(checker.report(path, verdict))
    _write(directory / "verdict.json", plan, path, verdict)
    return 1 if verdict.breaches else 0


def _everything(mode: str) -> tuple[str, ...]:
    return (*EVERYTHING, *sorted(TRANSACTIONAL)) if mode == "exactly-once" else EVERYTHING


def _write(file: Path, plan: Plan, path: Path, verdict: checker.Verdict) -> None:
    """What a closing note needs: the plan, the numbers, which rules are broken how often, and the history's digest."""
    document = {
        "command": " ".join(["python", "-m", "tests.faults", *sys.argv[1:]]),
        "machine": machine("embedq", "torch", "aiokafka"),
        "plan": msgspec.to_builtins(plan),
        "numbers": verdict.numbers,
        "broken": Counter(breach.rule for breach in verdict.breaches),
        "history": f"sha256:{history.digest(path)}",
    }
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _models(name: str, directory: Path) -> list[Path]:
    """The model that serves, and the one that reloads change to and back from."""
    if name == "minilm":
        return [minilm_path()]
    return [
        make_tiny_bert(directory / "models" / each, seed=seed, max_tokens=512)
        for seed, each in enumerate(("a", "b"), start=1)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, help="what draws jobs and faults; a random one if not given")
    parser.add_argument("--mode", choices=["at-least-once", "exactly-once"], default="at-least-once")
    parser.add_argument("--faults", default="", help=f"separated by commas, of: {','.join(EVERYTHING)}")
    parser.add_argument("--model", choices=["tiny", "minilm"], default="tiny")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--texts", type=int, default=400, help="different texts that jobs are made of")
    parser.add_argument("--window", type=int, default=2000, help="jobs without an answer, at most")
    parser.add_argument(
        "--longest", type=float, help="seconds after which no job is sent, whatever --jobs says"
    )
    parser.add_argument(
        "--gaps",
        type=float,
        default=1.0,
        help="how many times longer than usual the times between faults are",
    )
    parser.add_argument(
        "--settle", type=float, default=240.0, help="seconds that the rest may take without faults"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a worker's setting")
    parser.add_argument("--out", help="directory of logs and history; a temporary one if not given")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
