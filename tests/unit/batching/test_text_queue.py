"""Inputs on their way to a micro-batch: who joins, what is tokenized in one call, what is settled before it runs."""

from __future__ import annotations

import asyncio
import threading
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
from tests.helpers.metric_values import sample_value


class Parts:
    """A text queue and what is around it."""

    def __init__(self, max_wait: float = 0.0) -> None:
        self.metrics = Metrics()
        self.flights = SingleFlight()
        self.policy = BatchPolicy[QueuedText](
            max_tokens=10_000, max_items=1024, max_wait=max_wait, bulk_max_wait=5.0
        )
        batcher = Batcher[QueuedText](self.policy)
        self.budget = TokenBudget(batcher, self.metrics, lambda facts: None)
        self.queue = TextQueue(self.flights, batcher, self.budget, self.metrics)

    def sample(self, name: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}")

    def queued(self) -> list[QueuedText]:
        return self.policy.take(time.monotonic())

    async def add(self, *jobs: JobState) -> list[Settled]:
        """All inputs of these jobs."""
        settled: list[Settled] = []
        self.queue.join([(job, index) for job in jobs for index in job.distinct])
        while (call := self.queue.next_call()) is not None:
            assert len({identity.lane for identity, _ in call}) == 1
            settled += await self.queue.tokenize(call)
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


async def lacked(parts: Parts) -> None:
    """The cache lacked a text, which runs."""
    await parts.add(admitted(input=["lacked"], model=Letters()))
    for text in parts.queued():
        parts.flights.resolve(text.identity)


async def test_a_few_texts_are_tokenized_while_the_cache_is_asked_and_not_again_once_it_lacks_them(
    parts: Parts,
) -> None:
    await lacked(parts)
    model = Letters()
    job = admitted(input=["abc", "de"], model=model)
    inputs = [(job, index) for index in job.distinct]
    early = parts.queue.begin_early(inputs)
    assert early is not None
    parts.queue.join(inputs, early)
    call = parts.queue.next_call()
    assert call is not None
    assert await parts.queue.tokenize(call) == []
    assert model.calls == [["abc", "de"]]
    assert [text.tokens.ids.tolist() for text in parts.queued()] == [[97, 98, 99], [100, 101]]
    assert job.tokenize_s is not None
    assert parts.sample("tokenize_seconds_count") == 2


async def test_of_texts_that_were_tokenized_early_the_cache_may_have_some(parts: Parts) -> None:
    await lacked(parts)
    model = Letters()
    job = admitted(input=["abc", "de"], model=model)
    early = parts.queue.begin_early([(job, 0), (job, 1)])
    assert early is not None
    parts.queue.join([(job, 1)], early)
    call = parts.queue.next_call()
    assert call is not None
    await parts.queue.tokenize(call)
    assert model.calls == [["abc", "de"], ["de"]]
    assert [text.tokens.ids.tolist() for text in parts.queued()] == [[100, 101]]


async def test_while_the_cache_has_every_text_nothing_is_tokenized_early(parts: Parts) -> None:
    job = admitted(input=["a"], model=Letters())
    assert parts.queue.begin_early([(job, 0)]) is None
    await lacked(parts)
    early = parts.queue.begin_early([(job, 0)])
    assert early is not None
    await asyncio.wait([early.found])
    assert parts.queue.begin_early([(job, 0)]) is None
    await lacked(parts)
    again = parts.queue.begin_early([(job, 0)])
    assert again is not None
    await asyncio.wait([again.found])


@pytest.mark.parametrize("texts", [["x"] * 0, [str(number) for number in range(5)], ["x" * 2_001]])
async def test_no_more_than_a_few_short_texts_are_tokenized_early(parts: Parts, texts: list[str]) -> None:
    await lacked(parts)
    job = admitted(input=texts or ["x"], model=Letters(10_000))
    assert parts.queue.begin_early([(job, index) for index in range(len(texts))]) is None


async def test_nothing_is_tokenized_early_beside_another_call_or_a_text_that_is_under_way(
    parts: Parts,
) -> None:
    job = admitted(input=["a"], model=Letters())
    parts.queue.join([(job, 0)])
    other = admitted(input=["b"], model=job.encoder)
    call = parts.queue.next_call()
    assert call is not None
    assert parts.queue.begin_early([(other, 0)]) is None
    await parts.queue.tokenize(call)
    assert parts.queue.begin_early([(job, 0)]) is None
    early = parts.queue.begin_early([(other, 0)])
    assert early is not None
    await asyncio.wait([early.found])


