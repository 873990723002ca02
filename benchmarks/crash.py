"""A replica is killed half-way, Redis restarted: is every job answered, and how many twice?

    python -m benchmarks.crash --jobs 20000

Two replicas of all-MiniLM-L6-v2 on a Kafka and a Redis of their own. When half of the jobs are answered, one replica
gets SIGKILL, and Redis is stopped and started. Prints a table, writes it as JSON below benchmarks/results, and ends
with code 1 if a job has no result or more were repeated than the service promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from embedq_sdk.dev import DevStack
from tests.promises import Answered, preload, until_committed
from tests.replicas import Replica, fresh_prefix, make_topics, reader, replicas
from tests.tiny_models import minilm_path

_RESULTS = Path(__file__).parent / "results"
_PARTITIONS = 8
_IN_FLIGHT = 512
_UNCOMMITTED = _IN_FLIGHT // _PARTITIONS
_POLL = 128
_SESSION_S = 6
_WORDS = ("harbour", "bread", "engine", "winter", "music", "market", "forest", "signal", "bridge", "garden")


def job(number: int) -> dict[str, Any]:
    """A sentence of about ten words that no other job has."""
    words = [_WORDS[number // len(_WORDS) ** place % len(_WORDS)] for place in range(4)]
    return {"id": f"job-{number}", "input": f"The {' and the '.join(words)} of day {number}."}


async def crash(stack: DevStack, jobs: int, directory: Path) -> dict[str, Any]:
    """Run it once; the figures."""
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    victim, survivor = (
        Replica(
            stack,
            topics,
            minilm_path(),
            directory / f"{name}.log",
            max_in_flight_jobs=_IN_FLIGHT,
            max_poll_records=_POLL,
            max_uncommitted_jobs=_UNCOMMITTED,
            session_timeout_ms=_SESSION_S * 1000,
        )
        for name in ("victim", "survivor")
    )
    async with replicas(victim, survivor), reader(stack, topics.results) as results:
        answered = Answered(results)
        started = time.monotonic()
        ids = await preload(stack, topics.jobs, jobs, job)
        await answered.some(jobs // 2, within=600)
        before = await victim.metrics()
        victim.kill()
        await victim.ended()
        killed = time.monotonic()
        await asyncio.to_thread(stack.stop_redis)
        await answered.more()
        await asyncio.to_thread(stack.start_redis)
        at_kill = len(answered.counts())
        await answered.until(ids, within=600)
        ended = time.monotonic()
        await until_committed(stack, topics)
        code = await survivor.stop()
        await answered.all()
    counts = answered.counts()
    return {
        "jobs": jobs,
        "answered": len(set(counts) & set(ids)),
        "lost": len(set(ids) - set(counts)),
        "results": counts.total(),
        "duplicates": answered.duplicates(),
        "in_flight_of_the_killed_replica": int(before['embedq_in_flight_jobs{lane="interactive"}']),
        "most_that_may_repeat": _PARTITIONS * _UNCOMMITTED + _POLL,
        "answered_when_killed": at_kill,
        "seconds": round(ended - started, 1),
        "seconds_behind_the_kill": round(ended - killed, 1),
        "session_timeout_s": _SESSION_S,
        "exit_code_of_the_survivor": code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=_RESULTS / "crash.json")
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
        where = {"kafka": stack.kafka_description, "redis": stack.redis_description, "machine": machine}
        figures = asyncio.run(crash(stack, options.jobs, Path(directory)))
    found = {"model": "all-MiniLM-L6-v2", **figures, **where}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if not found["lost"] and found["duplicates"] <= found["most_that_may_repeat"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
