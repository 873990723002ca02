"""A store that goes away in the middle of a run, and comes back."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from embedq_batch import Columns, RunOptions
from embedq_batch.api import described
from embedq_batch.running.progress import Progress
from embedq_batch.running.run import Parts, execute
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sources.opening import opened_source
from embedq_sdk.job_options import JobOptions
from tests.helpers.batch_runs import a_table, fake_client
from tests.helpers.fake_service import FakeService
from tests.helpers.support import wait_until
from tests.stores.test_stores import IDS, TEXTS, Postgres


async def test_a_postgresql_that_restarts_is_waited_for_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 50)
    store = Postgres(postgres.get_uri())
    source = a_table(tmp_path / "in.parquet", TEXTS, id=IDS)
    columns = Columns(id="id")
    progress = Progress(time.monotonic())
    sink = await asyncio.to_thread(opened_sink, store.to)
    written = 0
    write = sink.write

    def stops_after_three(batch: Any) -> int:
        nonlocal written
        written += 1
        if written == 4:
            postgres.stop()
        return write(batch)

    monkeypatch.setattr(sink, "write", stops_after_three)
    async with fake_client(FakeService()) as (client, _):
        options = RunOptions(job=JobOptions(lane="bulk"), about=described(columns), check=20)
        parts = Parts(
            source=opened_source([source], columns),
            sink=sink,
            client=client,
            options=options,
            progress=progress,
        )
        run = asyncio.create_task(execute(parts))
        await wait_until(lambda: progress.waiting is not None, what="the run's word that it waits")
        assert "does not answer" in str(progress.waiting)
        await asyncio.to_thread(postgres.ensure_postgres_running)
        done = await run

    assert (done.rows, done.failed, store.count()) == (len(IDS), 0, len(IDS))
    assert done.check is not None
    assert done.check.passed
    assert progress.waiting is None
