"""Inputs on their way to a micro-batch: who joins, what is tokenized in one call, what is settled before it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.single_flight import Identity, QueuedText, Settled, SingleFlight
from embedq_consumer.batching.text_queue import TextQueue
from embedq_consumer.batching.token_budget import Budget, TokenBudget
from embedq_consumer.engine import Failed, Text, TextTooLong, Tokens
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import Lane
from tests.helpers.fake_parts import Letters
from tests.helpers.in_flight import admitted


class Parts:
    """A text queue and what is around it."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.flights = SingleFlight()
        self.policy = BatchPolicy[QueuedText](
            max_tokens=10_000, max_items=1024, max_wait=0.0, bulk_max_wait=5.0
        )
        batcher = Batcher[QueuedText](self.policy)
        self.budget = TokenBudget(batcher, self.metrics, lambda facts: None)
        self.queue = TextQueue(self.flights, batcher, self.budget, self.metrics)

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"embedq_{name}")

    def queued(self) -> list[QueuedText]:
        return self.policy.take(time.monotonic())

    async def add(self, *jobs: JobState) -> list[Settled]:
        """All inputs of these jobs."""
        settled: list[Settled] = []
        inputs = [(job, index) for job in jobs for index in range(len(job.request.texts))]
        for lane, first in self.queue.join(inputs):
            assert {identity.lane for identity, _ in first} == {lane}
            settled += await self.queue.tokenize(lane, first)
        return settled


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    found = Parts()
    yield found
    await asyncio.to_thread(found.queue.close)


def in_lane(job: JobState, lane: Lane) -> JobState:
    return JobState(msgspec.structs.replace(job.record, lane=lane), job.headers, job.request, job.encoder)


async def test_a_text_is_tokenized_and_waits_for_a_micro_batch(parts: Parts) -> None:
    job = admitted(input=["abc", "de"], model=Letters())
    assert await parts.add(job) == []
    assert [(text.tokens.ids.tolist(), text.lane, text.window) for text in parts.queued()] == [
        ([97, 98, 99], "interactive", None),
        ([100, 101], "interactive", None),
    ]
    assert job.tokenize_s is not None
    assert parts.sample("tokenize_seconds_count") == 1


async def test_equal_inputs_are_tokenized_once_and_the_others_are_counted(parts: Parts) -> None:
    model = Letters()
    jobs = [admitted(input=["a", "b"], model=model), admitted(input=["b", "a", "c"], model=model)]
    await parts.add(*jobs)
    assert model.calls == [["a", "b", "c"]]
    assert parts.sample("deduplicated_total") == 2
    assert len(parts.queued()) == 3


async def test_equal_inputs_of_two_lanes_do_not_wait_for_each_other(parts: Parts) -> None:
    model = Letters()
    job = admitted(input="a", model=model)
    await parts.add(in_lane(job, "bulk"), job)
    assert model.calls == [["a"], ["a"]]
    assert [text.lane for text in parts.queued()] == ["interactive", "bulk"]
    assert parts.sample("deduplicated_total") == 0


async def test_one_call_of_the_tokenizer_has_at_most_256_texts(parts: Parts) -> None:
    model = Letters()
    await parts.add(admitted(input=[str(number) for number in range(600)], model=model))
    assert [len(call) for call in model.calls] == [256, 256, 88]


async def test_one_call_of_the_tokenizer_has_at_most_a_million_characters_with_their_prompts(
    parts: Parts,
) -> None:
    model = Letters(1_000_000)
    texts = [letter * 330_000 for letter in "abcd"]
    await parts.add(admitted(input=texts, input_type="query", model=model))
    assert [len(call) for call in model.calls] == [3, 1]


async def test_a_text_that_is_too_long_settles_all_who_wait_for_it_and_is_not_queued(parts: Parts) -> None:
    model = Letters(max_tokens=3)
    one, two = admitted(input="long", model=model), admitted(input=["b", "long"], model=model)
    settled = await parts.add(one, two)
    assert [(job, index) for job, index, _ in settled] == [(one, 0), (two, 1)]
    errors = [outcome for _, _, outcome in settled if isinstance(outcome, ErrorBody)]
    assert [(error.code, error.param) for error in errors] == [
        ("text_too_long", "input"),
        ("text_too_long", "input[1]"),
    ]
    assert [text.tokens.ids.tolist() for text in parts.queued()] == [[ord("b")]]
    assert parts.flights.waiters(Identity.of(one, 0)) == []


async def test_a_text_beyond_the_devices_memory_is_settled(parts: Parts) -> None:
    parts.budget.serve(Budget(tokens=100, longest=3))
    [(_, _, error)] = await parts.add(admitted(input="long", model=Letters()))
    assert isinstance(error, ErrorBody)
    assert error.code == "text_too_long"
    assert "memory" in error.message
    assert parts.queued() == []


async def test_a_chunked_text_is_queued_in_windows(parts: Parts) -> None:
    await parts.add(admitted(input="abcdefg", chunk={"mode": "late"}, model=Letters()))
    found = parts.queued()
    assert ["".join(map(chr, text.tokens.ids)) for text in found] == ["abcd", "efg"]
    assert [text.window.number for text in found if text.window is not None] == [0, 1]


async def test_a_text_that_the_tokenizer_cannot_read_costs_its_neighbors_nothing(parts: Parts) -> None:
    class Fragile(Letters):
        def tokenize(  # type: ignore[override]  # this one's texts may fail
            self, texts: Sequence[Text]
        ) -> list[Tokens | TextTooLong | Failed]:
            return [
                Failed("panicked") if text.text == "bad" else found
                for text, found in zip(texts, super().tokenize(texts), strict=True)
            ]

    settled = await parts.add(admitted(input=["abc", "bad", "de"], model=Fragile()))
    assert [(index, error.code) for _, index, error in settled if isinstance(error, ErrorBody)] == [
        (1, "invalid_value")
    ]
    assert len(parts.queued()) == 2
    assert parts.queue.busy_since is None
