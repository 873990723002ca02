"""`embedq run` into a Kafka topic: flat records by id, tombstones for what is gone."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from embedq_batch import Columns, RunOptions, run
from embedq_batch.errors import BadTarget
from tests.broker.batch.test_documents import a_topic
from tests.helpers.batch_runs import a_table
from tests.helpers.fake_service import NEW, OLD, expected
from tests.helpers.responder import Responder

pytestmark = pytest.mark.kafka

PARTITIONS = 3
"""Of `a_topic`."""
TEXTS = {f"row {n}": f"text {n}" for n in range(300)}


async def compacted(servers: str, topic: str) -> dict[str, dict[str, Any] | None]:
    """The last value of each key."""
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, n) for n in range(PARTITIONS)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: dict[str, dict[str, Any] | None] = {}
        while any([await consumer.position(tp) < end for tp, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    value = None if record.value is None else msgspec.json.decode(record.value)
                    found[record.key.decode()] = value
        return found
    finally:
        await consumer.stop()


async def test_rows_become_records_by_id_and_those_that_are_gone_tombstones(
    servers: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the manifest is
    path = tmp_path / "in.parquet"
    columns = Columns(id="id", keep=("year",))

    async def once(topic: str, texts: dict[str, str], **options: Any) -> Any:
        a_table(path, list(texts.values()), id=list(texts), year=range(len(texts)))
        return await run(
            str(path),
            f"kafka:{topic}",
            servers=servers,
            topic_prefix=prefix,
            columns=columns,
            options=RunOptions(check=20, **options),
        )

    async with a_topic(servers) as topic, Responder(servers, prefix) as service:
        done = await once(topic, TEXTS)
        assert (done.rows, done.failed) == (300, 0)
        assert done.check is not None
        assert done.check.passed
        found = await compacted(servers, topic)
        assert found.keys() == TEXTS.keys()
        for n, (id, text) in enumerate(TEXTS.items()):
            record = found[id]
            assert record is not None
            assert np.array_equal(np.float32(record.pop("vector")), expected(text))
            assert record == {"id": id, "model_version": OLD, "tokens": 2, "year": n}

        service.version = NEW
        changed = dict(list(TEXTS.items())[10:]) | {"new": "new"}
        done = await once(topic, changed, only_changed=True, delete_missing=True)
        assert (done.rows, done.deleted) == (291, 10)
        found = await compacted(servers, topic)
        assert {id for id, record in found.items() if record is None} == set(list(TEXTS)[:10])
        assert {record["model_version"] for record in found.values() if record is not None} == {NEW}
        assert len([record for record in found.values() if record is not None]) == 291


async def test_a_topic_that_does_not_exist_is_not_made(
    servers: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = a_table(tmp_path / "in.parquet", ["one"])

    async with Responder(servers, prefix):
        with pytest.raises(BadTarget, match="nowhere"):
            await run(path, f"kafka:nowhere-{uuid.uuid4().hex[:6]}", servers=servers, topic_prefix=prefix)
