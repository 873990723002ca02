"""`embedq run` on a real Kafka: killed, and gone on with by the same command."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from embedq_batch import run
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.manifest.store import glance
from tests.helpers.batch_runs import a_table, assert_vectors
from tests.helpers.fake_service import NEW, OLD, Answer, Received
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

TEXTS = [f"row {n}" for n in range(12_000)]
PROGRAM = """
from embedq_batch.running import runner, writing
from embedq_batch.command import run

runner._WRITE_ROWS, writing._FLUSH_ROWS = 500, 1000
run(prog_name="embedq run")
"""


def started(servers: str, prefix: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stderr=subprocess.PIPE,
        env=os.environ | {"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": prefix},
    )


async def test_a_runner_that_is_killed_goes_on_and_every_row_is_there_once(
    servers: str, prefix: str, tmp_path: Path
) -> None:
    out, manifest = tmp_path / "out.parquet", tmp_path / "out.parquet.embedq" / MANIFEST
    command = ("--from", a_table(tmp_path / "in.parquet", TEXTS), "--to", str(out))

    def look() -> int:
        try:
            return glance(manifest)[2].done
        except sqlite3.Error:
            return 0

    async def done() -> int:
        return await asyncio.to_thread(look)

    async with Responder(servers, prefix) as service:
        for _ in range(2):
            before = await done()
            process = started(servers, prefix, *command)

            async def further(before: int = before) -> bool:
                return await done() > before

            await wait_until(further, what="some rows", within=60)
            process.kill()
            await asyncio.to_thread(process.communicate)
        assert not out.exists()
        kept = await done()
        process = started(servers, prefix, *command, "--check", "10")
        async with asyncio.timeout(patient(120)):
            _, told = await asyncio.to_thread(process.communicate)

    assert process.returncode == 0, told.decode()
    assert f"{kept:,} done before".encode() in told
    assert b"check of 10 rows: 0 missing, 0 different" in told
    assert_vectors(out, dict(enumerate(TEXTS)), OLD)
    assert all(job.topic.endswith(".bulk") for job in service.received)


async def test_a_reload_under_way_leaves_vectors_of_one_model(
    servers: str, prefix: str, tmp_path: Path
) -> None:
    def behave(job: Received) -> list[Answer]:
        if len(service.received) > 20:
            service.version = NEW
        return [service.good(job)]

    async with Responder(servers, prefix) as service:
        service.behave = behave
        summary = await run(
            a_table(tmp_path / "in.parquet", TEXTS[:3000]),
            str(tmp_path / "out.parquet"),
            servers=servers,
            topic_prefix=prefix,
        )

    assert summary.model_version == NEW
    assert_vectors(tmp_path / "out.parquet", dict(enumerate(TEXTS[:3000])), NEW)
