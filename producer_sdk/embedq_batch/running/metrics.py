"""A run's figures as a file of Prometheus' text format, for the node exporter's textfile collector.

A file and not a port: a run may end between two scrapes, several may run on one machine, and its last figures stay where they are found.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedq_batch.errors import BadTarget
from embedq_batch.running.progress import Progress

_EVERY_S: Final = 15.0
"""As often as Prometheus looks by default."""


class RunMetrics(Collector):
    """What is known of a run. Times are seconds of the epoch."""

    def __init__(self, progress: Progress, target: str) -> None:
        self._progress = progress
        self._target = target
        self._started = time.time()
        self.complete = False
        """Whether all rows are done."""

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        progress, labels = self._progress, ["target"]
        rows = GaugeMetricFamily(
            "embedq_run_rows",
            "Rows that this process dealt with: embedded (written to the target), failed, skipped (done before, in the present pass), deleted.",
            labels=["target", "outcome"],
        )
        for outcome in ("embedded", "failed", "skipped", "deleted"):
            rows.add_metric([self._target, outcome], getattr(progress, outcome))
        yield rows
        for name, what, count in (
            ("embedq_run_tokens", "Tokens of the rows that were answered.", progress.tokens),
            ("embedq_run_cached_rows", "Rows that the service answered from its cache.", progress.cached),
            (
                "embedq_run_device_seconds",
                "Seconds of the service's device that the rows took, as far as it says.",
                progress.device_s,
            ),
        ):
            counter = CounterMetricFamily(name, what, labels=labels)
            counter.add_metric([self._target], count)
            yield counter
        gauges = [
            ("embedq_run_started_seconds", "When this process began.", self._started),
            ("embedq_run_written_seconds", "When these figures were written.", time.time()),
            (
                "embedq_run_waiting",
                "1 while Kafka, the service or the target is away, else 0.",
                float(progress.waiting is not None),
            ),
            ("embedq_run_complete", "1 once all rows are done, else 0.", float(self.complete)),
        ]
        if progress.total is not None:
            gauges.append(("embedq_run_source_rows", "Rows of the source.", float(progress.total)))
        for name, what, value in gauges:
            gauge = GaugeMetricFamily(name, what, labels=labels)
            gauge.add_metric([self._target], value)
            yield gauge


@contextlib.asynccontextmanager
async def written(
    progress: Progress, target: str, path: Path | None, every: float = _EVERY_S
) -> AsyncIterator[RunMetrics]:
    """Write the figures now, every so many seconds, and in the end; nowhere if there is no path.

    Raises:
        BadTarget: the file cannot be written, when the run begins. Later it is left as it was.
    """
    metrics = RunMetrics(progress, target)
    registry = CollectorRegistry()
    registry.register(metrics)

    async def write() -> None:
        if path is not None:
            await asyncio.to_thread(write_to_textfile, str(path), registry)

    async def repeat() -> None:
        while True:
            await asyncio.sleep(every)
            with contextlib.suppress(OSError):
                await write()

    try:
        await write()
    except OSError as error:
        raise BadTarget(target=str(path), reason=error.strerror or str(error)) from None
    task = asyncio.create_task(repeat(), name="embedq-run-metrics")
    try:
        yield metrics
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(OSError):
            await write()