async def test_what_fails_when_it_is_tokenized_early_fails_where_it_is_needed(parts: Parts) -> None:
    class Broken(Letters):
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
            raise RuntimeError("broken")

    await lacked(parts)
    job = admitted(input=["a"], model=Broken())
    early = parts.queue.begin_early([(job, 0)])
    assert early is not None
    parts.queue.join([(job, 0)], early)
    call = parts.queue.next_call()
    assert call is not None
    with pytest.raises(RuntimeError, match="broken"):
        await parts.queue.tokenize(call)


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


async def test_texts_wait_for_others_that_are_still_at_the_tokenizer_and_the_last_ones_for_nobody() -> None:
    parts = Parts(max_wait=3600.0)
    parts.policy.idle = True
    job = admitted(input=[str(number) for number in range(300)], model=Letters())
    parts.queue.join([(job, index) for index in job.distinct])
    first = parts.queue.next_call()
    assert first is not None
    await parts.queue.tokenize(first)
    assert parts.queued() == []
    last = parts.queue.next_call()
    assert last is not None
    await parts.queue.tokenize(last)
    assert len(parts.queued()) == 300
    await asyncio.to_thread(parts.queue.close)


async def test_one_call_of_the_tokenizer_has_at_most_256_texts(parts: Parts) -> None:
    model = Letters()
    await parts.add(admitted(input=[str(number) for number in range(600)], model=model))
    assert [len(call) for call in model.calls] == [256, 256, 88]


async def test_one_call_of_the_tokenizer_has_at_most_256_000_characters_with_their_prompts(
    parts: Parts,
) -> None:
    model = Letters(1_000_000)
    texts = [letter * 85_000 for letter in "abcd"]
    await parts.add(admitted(input=texts, input_type="query", model=model))
    assert [len(call) for call in model.calls] == [3, 1]


class Gated(Letters):
    """A tokenizer that notes which texts it begins with, and waits at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        found = super().tokenize(texts)
        assert self.gate.wait(30)
        return found


def calls_of(parts: Parts) -> list[asyncio.Task[list[Settled]]]:
    """As many calls as may be under way at once."""
    found = []
    while (call := parts.queue.next_call()) is not None:
        found.append(asyncio.create_task(parts.queue.tokenize(call)))
    return found


@pytest.mark.parametrize(
    ("lane", "client"), [("interactive", b"new"), ("bulk", b"new"), ("interactive", b"")]
)
async def test_a_text_that_comes_waits_for_few_calls_of_the_tokenizer(
    parts: Parts, lane: Lane, client: bytes
) -> None:
    """Another client's, or an interactive one beside a backlog of bulk texts."""
    model = Gated()
    flooding: Lane = "bulk" if client == b"" else lane
    flood = in_lane(admitted(input=[f"flood {number}" for number in range(2000)], model=model), flooding)
    parts.queue.join([(flood, index) for index in flood.distinct])
    under_way = calls_of(parts)
    assert len(under_way) == 3
    late = in_lane(admitted(input="late", model=model), lane)
    late.record = msgspec.structs.replace(late.record, client=client)
    parts.queue.join([(late, 0)])
    model.gate.set()
    await asyncio.gather(*under_way)
    [call, *_] = calls_of(parts)
    await call
    place = next(at for at, texts in enumerate(model.calls) if "late" in texts)
    assert place == 3


async def test_a_text_for_which_nobody_waits_any_more_is_not_tokenized(parts: Parts) -> None:
    model = Letters()
    expired, live = (
        admitted(("deadline", b"1000001"), input=["a", "b"], model=model),
        admitted(input="b", model=model),
    )
    settled = await parts.add(expired, live)
    assert model.calls == [["b"]]
    assert [(job, index) for job, index, _ in settled] == [(expired, 0), (expired, 1)]
    assert {outcome.code for _, _, outcome in settled if isinstance(outcome, ErrorBody)} == {"expired"}
    assert await parts.add(admitted(("deadline", b"1000001"), input="c", model=model)) != []
    assert model.calls == [["b"]]
    assert parts.queue.next_call() is None


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
