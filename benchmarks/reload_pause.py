"""How long do jobs pause while a new model takes the place of the serving one?

    python -m benchmarks.reload_pause

One replica of all-MiniLM-L6-v2 under a steady load; three reloads between two copies of it. Prints the largest gap
between two results before the reloads and during each (Kafka's timestamps, in milliseconds), and writes them as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.crash import job
from embedq_sdk.dev import DevStack
from tests.helpers.delivery import load, statuses
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.support import wait_until
from tests.helpers.tiny_models import minilm_path

_RESULTS = Path(__file__).parent / "results"
_RELOADS = 3


def largest_gap(times: list[int], start: int, end: int) -> int:
    """Milliseconds between two neighbouring results, of which one at least lies in the span."""
    inside = [after - before for before, after in pairwise(sorted(times)) if after >= start and before <= end]
    return max(inside, default=0)


async def measure(stack: DevStack, directory: Path) -> dict[str, Any]:
    for name in ("one", "two"):
        shutil.copytree(minilm_path(), directory / name)
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, directory / "one", directory / "log", redis=False)
    spans: list[tuple[int, int]] = []
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        load(stack, topics.jobs, results, window=64, make=job) as jobs,
    ):
        await jobs.progress(200)
        steady_from = _now()
        await jobs.progress(2000)
        steady = (steady_from, _now())
        for version in range(1, _RELOADS + 1):
            id = uuid.uuid4().hex
            path = ("one", "two")[version % 2]
            command = {"alias": "default", "version": version, "path": path, "command_id": id}
            started = _now()
            await client.send_and_wait(topics.control, json.dumps(command).encode(), key=b"default")

            async def ready(id: str = id) -> bool:
                said = [found for found in await statuses(status) if found["command_id"] == id]
                return any(found["state"] in ("READY", "FAILED") for found in said)

            await wait_until(ready, within=120, what="the end of a reload")
            spans.append((started, _now()))
            await jobs.progress(200)
        states = {found["state"] for found in await statuses(status) if found["step"] == "serving"}
        steps = await statuses(status)
    times = [record.timestamp for record in results.records]
    timeline = [
        {
            said["step"]: said["at"] - span[0]
            for said in steps
            if said["version"] == version and span[0] <= said["at"] <= span[1]
        }
        for version, span in enumerate(spans, 1)
    ]
    return {
        "results": len(times),
        "duplicates": jobs.answered.duplicates(),
        "results_per_second_before": round(
            sum(steady[0] <= at <= steady[1] for at in times) / ((steady[1] - steady[0]) / 1000)
        ),
        "largest_gap_before_ms": largest_gap(times, *steady),
        "largest_gap_in_each_reload_ms": [largest_gap(times, *span) for span in spans],
        "reload_ms": [end - start for start, end in spans],
        "steps_ms": timeline,
        "states": sorted(states),
    }


def _now() -> int:
    return time.time_ns() // 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=_RESULTS / "reload_pause.json")
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(measure(stack, Path(directory)))
    machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
    found = {"model": "all-MiniLM-L6-v2", **figures, "machine": machine}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["states"] == ["READY"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
