"""One micro-batch through a scripted device: what expires, what fails, what comes back whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_consumer.batching.batch_runner import AssembledText, BatchRunner, ComputedText
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.input_errors import EXPIRED_IN_QUEUE
from embedq_consumer.batching.single_flight import Identity, QueuedText, Settled, SingleFlight, Window
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.engine import Chunked, DeviceLost, Encoder, OutOfMemory, Tokens
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import ErrorBody
from tests.helpers.fake_parts import Letters, ScriptedDevice, Vectors
from tests.helpers.in_flight import admitted
from tests.helpers.metric_values import sample_value
from tests.helpers.support import wait_until

LATE = {"mode": "late"}
PASSED = ("deadline", b"1000001")  # a millisecond after the helpers' jobs are admitted, and long ago


class Noted:
    """What the runner handed on."""

    def __init__(self) -> None:
        self.settled: list[Settled] = []
        self.plain: list[tuple[str, list[tuple[JobState, int]], float]] = []
        self.whole: list[AssembledText] = []

    def settle(self, outcomes: Iterable[Settled]) -> None:
        self.settled += outcomes

    def computed(self, texts: Sequence[ComputedText], vectors: Vectors) -> None:
        for (text, waiters), vector in zip(texts, vectors, strict=True):
            self.plain.append((text.identity.text.text, waiters, float(vector[0])))

    def assembled(self, texts: Sequence[AssembledText]) -> None:
        self.whole += texts


class Parts:
    def __init__(self, failure: Callable[[list[str]], Exception | None] = lambda texts: None) -> None:
        self.metrics = Metrics()
        self.flights = SingleFlight()
        self.device: ScriptedDevice = ScriptedDevice(failure)
        self.results = Noted()
        self.batcher = Batcher[QueuedText](
            BatchPolicy(max_tokens=1_000, max_items=100, max_wait=0.0, bulk_max_wait=5.0)
        )
        self.budget = TokenBudget(self.batcher, self.metrics, lambda facts: None)

    async def run(self, *texts: QueuedText) -> float | None:
        runner = BatchRunner(self.flights, self.device, self.budget, self.results, self.metrics)
        return await runner.run(texts)

    def sample(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)

    def queued(self, job: JobState, index: int = 0) -> QueuedText:
        """The text of an input, which waits for it."""
        identity = Identity.of(job, index)
        self.flights.join(identity, (job, index))
        [tokens] = Letters().tokenize([identity.text])
        assert isinstance(tokens, Tokens)
        return QueuedText(identity=identity, tokens=tokens, arrived=0.0)

    def windows(self, job: JobState) -> list[QueuedText]:
        """The windows of a job's only input, which waits for them."""
        identity = Identity.of(job, 0)
        self.flights.join(identity, (job, 0))
        [chunked] = Letters().chunk([identity.text])
        assert isinstance(chunked, Chunked)
        return [
            QueuedText(identity=identity, tokens=tokens, arrived=0.0, window=Window(chunked, number))
            for number, tokens in enumerate(chunked.windows)
        ]


async def test_each_text_is_handed_on_with_its_vector_and_all_who_waited() -> None:
    parts = Parts()
    job, equal = admitted(input=["a", "b"]), admitted(input="b")
    texts = [parts.queued(job, 0), parts.queued(job, 1)]
    parts.queued(equal)
    await parts.run(*texts)
    assert parts.device.ran == [["a", "b"]]
    assert parts.results.plain == [("a", [(job, 0)], ord("a")), ("b", [(job, 1), (equal, 0)], ord("b"))]
    assert parts.results.settled == []
    assert parts.flights.waiters(texts[1].identity) == []
    assert (parts.sample("compute_seconds_count"), parts.sample("compute_seconds_sum")) == (1, 0.5)
    assert parts.sample("tokens_total") == 2


async def test_a_micro_batch_says_how_long_the_device_took_unless_it_failed_or_nobody_waits() -> None:
    parts = Parts(lambda texts: ValueError() if texts == ["a", "b"] else None)
    job = admitted(input=["a", "b", "c"])
    first, second, third = (parts.queued(job, index) for index in range(3))
    assert await parts.run(third) == 0.5
    assert await parts.run(first, second) is None
    assert await parts.run(first) is None
    assert parts.device.ran == [["c"], ["a", "b"], ["a"], ["b"]]


