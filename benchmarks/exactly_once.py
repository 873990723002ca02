"""What exactly-once costs: the same bulk backlog, at-least-once and exactly-once in turns, with real inference.

    python -m benchmarks.exactly_once --jobs 2000 --rounds 3

One replica of all-MiniLM-L6-v2 without a cache, on a Kafka of its own, read by a consumer of committed records. It has answered a
first part before the clock starts. Prints a table, writes it as JSON below benchmarks/results, and ends with code 1 if
exactly-once has less than 85 % of the throughput, or answered a job twice.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.crash import job
from benchmarks.machine import write
from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, preload
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.tiny_models import minilm_path

_PARTITIONS = 4
_WARM_UP = 200
_LEAST_SHARE = 0.85
MODES = ("at-least-once", "exactly-once")


async def throughput(stack: DevStack, jobs: int, mode: str, log: Path) -> tuple[float, int]:
    """Jobs a second from the warm-up's last answer to the last one, and how many were answered twice."""
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    replica = Replica(stack, topics, minilm_path(), log, redis=False, bulk_delivery=mode)
    async with replicas(replica), reader(stack, topics.results, committed=True) as results:
        answered = Answered(results)
        warm = await preload(stack, topics.bulk, _WARM_UP, lambda n: job(n) | {"id": f"warm-{n}"})
        await answered.until(warm, within=300)
        started = time.monotonic()
        ids = await preload(stack, topics.bulk, jobs, job)
        await answered.until(ids, within=900)
        return jobs / (time.monotonic() - started), answered.duplicates()


async def compare(stack: DevStack, jobs: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Both modes in turns, so that the machine's moods meet both."""
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    repeated = dict.fromkeys(MODES, 0)
    for turn in range(rounds):
        for mode in MODES if turn % 2 == 0 else MODES[::-1]:
            rate, twice = await throughput(stack, jobs, mode, directory / f"{turn}-{mode}.log")
            rates[mode].append(round(rate, 1))
            repeated[mode] += twice
            print(f"round {turn + 1}, {mode}: {rate:.1f} jobs/s", flush=True)
    return {
        "jobs": jobs,
        "jobs_per_second": rates,
        "repeated": repeated,
        "share": round(_share(rates["exactly-once"], rates["at-least-once"]), 3),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _share(of: Iterable[float], all_: Iterable[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(of, all_, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        found = {
            "model": "all-MiniLM-L6-v2",
            **asyncio.run(compare(stack, options.jobs, options.rounds, Path(directory))),
            "kafka": stack.kafka_description,
        }
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    write("exactly_once", found, "embedq", "torch", "aiokafka")
    return 0 if found["share"] >= _LEAST_SHARE and not found["repeated"]["exactly-once"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
