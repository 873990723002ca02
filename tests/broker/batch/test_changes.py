"""`embedq sink` after connectors, into a real PostgreSQL: what it holds after creates, updates, deletes and tombstones, kills and outages."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.broker.batch.test_documents import Record, a_topic, written
from tests.broker.batch.test_sink import following as sink
from tests.helpers.java_programs import connect
from tests.helpers.postgres import Table, over_tcp
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

PROGRAM = """
from embedq_batch.sink_command import sink
from embedq_shared.kafka.reading import unreadable

unreadable._POLL_RECORDS = 50  # so that a kill falls between two polls
sink(prog_name="embedq sink")
"""


def following(servers: str, prefix: str, *arguments: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A standing sink that takes few records at a time."""
    return sink(servers, prefix, *arguments, program=PROGRAM)


def as_connect(payload: Any) -> dict[str, Any]:
    """What Connect's JsonConverter writes with schemas."""
    return {"schema": {"type": "struct", "optional": False}, "payload": payload}


def change(op: str, before: Any, after: Any) -> dict[str, Any]:
    """Debezium's envelope."""
    source = {"connector": "postgresql", "table": "articles", "lsn": 1}
    return {"before": before, "after": after, "source": source, "op": op, "ts_ms": 1}


def a_row(id: str, text: str, title: str = "t") -> dict[str, Any]:
    return {"id": id, "text": text, "title": title}


async def test_changes_are_followed_across_kills_and_what_the_store_refuses_is_kept_apart(
    servers: str, prefix: str, postgres: Any
) -> None:
    """1 % of the rows has a null character in a column, which PostgreSQL takes in no text."""
    table = Table(postgres.get_uri(), f"changes_{uuid.uuid4().hex[:8]}")
    texts = {str(n): f"text {n}" for n in range(1000)}
    refused = {str(n) for n in range(50, 1000, 100)}
    # Half of the rows in Debezium's envelopes, half as Connect's JsonConverter writes rows.
    rows = [a_row(id, text, "bad\0title" if id in refused else "t") for id, text in texts.items()]
    created: list[Record] = [
        (as_connect({"id": row["id"]}), as_connect(change("c", None, row) if n % 2 else row))
        for n, row in enumerate(rows)
    ]
    changes: list[Record] = []
    for id in ("1", "2", "3", "4"):
        changes += [
            (as_connect({"id": id}), as_connect(change("u", None, a_row(id, f"changed {id}", "new"))))
        ]
    changes += [
        (as_connect({"id": "5"}), as_connect(change("d", a_row("5", "text 5"), None))),
        (as_connect({"id": "5"}), None),
        (as_connect({"id": "6"}), None),
        (as_connect({"id": "7"}), as_connect(change("d", a_row("7", "text 7"), None))),
        (as_connect({"id": "7"}), None),
        (as_connect({"id": "7"}), as_connect(change("c", None, a_row("7", "again 7")))),
        (as_connect({"id": "8"}), as_connect(a_row("8", "changed 8") | {"__deleted": "true"})),
        (as_connect({"id": "x"}), as_connect(change("r", None, a_row("x", "read in a snapshot")))),
    ]
    wanted = {id: text for id, text in texts.items() if id not in refused}
    wanted |= {id: f"changed {id}" for id in "1234"} | {"7": "again 7", "x": "read in a snapshot"}
    for id in "568":
        del wanted[id]
    async with a_topic(servers) as topic, a_topic(servers) as letters, Responder(servers, prefix):
        arguments = (
            *("--from", topic, "--to", table.to, "--id-column", "id", "--keep", "title"),
            *("--group", f"g-{uuid.uuid4().hex[:6]}", "--dead-letters", letters),
        )
        await written(servers, topic, created)
        for least in (1, 400):
            with following(servers, prefix, *arguments):

                async def so_many(least: int = least) -> bool:
                    return len(await table.rows()) >= least

                await wait_until(so_many, within=60, what="some rows")
        await written(servers, topic, changes)
        with following(servers, prefix, *arguments):
            stored = await table.become(wanted)
            codes = await letters_in(servers, letters, refused)
    assert (stored["1"]["title"], stored["9"]["title"]) == ("new", "t")
    assert set(codes.values()) == {b"refused"}


async def letters_in(servers: str, topic: str, ids: set[str]) -> dict[str, bytes]:
    """Wait until these ids, and no others, have dead letters; the code of each."""
    codes: dict[str, bytes] = {}
    async with AIOKafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        async with asyncio.timeout(patient(60)):
            while codes.keys() != ids:
                record = await consumer.getone()
                id = record.key.decode().rpartition(":")[2].strip('"}')
                assert id in ids
                codes[id] = dict(record.headers)["embedq-error-code"]
    return codes


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_store_that_is_away_for_a_minute_is_waited_for(
    servers: str, prefix: str, postgres: Any
) -> None:
    table = Table(postgres.get_uri(), f"away_{uuid.uuid4().hex[:8]}")
    texts = {str(n): f"text {n}" for n in range(200)}
    async with a_topic(servers) as topic, Responder(servers, prefix):
        arguments = ("--from", topic, "--to", table.to, "--group", f"g-{uuid.uuid4().hex[:6]}")
        await written(servers, topic, [(id, {"text": text}) for id, text in texts.items()])
        with following(servers, prefix, *arguments) as process:
            await table.become(texts)
            await asyncio.to_thread(postgres.stop)
            more = {f"m{n}": f"more {n}" for n in range(200)}
            await written(servers, topic, [(id, {"text": text}) for id, text in more.items()])
            await asyncio.sleep(60)  # what the test is about
            assert process.poll() is None
            await asyncio.to_thread(postgres.ensure_postgres_running)
            await table.become(texts | more)
            process.send_signal(signal.SIGTERM)
            _, told = await asyncio.to_thread(process.communicate)
    assert b"Traceback" not in told, told.decode()
    assert process.returncode == 130