async def test_a_text_that_two_clients_queued_runs_once_in_a_micro_batch_and_not_again_in_the_next() -> None:
    parts = Parts()
    jobs = [admitted(input="a"), admitted(input="a")]
    one, two = (msgspec.structs.replace(parts.queued(job), client=b"%d" % n) for n, job in enumerate(jobs))
    await parts.run(one, two)
    assert parts.device.ran == [["a"]]
    assert parts.results.plain == [("a", [(jobs[0], 0), (jobs[1], 0)], ord("a"))]
    await parts.run(two)
    assert parts.device.ran == [["a"]]


async def test_a_jobs_wait_and_compute_time_are_noted_once_for_each_micro_batch() -> None:
    parts = Parts()
    job = admitted(input=["a", "b", "c"])
    first, second, third = (parts.queued(job, index) for index in range(3))
    await parts.run(first, second)
    waited = job.queue_s
    assert waited is not None
    await parts.run(third)
    assert (job.queue_s, job.compute_s) == (waited, 1.0)
    assert parts.sample("queue_seconds_count", lane="interactive") == 1
    assert parts.sample("queue_seconds_sum", lane="interactive") == waited


async def test_the_device_time_of_a_micro_batch_is_divided_among_its_jobs_by_tokens() -> None:
    """Half a second for `aaa`, `b` and `cc`; the last one is wanted by two jobs, which pay for it together."""
    parts = Parts()
    long, short, equal = admitted(input=["aaa", "b"]), admitted(input="cc"), admitted(input="cc")
    texts = [parts.queued(long, 0), parts.queued(long, 1), parts.queued(short)]
    parts.queued(equal)
    costs = [text.cost for text in texts]
    await parts.run(*texts)
    assert parts.device.ran == [["aaa", "b", "cc"]]
    a_token = 0.5 / sum(costs)
    assert long.device_s == pytest.approx(a_token * (costs[0] + costs[1]))
    assert short.device_s == equal.device_s == pytest.approx(a_token * costs[2] / 2)
    assert [job.compute_s for job in (long, short, equal)] == [0.5] * 3


class GatedDevice(ScriptedDevice):
    """Notes whether the job's wait was counted already, then computes when the gate opens."""

    def __init__(self, job: JobState) -> None:
        super().__init__()
        self.counted: list[bool] = []
        self.gate = asyncio.Event()
        self._job = job

    def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> Coroutine[Any, Any, tuple[Vectors, float]]:
        self.counted.append(self._job.queue_s is not None)
        return self._encode(encoder, batch)

    async def _encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> tuple[Vectors, float]:
        await self.gate.wait()
        return await super().encode(encoder, batch)


async def test_a_run_counts_while_the_device_computes_and_is_over_when_that_is_done() -> None:
    parts = Parts()
    job = admitted(input="a")
    device = parts.device = GatedDevice(job)
    running = asyncio.create_task(parts.run(parts.queued(job)))
    await wait_until(lambda: job.queue_s is not None)
    assert device.counted == [False]
    assert not running.done()
    device.gate.set()
    await running


async def test_an_expired_input_is_settled_and_its_text_does_not_run() -> None:
    parts = Parts()
    expired, live = admitted(PASSED, input="a"), admitted(input="b")
    await parts.run(parts.queued(expired), parts.queued(live))
    assert parts.results.settled == [(expired, 0, EXPIRED_IN_QUEUE)]
    assert parts.device.ran == [["b"]]
    assert expired.queue_s is None


async def test_a_text_that_another_job_still_waits_for_runs() -> None:
    parts = Parts()
    expired, live = admitted(PASSED, input="a"), admitted(input="a")
    text = parts.queued(expired)
    parts.queued(live)
    await parts.run(text)
    assert parts.results.settled == [(expired, 0, EXPIRED_IN_QUEUE)]
    assert parts.results.plain == [("a", [(live, 0)], ord("a"))]


async def test_nothing_runs_where_nothing_waits_any_more() -> None:
    parts = Parts()
    text = parts.queued(admitted(PASSED, input="a"))
    await parts.run(text)
    await parts.run(text)
    assert parts.device.ran == []
    assert len(parts.results.settled) == 1


