"""A replica is killed half-way, Redis restarted: is every job answered, and how many twice?

    python -m benchmarks.crash --jobs 20000                 # the service's own bounds
    python -m benchmarks.crash --jobs 20000 --in-flight 512  # tighter ones

Two replicas of all-MiniLM-L6-v2 on a Kafka and a Redis of their own. When half of the jobs are answered, one replica
gets SIGKILL, and Redis is stopped and started. Prints a table, writes it as JSON below benchmarks/results, and ends
with code 1 if a job has no result or more were repeated than the service promises.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from embedq_consumer.settings import Settings
from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, preload, until_committed
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.tiny_models import minilm_path

_PARTITIONS = 8
_SESSION_S = 6
_WORDS = ("harbour", "bread", "engine", "winter", "music", "market", "forest", "signal", "bridge", "garden")


def job(number: int) -> dict[str, Any]:
    """A sentence of about ten words that no other job has."""
    words = [_WORDS[number // len(_WORDS) ** place % len(_WORDS)] for place in range(4)]
    return {"id": f"job-{number}", "input": f"The {' and the '.join(words)} of day {number}."}


def bounds(in_flight: int | None) -> tuple[dict[str, Any], int]:
    """Settings, and how many records one killed replica may have taken and not committed under them."""
    defaults = Settings(kafka_servers="kafka:9092", model="-")
    if in_flight is None:
        return {}, _PARTITIONS * defaults.max_uncommitted_jobs + defaults.max_poll_records
    uncommitted = in_flight // _PARTITIONS
    settings = {
        "max_in_flight_jobs": in_flight,
        "max_uncommitted_jobs": uncommitted,
        "max_poll_records": uncommitted,
    }
    return settings, _PARTITIONS * uncommitted + uncommitted


async def crash(stack: DevStack, jobs: int, in_flight: int | None, directory: Path) -> dict[str, Any]:
    """Run it once; the figures."""
    settings, most = bounds(in_flight)
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    victim, survivor = (
        Replica(
            stack,
            topics,
            minilm_path(),
            directory / f"{name}.log",
            **settings,
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
        "most_that_may_repeat": most,
        "settings": settings or "the service's defaults",
        "answered_when_killed": at_kill,
        "seconds": round(ended - started, 1),
        "seconds_behind_the_kill": round(ended - killed, 1),
        "session_timeout_s": _SESSION_S,
        "exit_code_of_the_survivor": code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=None, help="jobs; default: the service's own bounds")
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        where = {"kafka": stack.kafka_description, "redis": stack.redis_description}
        figures = asyncio.run(crash(stack, options.jobs, options.in_flight, Path(directory)))
    found = {"model": "all-MiniLM-L6-v2", **figures, **where}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    write("crash" if options.in_flight is None else "crash_tight", found, "embedq", "torch", "aiokafka")
    return 0 if not found["lost"] and found["duplicates"] <= found["most_that_may_repeat"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
