"""The examples of docs/batch.md, run as they stand there but for addresses, in the order in which they stand there."""

from __future__ import annotations

import asyncio
import csv
import gzip
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from embedq_sdk import EmbedClient
from tests.broker.batch.test_documents import written
from tests.helpers.batch_runs import a_table, vectors_in
from tests.helpers.fake_service import NEW, OLD, expected
from tests.helpers.postgres import Table
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(400)]

PAGE: Final = (Path(__file__).parents[3] / "docs/batch.md").read_text(encoding="utf-8")
BODIES: Final = [f"body {n}" for n in range(30)]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def a_folder(folder: Path) -> None:
    """What the page's commands find where they run."""
    (folder / "rows").mkdir()
    for start in (0, 15):
        some = BODIES[start : start + 15]
        a_table(folder / f"rows/{start}.parquet", ["-"] * 15, body=some, key=range(start, start + 15))
    a_table(folder / "rows.parquet", ["-"] * 30, body=BODIES, key=range(30))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "title", "body", "year"])
        writer.writerows([n, "T", body, 1999] for n, body in enumerate(BODIES))
    lines = [msgspec.json.encode({"text": body}) for body in BODIES]
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))


async def test_the_pages_commands_do_what_it_says(
    servers: str, prefix: str, postgres: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_folder(tmp_path)
    mark = uuid.uuid4().hex[:8]
    table = Table(postgres.get_uri(), f"vectors_{mark}")
    documents = f"documents-{mark}"
    environment = os.environ | {
        "EMBEDQ_KAFKA_SERVERS": servers,
        "EMBEDQ_TOPIC_PREFIX": prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    said: dict[str, str] = {}

    async with Responder(servers, prefix) as service, EmbedClient(servers, topic_prefix=prefix) as client:
        service.behave = lambda job: [
            service.good(job) for service.version in [NEW if job.job.model == "new" else OLD]
        ]

        async def run(line: str) -> None:
            command = (
                line.replace("http://db:6333", "qdrant")
                .replace("postgresql://db/search#vectors", table.to)
                .replace("/data/", f"{tmp_path}/")
                .replace("--from documents ", f"--from {documents} --group {mark} ")
                .replace("--from results ", f"--from results --group results-{mark} ")
                .replace("documents.failed", f"{documents}.failed")
            )
            process = await asyncio.create_subprocess_shell(
                f"exec {command}" if line.startswith("embedq sink") else command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            if line.startswith("embedq sink"):
                await stopped_when_it_has_followed(process, line)
            async with asyncio.timeout(patient(90)):
                told, _ = await process.communicate()
            said[line] = told.decode()
            assert process.returncode == (130 if line.startswith("embedq sink") else 0), said[line]

        async def stopped_when_it_has_followed(process: Any, line: str) -> None:
            if "--from results" in line:
                await table.become({"one": "a result"})
            else:
                folder = tmp_path / "lance"

                def there() -> bool:
                    import lancedb

                    try:
                        return bool(lancedb.connect(folder).open_table("docs").count_rows() == 1)
                    except ValueError:
                        return False

                await wait_until(lambda: asyncio.to_thread(there), within=60, what="the table")
            process.send_signal(signal.SIGTERM)

        await topics(servers, documents, f"{documents}.failed")
        await written(servers, documents, [({"id": "a"}, {"id": "a", "text": "a text", "title": "A"})])
        await client.submit("a result", id="one")
        for block in blocks("bash"):
            for line in block.splitlines():
                if command := line.partition("  #")[0].strip():
                    await run(command)
        for block in blocks("python"):
            program = block.replace('"localhost:9092"', f"{servers!r}, topic_prefix={prefix!r}, manifest='m'")
            code = compile(program, "page", "exec", flags=__import__("ast").PyCF_ALLOW_TOP_LEVEL_AWAIT)
            (tmp_path / "vectors.parquet").unlink()
            names: dict[str, Any] = {}
            if (waits := eval(code, names)) is not None:  # the page is ours
                await waits
            assert names["summary"].rows == 30

    for name in ("vectors.parquet", "vectors.jsonl"):
        assert len(vectors_in(tmp_path / name)) == 30
    assert np.array_equal(np.load(tmp_path / "vectors.npy")[7], expected("body 7"))
    assert pq.read_table(tmp_path / "vectors.parquet").column("id").to_pylist() == list(range(30))
    listed = said["embedq runs"]
    assert listed.count(": complete, 30") == 3
    told = "\n".join(said.values())
    assert "check of 20 rows: 0 missing, 0 different" in told
    assert "coverage 100 %: 30 of 30 rows under sha256:bbbbbbbbbbbb (new)" in told
    assert "embedq_corpus_coverage_ratio" in (tmp_path / "embedq.prom").read_text()


async def topics(servers: str, *names: str) -> None:
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 1, 1) for name in names])
    finally:
        await admin.close()
