"""Reading, asking and writing go on beside each other, each as far ahead as the others allow."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from embedq_batch import VectorBatch
from embedq_batch.errors import BadTarget, TargetAway
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.manifest.store import glance
from embedq_batch.sinks.finals import ParquetFile
from embedq_batch.sinks.parts import PartsSink
from tests.helpers.batch_runs import a_table, assert_vectors, run
from tests.helpers.fake_service import OLD, Answer, FakeService, Received
from tests.helpers.support import patient, wait_until

TEXTS = [f"text {n}" for n in range(4000)]


class Slow(PartsSink):
    """A target whose first write takes until it may end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, ParquetFile())
        self.writing, self.may_go_on = threading.Event(), threading.Event()

    def write(self, batch: VectorBatch) -> int:
        self.writing.set()
        assert self.may_go_on.wait(patient(60))
        return super().write(batch)


async def test_while_the_target_writes_the_service_works_and_a_slow_target_stops_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 200)
    source = a_table(tmp_path / "in.parquet", TEXTS)
    sink, service = Slow(tmp_path / "out.parquet"), FakeService()
    task = asyncio.create_task(run(source, sink, service, job_texts=50, in_flight=500))
    await wait_until(sink.writing.is_set, what="the first write")

    # A chunk is written, one waits, one is ready; 500 rows are in flight, a job waits for room, and there was a probe.
    most = 3 * 250 + 500 + 50 + 1
    await wait_until(lambda: sum(len(job.texts) for job in service.received) >= 1000, what="more jobs")
    for _ in range(1000):  # turns of the loop, in which nothing more may be read
        await asyncio.sleep(0)
    assert sum(len(job.texts) for job in service.received) <= most

    sink.may_go_on.set()
    await task
    assert_vectors(tmp_path / "out.parquet", dict(enumerate(TEXTS)), OLD)


async def test_what_was_written_is_kept_when_the_target_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 100)
    source, out = a_table(tmp_path / "in.parquet", TEXTS[:1000]), tmp_path / "out.parquet"

    class Full(PartsSink):
        def write(self, batch: VectorBatch) -> int:
            if batch.ids[0] == 400:
                raise BadTarget(target="a disk", reason="no space left")
            return super().write(batch)

    with pytest.raises(BadTarget, match="no space left"):
        await run(source, Full(out, ParquetFile()), job_texts=50)

    _, state, figures = await asyncio.to_thread(glance, tmp_path / "out.parquet.embedq" / MANIFEST)
    assert (state.complete, figures.done) == (False, 400)
    done = await run(source, str(out))
    assert done.skipped == 400
    assert_vectors(out, dict(enumerate(TEXTS[:1000])), OLD)


async def test_ctrl_c_does_not_wait_for_a_target_that_is_away(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS[:1000]), tmp_path / "out.parquet"
    tried = 0

    class Away(PartsSink):
        def write(self, batch: VectorBatch) -> int:
            nonlocal tried
            tried += 1
            raise TargetAway(target="a store", reason="it is gone")

    task = asyncio.create_task(run(source, Away(out, ParquetFile()), job_texts=50))
    await wait_until(lambda: tried > 0, what="a write")
    task.cancel()
    async with asyncio.timeout(patient(20)):
        with pytest.raises(asyncio.CancelledError):
            await task

    _, _, figures = await asyncio.to_thread(glance, tmp_path / "out.parquet.embedq" / MANIFEST)
    assert figures.done == 0


async def test_what_was_answered_and_not_yet_taken_is_not_done_again(tmp_path: Path) -> None:
    """The first job is never answered, and all others are: they wait for it, to be written in the source's order."""
    source, out = a_table(tmp_path / "in.parquet", TEXTS[:1000]), tmp_path / "out.parquet"

    def behave(job: Received) -> list[Answer] | None:
        return None if job.texts[0] == TEXTS[0] else [service.good(job)]

    service = FakeService(behave=behave)
    task = asyncio.create_task(run(source, str(out), service, job_texts=50))
    await wait_until(lambda: sum(len(job.texts) for job in service.received) == 1001, what="all jobs")
    for _ in range(100):  # turns of the loop, in which the answers arrive
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    _, _, figures = await asyncio.to_thread(glance, tmp_path / "out.parquet.embedq" / MANIFEST)
    assert figures.done == 950
    done = await run(source, str(out))
    assert (done.embedded, done.skipped) == (50, 950)
    assert_vectors(out, dict(enumerate(TEXTS[:1000])), OLD)


async def test_the_figures_of_a_run_are_in_a_file_for_prometheus(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    source, out = a_table(tmp_path / "in.parquet", TEXTS[:300]), tmp_path / "out.parquet"
    figures = tmp_path / "run.prom"

    await run(source, str(out), metrics=figures)

    found = {
        (sample.name, sample.labels.get("outcome")): sample
        for family in text_string_to_metric_families(figures.read_text())
        for sample in family.samples
    }
    assert {sample.labels["target"] for sample in found.values()} == {str(out)}
    values = {key: sample.value for key, sample in found.items()}
    assert values["embedq_run_rows", "embedded"] == 300
    assert values["embedq_run_rows", "failed"] == values["embedq_run_rows", "skipped"] == 0
    assert values["embedq_run_rows", "deleted"] == 0
    assert values["embedq_run_tokens_total", None] == 600
    assert values["embedq_run_cached_rows_total", None] == 0
    assert values["embedq_run_device_seconds_total", None] == pytest.approx(5 * 0.0005)  # of five jobs
    assert values["embedq_run_source_rows", None] == 300
    assert values["embedq_run_waiting", None] == 0
    assert values["embedq_run_complete", None] == 1
    assert values["embedq_run_started_seconds", None] <= values["embedq_run_written_seconds", None]

    with pytest.raises(BadTarget, match="No such file"):
        await run(source, str(out), metrics=tmp_path / "nowhere" / "run.prom")
