"""Rows out of a real PostgreSQL."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

from embedq_batch import Columns
from embedq_batch.errors import BadSource
from embedq_batch.sources.opening import opened_source
from tests.helpers.batch_runs import assert_vectors, run
from tests.helpers.fake_service import OLD


@pytest.fixture
def table(postgres: Any) -> str:
    """The address of a table of 3,000 texts."""
    name = f"rows_{uuid.uuid4().hex[:8]}"
    address = postgres.get_uri()
    with psycopg.connect(address) as connection:
        connection.execute(f"create table {name} (key bigint primary key, body text, year int)".encode())
        connection.execute(
            f"insert into {name} select n, 'text ' || n, n % 50 from generate_series(0, 2999) n".encode()
        )
    return f"{address}#{name}"


async def test_a_table_and_a_query_become_vectors(tmp_path: Path, table: str) -> None:
    columns = Columns(text="body", id="key", keep=("year",))
    done = await run(opened_source([table], columns), str(tmp_path / "all.parquet"), columns=columns)
    address, name = table.rsplit("#", 1)
    some = opened_source(
        [address], columns, query=f"select key, upper(body) as body, year from {name} where year = 7"
    )
    await run(some, str(tmp_path / "some.parquet"), columns=columns)

    assert done.rows == 3000
    assert_vectors(tmp_path / "all.parquet", {n: f"text {n}" for n in range(3000)}, OLD)
    assert_vectors(tmp_path / "some.parquet", {n: f"TEXT {n}" for n in range(7, 3000, 50)}, OLD)


async def test_changes_of_the_table_are_followed(tmp_path: Path, table: str) -> None:
    columns = Columns(text="body", id="key")
    out = str(tmp_path / "out.parquet")
    await run(opened_source([table], columns), out, columns=columns)
    address, name = table.rsplit("#", 1)
    with psycopg.connect(address) as connection:
        connection.execute(f"update {name} set body = 'changed' where key = 5".encode())
        connection.execute(f"delete from {name} where key > 9".encode())

    done = await run(
        opened_source([table], columns), out, columns=columns, only_changed=True, delete_missing=True
    )

    assert (done.embedded, done.deleted) == (1, 2990)
    assert_vectors(out, {n: f"text {n}" for n in range(10)} | {5: "changed"}, OLD)


def test_what_is_wrong_is_said_without_the_password(table: str) -> None:
    address, name = table.rsplit("#", 1)
    with pytest.raises(BadSource, match="no column 'text' among"):
        opened_source([address], Columns(id="key"), query=f"select * from {name}").open()
    with pytest.raises(BadSource) as away:
        opened_source(["postgresql://me:secret@127.0.0.1:1/db#rows"], Columns()).open()
    assert "secret" not in str(away.value)