async def test_a_text_that_fails_is_found_by_halving_and_fails_alone() -> None:
    parts = Parts(lambda texts: ValueError("no") if "c" in texts else None)
    job = admitted(input=["a", "b", "c", "d"])
    await parts.run(*(parts.queued(job, index) for index in range(4)))
    assert parts.device.ran == [["a", "b", "c", "d"], ["a", "b"], ["c", "d"], ["c"], ["d"]]
    assert [text for text, _, _ in parts.results.plain] == ["a", "b", "d"]
    [(failed, index, error)] = parts.results.settled
    assert (failed, index) == (job, 2)
    assert isinstance(error, ErrorBody)
    assert (error.code, error.param, error.retryable) == ("internal", "input[2]", True)
    assert parts.device.failed == 1
    assert parts.sample("batch_splits_total") == 2
    assert parts.sample("tokens_total") == 3
    assert parts.batcher.max_tokens == 1_000


class SpoiledDevice(ScriptedDevice):
    """Where `x` runs, its vector and those of its neighbors are not finite."""

    async def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> tuple[Vectors, float]:
        vectors, seconds = await super().encode(encoder, batch)
        (spoiled,) = np.where(vectors[:, 0] == ord("x"))
        for row in spoiled:
            vectors[max(0, row - 1) : row + 2] = np.nan
        return vectors, seconds


async def test_a_text_that_is_not_finite_fails_alone_whatever_it_does_to_others() -> None:
    parts = Parts()
    parts.device = SpoiledDevice()
    jobs = [admitted(input=letter) for letter in "abxcd"]
    await parts.run(*map(parts.queued, jobs))
    assert parts.device.ran == [["a", "b", "x", "c", "d"], ["b"], ["x"], ["c"]]
    found = {text: value for text, _, value in parts.results.plain}
    assert {text: found[text] for text in "abcd"} == {text: ord(text) for text in "abcd"}
    assert np.isnan(found["x"]), "what is done about it is decided where results are made"
    assert parts.device.failed == 1
    assert parts.sample("batch_splits_total") == 1


async def test_windows_that_are_not_finite_run_again_too() -> None:
    parts = Parts()
    parts.device = SpoiledDevice()
    spoiled, chunked = admitted(input="x"), admitted(input="a" * 12, chunk=LATE)
    windows = parts.windows(chunked)
    await parts.run(windows[0], parts.queued(spoiled), *windows[1:])
    [(_, vectors, _)] = parts.results.whole
    assert np.isfinite(vectors).all()


async def test_a_micro_batch_that_runs_out_of_memory_lowers_the_budget_and_is_halved() -> None:
    parts = Parts(lambda texts: OutOfMemory("no") if len(texts) > 1 else None)
    job = admitted(input=["a" * 200, "b" * 200])
    await parts.run(parts.queued(job, 0), parts.queued(job, 1))
    assert len(parts.results.plain) == 2
    assert parts.device.ran_out == 1
    assert parts.batcher.max_tokens == 200
    assert parts.sample("batch_budget_tokens") == 200


async def test_a_single_text_that_runs_out_of_memory_says_nothing_of_the_budget_in_force() -> None:
    parts = Parts(lambda texts: OutOfMemory("no"))
    await parts.run(parts.queued(admitted(input="a" * 100)))
    assert parts.device.ran_out == 1, "but the trial was wrong"
    assert parts.batcher.max_tokens == 1_000
    assert parts.sample("batch_splits_total") == 0
    assert len(parts.results.settled) == 1


async def test_a_lost_device_is_no_texts_fault() -> None:
    parts = Parts(lambda texts: DeviceLost("gone"))
    job = admitted(input=["a", "b"])
    texts = [parts.queued(job, index) for index in range(2)]
    with pytest.raises(DeviceLost):
        await parts.run(*texts)
    assert parts.device.ran == [["a", "b"]]
    assert parts.results.settled == []
    assert parts.flights.waiters(texts[0].identity) == [(job, 0)]


async def test_windows_are_handed_on_with_the_last_one_and_other_texts_at_once() -> None:
    parts = Parts()
    late, plain = admitted(input="abcdefg", chunk=LATE), admitted(input="x")
    first, second = parts.windows(late)
    await parts.run(first, parts.queued(plain))
    assert parts.results.whole == []
    assert parts.results.plain == [("x", [(plain, 0)], ord("x"))]
    await parts.run(second)
    [(text, rows, waiters)] = parts.results.whole
    assert (text, waiters) == (second, [(late, 0)])
    assert np.array_equal(rows[:, 0], [ord("a"), ord("e")])
    assert len(parts.results.plain) == 1
    assert late.compute_s == 1.0


async def test_a_micro_batch_of_windows_alone_computes_no_other_text() -> None:
    parts = Parts()
    await parts.run(*parts.windows(admitted(input="abcdefg", chunk=LATE)))
    assert len(parts.results.whole) == 1
    assert parts.results.plain == []