# -- a real Kafka Connect -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def named_topic(servers: str, name: str) -> AsyncIterator[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 3, 1)])
        yield name
    finally:
        await admin.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_table_is_followed_through_debezium_across_kills(
    servers: str, prefix: str, postgres: Any, tmp_path: Path
) -> None:
    """A real PostgreSQL, a real Debezium in a real Kafka Connect, and the same PostgreSQL as the store."""
    mark = uuid.uuid4().hex[:8]
    source, table = f"articles_{mark}", Table(postgres.get_uri(), f"vectors_{mark}")
    texts = {str(n): f"text {n}" for n in range(300)}
    with psycopg.connect(postgres.get_uri(), autocommit=True) as tables:

        def execute(query: str, *arguments: Any) -> None:
            tables.execute(query.replace("articles", source).encode(), arguments)

        execute("create table articles (id bigint primary key, body text, title text)")
        execute("insert into articles select n, 'text ' || n, 't' from generate_series(0, 299) n")
        async with (
            named_topic(servers, f"{prefix}.public.{source}") as topic,
            over_tcp(postgres.get_uri()) as port,
            connect(tmp_path, servers, debezium(prefix, source, port), plugin="debezium") as running,
            Responder(servers, prefix),
        ):
            arguments = (
                *("--from", topic, "--to", table.to, "--id-column", "id", "--text-column", "body"),
                *("--keep", "title", "--group", f"g-{mark}"),
            )
            with following(servers, prefix, *arguments):
                rows = await followed(table, texts, running, tmp_path)
            assert rows["7"]["title"] == "t"
            execute("update articles set body = 'changed ' || id, title = 'new' where id < 100")
            texts |= {str(n): f"changed {n}" for n in range(100)}
            execute("delete from articles where id between 50 and 149")
            for n in range(50, 150):
                del texts[str(n)]
            execute("insert into articles select n, 'more ' || n, 't' from generate_series(300, 399) n")
            texts |= {str(n): f"more {n}" for n in range(300, 400)}
            with following(servers, prefix, *arguments):

                async def begun() -> bool:
                    return "50" not in await table.rows() or "300" in await table.rows()

                await wait_until(begun, within=120, what="the first changes")
            execute("update articles set body = 'back' where id = 0")
            texts["0"] = "back"
            with following(servers, prefix, *arguments):
                rows = await followed(table, texts, running, tmp_path)
    assert (rows["1"]["title"], rows["200"]["title"]) == ("new", "t")


async def followed(
    table: Table, texts: dict[str, str], running: subprocess.Popen[bytes], folder: Path
) -> dict[str, dict[str, Any]]:
    try:
        return await table.become(texts, within=180)
    except AssertionError as error:
        rows = await table.rows()
        wrong = sorted(rows.keys() ^ texts.keys())[:10]
        log = (folder / "connect.log").read_text()[-3000:]
        raise AssertionError(
            f"{error}: {len(rows)} rows, {wrong}; connect: {running.poll()}\n{log}"
        ) from None


def debezium(prefix: str, table: str, port: int) -> dict[str, str]:
    json = "org.apache.kafka.connect.json.JsonConverter"
    return {
        "name": f"debezium-{table}",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "plugin.name": "pgoutput",
        "database.hostname": "127.0.0.1",
        "database.port": str(port),
        "database.user": "postgres",
        "database.password": "none",
        "database.dbname": "postgres",
        "topic.prefix": prefix,
        "table.include.list": f"public.{table}",
        "slot.name": f"slot_{table}",
        "slot.drop.on.stop": "true",
        "publication.name": f"publication_{table}",
        "publication.autocreate.mode": "filtered",
        "key.converter": json,
        "value.converter": json,
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_lines_of_a_file_are_followed_through_connect(
    servers: str, prefix: str, postgres: Any, tmp_path: Path
) -> None:
    """Connect's file source, its JsonConverter with schemas, and a transform that makes a row of a line."""
    table = Table(postgres.get_uri(), f"lines_{uuid.uuid4().hex[:8]}")
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"line {n}\n" for n in range(50)))
    hoist = "org.apache.kafka.connect.transforms.HoistField$Value"
    key = "org.apache.kafka.connect.transforms.ValueToKey"
    async with a_topic(servers) as topic:
        source = {
            "name": "lines",
            "connector.class": "org.apache.kafka.connect.file.FileStreamSourceConnector",
            "file": str(lines),
            "topic": topic,
            "key.converter": "org.apache.kafka.connect.json.JsonConverter",
            "transforms": "hoist,key",
            "transforms.hoist.type": hoist,
            "transforms.hoist.field": "text",
            "transforms.key.type": key,
            "transforms.key.fields": "text",
        }
        arguments = ("--from", topic, "--to", table.to, "--group", f"g-{uuid.uuid4().hex[:6]}")
        async with connect(tmp_path, servers, source) as running, Responder(servers, prefix):
            texts = {f"line {n}": f"line {n}" for n in range(50)}
            with following(servers, prefix, *arguments):
                await followed(table, texts, running, tmp_path)
            with lines.open("a") as file:
                file.write("one more\n")
            with following(servers, prefix, *arguments):
                await followed(table, texts | {"one more": "one more"}, running, tmp_path)
