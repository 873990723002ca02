"""The real service is reloaded in the middle of a run: whatever was asked for, no output has vectors of two models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from embedq_batch import Columns, RowBatch, RunOptions, run
from embedq_batch.errors import ModelChanged
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.manifest.plan import OnModelChange
from embedq_batch.manifest.store import glance
from embedq_batch.sources.parquet import ParquetSource
from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_sdk.admin.control import reload_model
from embedq_sdk.dev import DevStack
from embedq_shared.vectors import cut_and_normalize
from tests.helpers.batch_runs import a_table, vectors_in
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, replicas
from tests.helpers.support import patient
from tests.helpers.tiny_models import make_tiny_bert

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS: Final = [f"row {n} of the table" for n in range(3000)]
IN_FLIGHT: Final = 64
"""One job: when the third batch is asked for, nearly all of the first one is answered."""


class Held(ParquetSource):
    """A table whose third batch comes when it may."""

    def __init__(self, path: str) -> None:
        super().__init__([path], Columns(id="id"))
        self.reached, self.may_go_on = threading.Event(), threading.Event()

    def batches(self) -> Iterator[RowBatch]:
        for n, batch in enumerate(super().batches()):
            if n == 2:
                self.reached.set()
                self.may_go_on.wait(patient(200))
            yield batch


def own(model: Path) -> tuple[str, dict[int, npt.NDArray[np.float32]]]:
    """A model's version, and its own vector of each row, computed here."""
    encoder = load_encoder(model, device="cpu", threads=1)
    found: dict[int, npt.NDArray[np.float32]] = {}
    tokenized = encoder.tokenize([Text(text) for text in TEXTS])
    for start in range(0, len(TEXTS), 256):
        some = [each.ids for each in tokenized[start : start + 256] if isinstance(each, Tokens)]
        whole = enumerate(encoder.encode(some), start)
        found.update((n, cut_and_normalize(vector, len(vector))) for n, vector in whole)
    encoder.close()
    return encoder.model_version, found


def assert_of_one_model(path: Path, vectors: dict[int, npt.NDArray[np.float32]]) -> None:
    found = vectors_in(path)
    assert found.keys() == vectors.keys()
    for id, vector in vectors.items():
        np.testing.assert_allclose(found[id], vector, atol=1e-5)


async def test_whatever_a_reload_of_the_service_is_to_mean_an_output_has_vectors_of_one_model(
    stack: DevStack, tmp_path: Path
) -> None:
    models = [make_tiny_bert(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (a, of_a), (b, of_b) = [await asyncio.to_thread(own, model) for model in models]
    topics = await make_topics(stack, fresh_prefix())
    path = a_table(tmp_path / "in.parquet", TEXTS, id=range(len(TEXTS)))
    both = [Replica(stack, topics, models[0], tmp_path / f"{n}.log", redis=False) for n in (1, 2)]

    async def reloaded(model: Path) -> None:
        async for update in reload_model(stack.kafka_servers, str(model), topic_prefix=topics.prefix):
            last = update
        assert last.ok

    async def run_with_a_reload(out: Path, policy: OnModelChange, model: Path) -> str:
        """A run in whose middle all replicas change to this model."""
        source = Held(path)
        task = asyncio.create_task(
            run(
                source,
                str(out),
                servers=stack.kafka_servers,
                topic_prefix=topics.prefix,
                options=RunOptions(on_model_change=policy, in_flight=IN_FLIGHT, check=50),
            )
        )
        try:
            assert await asyncio.to_thread(source.reached.wait, patient(60))
            await reloaded(model)
        finally:
            source.may_go_on.set()
        summary = await task
        assert summary.check is not None
        assert summary.check.passed
        assert summary.rows == len(TEXTS)
        assert summary.embedded > len(TEXTS)  # those of the model before were done again
        return summary.model_version

    async with replicas(*both):
        out = tmp_path / "finish.parquet"
        assert await run_with_a_reload(out, "finish", models[1]) == b
        assert_of_one_model(out, of_b)

        out = tmp_path / "restart.parquet"
        assert await run_with_a_reload(out, "restart", models[0]) == a
        assert_of_one_model(out, of_a)

        out = tmp_path / "stop.parquet"
        with pytest.raises(ModelChanged) as stopped:
            await run_with_a_reload(out, "stop", models[1])
        assert (stopped.value.old, stopped.value.new) == (a, b)
        assert not out.exists()
        _, state, figures = await asyncio.to_thread(glance, tmp_path / "stop.parquet.embedq" / MANIFEST)
        assert not state.complete
        assert figures.versions.keys() == {a}
        assert 0 < figures.done < len(TEXTS)

        again = await run(
            ParquetSource([path], Columns(id="id")),
            str(out),
            servers=stack.kafka_servers,
            topic_prefix=topics.prefix,
        )
        assert again.model_version == b
        assert_of_one_model(out, of_b)
