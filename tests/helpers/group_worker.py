"""A replica without a model, as a process: the real intake on a real Kafka, which answers each job with its place.

Tests of the group start some of them in a second each, and what they measure is the group and not the model.

    python -m tests.helpers.group_worker '{"servers": …, "prefix": …, "replica": …, "seconds": 0.005}'

Each record is answered after `seconds` by a result that names record and worker; then its offset may be committed.
SIGTERM stops it in order.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

import structlog

from embedq_consumer.group import Overtaken
from embedq_consumer.intake import Intake, IntakeOptions, Record, make_jobs_clients
from embedq_consumer.telemetry import logs
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import AIOKafkaProducer
from embedq_shared.topics import Topics
from tests.helpers.metric_values import sample_value

log = structlog.get_logger()

DEFAULTS: dict[str, Any] = {
    "static_membership": False,
    "max_in_flight_jobs": 2048,
    "max_in_flight_bytes": 32 * 1024 * 1024,
    "max_started_texts": 8192,
    "max_pending_bytes": 512 * 1024 * 1024,
    "read_ahead_s": 2.0,
    "max_poll_records": 512,
    "max_uncommitted": 2048,
    "commit_interval_s": 0.1,
    "session_timeout_ms": 6000,
    "rebalance_timeout_ms": 20_000,
    "stuck_after_s": 120.0,
    "stuck_limit_s": 900.0,
}


async def work(servers: str, prefix: str, replica: str, seconds: float, swallow: str, **options: Any) -> None:
    """Until SIGTERM. The job of the id `swallow` is never answered, until it is given up."""
    topics = Topics(prefix)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    producer = AIOKafkaProducer(bootstrap_servers=servers, linger_ms=1, enable_idempotence=True)
    await producer.start()
    metrics = Metrics()
    chosen = IntakeOptions(group=f"{prefix}.embedq", replica=replica, **DEFAULTS | options)
    intake = Intake(
        make_jobs_clients({"bootstrap_servers": servers}, chosen),
        chosen,
        topics=topics,
        metrics=metrics,
        beat=lambda: None,
    )

    async def answer(record: Record, status: str) -> None:
        value = {"id": json.loads(record.value or b"{}")["id"], "worker": replica, "status": status}
        value |= {"place": record.name, "partition": record.name.rpartition("-")[0]}
        value["age"] = round(time.time() - record.timestamp_ms / 1000, 3)
        await producer.send_and_wait(topics.results, json.dumps(value).encode(), key=record.key)
        intake.finish(record)

    async def work_on(record: Record) -> None:
        await asyncio.sleep(seconds)
        if not swallow or json.loads(record.value or b"{}")["id"] != swallow:
            await answer(record, "ok")

    async with asyncio.TaskGroup() as tasks:

        def take(records: Iterable[Record]) -> None:
            for record in records:
                tasks.create_task(work_on(record))

        def give_up(record: Record, _: Overtaken) -> None:
            tasks.create_task(answer(record, "error"))

        def tell(trouble: str | None) -> None:
            if trouble is not None:
                log.warning("trouble", reason=trouble)

        await intake.open()
        loops = [
            tasks.create_task(loop)
            for loop in (
                intake.run(take, lambda record, why: None),
                intake.commit_forever(),
                intake.watch(give_up, tell),
            )
        ]
        await intake.joined.wait()
        log.info("joined")
        await stop.wait()
        await intake.stop(10)
        for loop in loops:
            loop.cancel()
    await intake.close()
    await producer.stop()
    commits = {
        outcome: sample_value(metrics.registry, "embedq_commits_total", {"outcome": outcome})
        for outcome in ("ok", "error", "fenced")
    }
    log.info("stopped", commits=commits)


if __name__ == "__main__":
    arguments = {"seconds": 0.005, "swallow": ""} | json.loads(sys.argv[1])
    logs.configure("info", replica=arguments["replica"])
    asyncio.run(work(**arguments))
