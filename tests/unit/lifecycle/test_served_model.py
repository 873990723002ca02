"""One alias in one object: the parts belong together, and its loops take what they are given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import structlog

from embedq_consumer.batching.batch_runner import AssembledText, ComputedText
from embedq_consumer.batching.single_flight import Settled
from embedq_consumer.engine import Tokens
from embedq_consumer.lifecycle import NoModel
from tests.helpers.fake_models import FakeModel, MakeBench, Vectors
from tests.helpers.in_flight import admitted
from tests.helpers.support import wait_until


class SettledInputs:
    """Keeps the vectors that it is handed; nothing here fails or is chunked."""

    def __init__(self) -> None:
        self.vectors: list[Vectors] = []

    def settle(self, outcomes: Iterable[Settled]) -> None:
        raise AssertionError

    def computed(self, texts: Sequence[ComputedText], vectors: Vectors) -> None:
        self.vectors += list(vectors)

    def assembled(self, texts: Sequence[AssembledText]) -> None:
        raise AssertionError


async def test_texts_that_join_its_queue_are_computed_by_its_model(bench: MakeBench) -> None:
    b = bench()
    await b.model.start(None)
    assert b.sample("batch_items_count") == 0
    job = admitted(model=b.model.encoder(), input=["one", "two"])
    results = SettledInputs()
    async with asyncio.TaskGroup() as tasks:
        loop = tasks.create_task(b.model.run_batches(results, tasks))
        for lane, first in b.model.queue.join([(job, 0), (job, 1)]):
            assert await b.model.queue.tokenize(lane, first) == []
        await wait_until(lambda: len(results.vectors) == 2, what="both vectors")
        loop.cancel()
    assert [vector.tolist() for vector in results.vectors] == [[3.0, 4.0], [3.0, 4.0]]
    assert b.sample("batch_items_sum") == 2


async def test_no_job_is_accepted_while_no_model_serves(bench: MakeBench) -> None:
    with pytest.raises(NoModel):
        bench().model.encoder()


async def test_the_budget_in_force_is_that_of_the_model_that_serves(bench: MakeBench) -> None:
    b = bench()
    assert b.facts == {}  # none was tried yet
    await b.model.start(None)
    assert b.facts == {"max_batch_tokens": 512, "max_text_tokens": 64}
    vectors, _ = await b.model.slot.encode(b.model.slot.loaded.encoder, [Tokens(np.zeros(1, np.int32))])
    assert vectors.shape == (1, 2)


async def test_what_an_operator_should_know_of_a_model_is_logged_as_it_is_loaded(bench: MakeBench) -> None:
    model = FakeModel("sha256:noted")
    model.notes = ("add_eos_token is obeyed",)
    with structlog.testing.capture_logs() as logs:
        await bench(old=[model]).model.start(None)
    [note] = [entry for entry in logs if entry["event"] == "model_note"]
    assert note == {
        "event": "model_note",
        "log_level": "warning",
        "model_version": "sha256:noted",
        "note": "add_eos_token is obeyed",
    }
