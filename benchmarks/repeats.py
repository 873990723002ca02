"""Replicas are killed and stopped in turns under load: how many jobs are answered twice, and is any lost?

    python -m benchmarks.repeats --jobs 8000

Two replicas of all-MiniLM-L6-v2 with the service's own bounds, on a Kafka and a Redis of their own. At six points of the
way one of them ends and is started again: by SIGKILL, by SIGTERM, and so on. Prints how many results were second ones by
then (those of a killed replica's jobs come once its session is over), writes the sum as JSON below benchmarks/results, and
ends with code 1 if a job has no result.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.crash import job
from benchmarks.machine import write
from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, preload, until_committed
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.tiny_models import minilm_path

_PARTITIONS = 8
_SESSION_S = 6
_ENDS = ("kill", "stop") * 3


async def repeats(stack: DevStack, jobs: int, directory: Path) -> dict[str, Any]:
    """Run it once; the figures."""
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    pair = [
        Replica(
            stack,
            topics,
            minilm_path(),
            directory / f"{name}.log",
            redis=False,
            replica=name,
            session_timeout_ms=_SESSION_S * 1000,
        )
        for name in ("one", "two")
    ]
    async with replicas(*pair), reader(stack, topics.results) as results:
        answered = Answered(results)
        started = time.monotonic()
        ids = await preload(stack, topics.jobs, jobs, job)
        for number, end in enumerate(_ENDS, 1):
            while len(answered.counts()) < jobs * number // (len(_ENDS) + 1):
                await answered.more(within=600)
            replica = pair[number % 2]
            if end == "kill":
                replica.kill()
                await replica.ended()
            else:
                await replica.stop(120)
            await replica.start()
            print(
                f"after {end} {number}: {answered.duplicates()} of {answered.counts().total()} repeated",
                flush=True,
            )
        await answered.until(ids, within=600)
        ended = time.monotonic()
        await until_committed(stack, topics)
        for replica in pair:
            await replica.stop(120)
        await answered.all()
    counts = answered.counts()
    return {
        "jobs": jobs,
        "lost": len(set(ids) - set(counts)),
        "repeated": answered.duplicates(),
        "seconds": round(ended - started, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=8000)
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        found = {
            "model": "all-MiniLM-L6-v2",
            **asyncio.run(repeats(stack, options.jobs, Path(directory))),
            "kafka": stack.kafka_description,
        }
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    write("repeats", found, "embedq", "torch", "aiokafka")
    return 1 if found["lost"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
