"""`embedq sink` on a real Kafka, into a real store: what is in it after changes, kills and refusals."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer

from embedq_sdk import EmbedClient
from tests.broker.batch.test_documents import Record, a_topic, written
from tests.helpers.fake_service import NEW, OLD, Answer, Received, expected
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka
PROGRAM = "from embedq_batch.sink_command import sink; sink(prog_name='embedq sink')"
REEMBED = "from embedq_batch.reembed_command import reembed; reembed(prog_name='embedq reembed')"


@contextmanager
def following(
    servers: str, prefix: str, *arguments: str, program: str = PROGRAM
) -> Iterator[subprocess.Popen[bytes]]:
    """A standing sink, which is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stderr=subprocess.PIPE,
        env=os.environ | {"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": prefix},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


class Stored:
    """The table that is followed into."""

    def __init__(self, folder: Path, name: str = "docs") -> None:
        self._folder = folder
        self._name = name
        self.to = f"lancedb:{folder}#{name}"
        self._seen: tuple[int, dict[str, Any]] = (0, {})

    def _look(self) -> dict[str, Any]:
        import lancedb  # takes seconds, which only this file's worker has to spend

        database = lancedb.connect(self._folder)
        try:
            table = database.open_table(self._name)
        except ValueError:
            return {}
        if table.version != self._seen[0]:  # it is looked at fifty times a second
            version, rows = table.version, table.to_arrow().to_pylist()
            assert len({row["id"] for row in rows}) == len(rows)
            self._seen = version, {row["id"]: row for row in rows}
        return self._seen[1]

    async def rows(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._look)

    async def become(self, texts: dict[str, str], salt: str = OLD) -> dict[str, Any]:
        """Wait until these are in it, each with its vector, and nothing else."""
        return await self._hold(texts, salt, lambda found: found == texts.keys())

    async def reach(self, texts: dict[str, str], salt: str = OLD) -> dict[str, Any]:
        """Wait until these are in it, each with its vector."""
        return await self._hold(texts, salt, lambda found: found >= texts.keys())

    async def _hold(
        self, texts: dict[str, str], salt: str, are_there: Callable[[set[str]], bool]
    ) -> dict[str, Any]:
        refused: dict[str, Any] = {}

        async def same() -> bool:
            nonlocal refused
            if (rows := await self.rows()) is refused:
                return False
            refused = rows
            return are_there(set(rows)) and all(
                np.array_equal(np.asarray(rows[id]["vector"], np.float32), expected(text, salt=salt))
                for id, text in texts.items()
            )

        await wait_until(same, within=60, what="the table")
        return await self.rows()


async def test_changes_of_documents_are_followed_across_a_kill(
    servers: str, prefix: str, tmp_path: Path
) -> None:
    store = Stored(tmp_path / "lance")
    texts = {str(n): f"text {n}" for n in range(500)}
    async with a_topic(servers) as topic, Responder(servers, prefix):
        arguments = (
            *("--from", topic, "--to", store.to, "--id-column", "id", "--keep", "n"),
            *("--group", f"g-{uuid.uuid4().hex[:6]}"),
        )
        await written(
            servers, topic, [({"id": id}, {"id": id, "text": text, "n": 1}) for id, text in texts.items()]
        )
        with following(servers, prefix, *arguments):
            rows = await store.become(texts)
        assert (rows["7"]["n"], rows["7"]["model_version"]) == (1, OLD)
        changes: list[Record] = [
            ({"id": "3"}, {"before": None, "after": {"id": "3", "text": "changed", "n": 2}, "op": "u"}),
            ({"id": "4"}, None),
            ({"id": "new"}, {"schema": {}, "payload": {"id": "new", "text": "new", "n": 3}}),
        ]
        await written(servers, topic, changes)
        del texts["4"]
        texts |= {"3": "changed", "new": "new"}
        figures = tmp_path / "sink.prom"
        more = ("--chunk", "mean", "--metrics", str(figures))
        with following(servers, prefix, *arguments, *more) as process:
            rows = await store.become(texts)
            process.terminate()
            assert await asyncio.to_thread(process.wait, patient(30)) == 130
        assert rows["3"]["n"] == 2
        lines = figures.read_text().splitlines()
        labels = f'outcome="{{}}",target="{store.to}"'
        for outcome, count in (("embedded", 2), ("deleted", 1), ("failed", 0)):
            assert f"embedq_run_rows{{{labels.format(outcome)}}} {count:.1f}" in lines


