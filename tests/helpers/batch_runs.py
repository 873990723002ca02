"""Batch runs against a fake service, in this process: what a test changes of it, and what is in the files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner, Result

import embedq_sdk.client
from embedq_batch import Columns, RunOptions, Sink, Source, Summary
from embedq_batch.api import described
from embedq_batch.running.progress import Progress
from embedq_batch.running.run import Parts, execute
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sources.opening import opened_source
from embedq_sdk import EmbedClient
from embedq_sdk.job_options import JobOptions
from tests.helpers.fake_service import NEW, OLD, Answer, FakeService, Received, expected
from tests.helpers.fake_transport import FakeTransport

TEXTS = Columns(keep=())


@asynccontextmanager
async def fake_client(service: FakeService | None = None) -> AsyncIterator[tuple[EmbedClient, FakeService]]:
    """A client that is answered by a fake service."""
    with mock.patch.object(embedq_sdk.client, "KafkaTransport", FakeTransport):
        client = EmbedClient("fake:9092")
    transport = client._transport
    assert isinstance(transport, FakeTransport)
    if service is not None:
        transport.service = service
    async with client:
        yield client, transport.service


def two_models() -> FakeService:
    """A service whose alias `new` has another model than all others."""

    def behave(job: Received) -> list[Answer]:
        service.version = NEW if job.job.model == "new" else OLD
        return [service.good(job)]

    service = FakeService(behave=behave)
    return service


@contextmanager
def served(service: FakeService) -> Iterator[FakeService]:
    """Clients of this process are answered by a fake service: those of commands, too."""

    def transport(*arguments: Any, **named: Any) -> FakeTransport:
        made = FakeTransport(*arguments, **named)
        made.service = service
        return made

    with mock.patch.object(embedq_sdk.client, "KafkaTransport", transport):
        yield service


def invoked(command: click.Command, *arguments: str, service: FakeService | None = None) -> Result:
    """What a command did, with a fake service instead of Kafka."""
    with served(service or two_models()):
        done = CliRunner().invoke(command, arguments, env={"EMBEDQ_KAFKA_SERVERS": "fake:9092"})
    assert "Traceback" not in done.output, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


async def run(
    source: str | Source,
    sink: str | Sink,
    service: FakeService | None = None,
    *,
    columns: Columns = TEXTS,
    job: JobOptions | None = None,
    manifest: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Summary:
    """One run, as `embedq_batch.running.run` does it, without Kafka."""
    async with fake_client(service) as (client, _):
        return await execute(
            Parts(
                source=opened_source([source], columns) if isinstance(source, str) else source,
                sink=await asyncio.to_thread(opened_sink, sink) if isinstance(sink, str) else sink,
                client=client,
                options=RunOptions(job=job or JobOptions(lane="bulk"), about=described(columns), **options),
                progress=Progress(time.monotonic()),
                manifest=manifest,
            ),
            report,
        )


def a_table(path: Path, texts: Sequence[Any], **columns: Sequence[Any]) -> str:
    """A Parquet file with a column `text`, and others."""
    pq.write_table(
        pa.table({"text": list(texts), **{name: list(each) for name, each in columns.items()}}), path
    )
    return str(path)


def vectors_in(path: Path | str) -> dict[Any, npt.NDArray[np.float32]]:
    """The vectors of an output, by id; each id is there once."""
    path = Path(path)
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    else:
        names = [
            msgspec.json.decode(line) for line in path.with_suffix(".rows.jsonl").read_bytes().splitlines()
        ]
        rows = [{**name, "vector": vector} for name, vector in zip(names, np.load(path), strict=True)]
    found = {row["id"]: np.asarray(row["vector"], np.float32) for row in rows}
    assert len(found) == len(rows), "an id twice"
    return found


def assert_vectors(path: Path | str, texts: dict[Any, str], salt: str) -> None:
    """An output has exactly these ids, each with the vector that this model version gives its text."""
    found = vectors_in(path)
    assert found.keys() == texts.keys()
    for id, text in texts.items():
        assert np.array_equal(found[id], expected(text, salt=salt)), id