async def test_results_of_submitted_jobs_are_followed(servers: str, prefix: str, tmp_path: Path) -> None:
    store = Stored(tmp_path / "lance")
    async with Responder(servers, prefix), EmbedClient(servers, topic_prefix=prefix) as client:
        for n in range(20):
            await client.submit(f"row {n}", id=f"r{n}", metadata={"n": n})
        await client.submit(["a", "b"], id="two", metadata={"n": -1})
        wanted = {f"r{n}": f"row {n}" for n in range(20)} | {"two#0": "a", "two#1": "b"}
        arguments = ("--from", "results", "--to", store.to, "--keep", "n", "--group", uuid.uuid4().hex)
        with following(servers, prefix, *arguments):
            rows = await store.become(wanted)
    assert (rows["r7"]["n"], rows["two#1"]["n"]) == (7, -1)


async def test_submitted_jobs_are_embedded_anew_under_the_ids_that_their_vectors_have(
    servers: str, prefix: str, tmp_path: Path
) -> None:
    old, new = Stored(tmp_path / "lance"), Stored(tmp_path / "lance", "new")
    mark = uuid.uuid4().hex[:6]
    wanted = {f"{mark}-{n}": f"row {n}" for n in range(20)} | {f"{mark}#0": "a", f"{mark}#1": "b"}
    async with Responder(servers, prefix) as service, EmbedClient(servers, topic_prefix=prefix) as client:
        service.behave = by_alias(service)
        since = datetime.now(UTC).isoformat()
        for n in range(20):
            await client.submit(f"row {n}", id=f"{mark}-{n}", metadata={"n": n})
        await client.submit(["a", "b"], id=mark, metadata={"n": -1})
        await client.embed("a question, whose job has a reply address")
        results = ("--from", "results", "--to", old.to, "--keep", "n", "--group", mark)
        with following(servers, prefix, *results):
            await old.reach(wanted)

        command = ("--of", old.to, "--from", "jobs", "--since", since, "--to", new.to, "--model", "new")
        with following(servers, prefix, *command, "--keep", "n", program=REEMBED) as process:
            _, told = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, told.decode()
    rows = await new.become(wanted, NEW)
    assert (rows[f"{mark}-7"]["n"], rows[f"{mark}#1"]["model_version"]) == (7, NEW)


def by_alias(service: Responder) -> Callable[[Received], list[Answer]]:
    """The alias `new` has another model than all others."""

    def behave(job: Received) -> list[Answer]:
        service.version = NEW if job.job.model == "new" else OLD
        return [service.good(job)]

    return behave


async def test_what_cannot_be_stored_is_a_dead_letter_or_the_end(
    servers: str, prefix: str, tmp_path: Path
) -> None:
    store = Stored(tmp_path / "lance")
    async with a_topic(servers) as topic, a_topic(servers) as letters, Responder(servers, prefix):
        records: list[Record] = [("a", {"text": "one"}), ("b", {"title": "no text"}), ("c", ["no document"])]
        await written(servers, topic, records)
        arguments = ("--from", topic, "--to", store.to, "--chunk", "late")
        with following(servers, prefix, *arguments, "--group", uuid.uuid4().hex) as process:
            _, told = await asyncio.to_thread(process.communicate)
        assert process.returncode == 1
        assert b"cannot be stored: " in told
        assert b"--dead-letters" in told
        assert b"Traceback" not in told

        more = ("--group", uuid.uuid4().hex, "--dead-letters", letters)
        with following(servers, prefix, *arguments, *more):
            rows = await store.become({"a#0": "one"})
            assert (rows["a#0"]["row"], rows["a#0"]["start"], rows["a#0"]["end"]) == ("a", 0, 3)
            async with AIOKafkaConsumer(
                letters, bootstrap_servers=servers, auto_offset_reset="earliest"
            ) as consumer:
                found = [await consumer.getone() for _ in range(2)]
        codes = {record.key: dict(record.headers)["embedq-error-code"] for record in found}
        assert codes == {b'"b"': b"missing_text", b'"c"': b"malformed"}
