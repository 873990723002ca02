"""A job's whole path with dumb parts around it: from polled records to finished ones, without broker, Redis or model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from aiokafka.errors import MessageSizeTooLargeError
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_consumer.batching import ComputedText, Vectors
from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batch_runner import BatchRunner
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.head_start import HeadStart
from embedq_consumer.batching.single_flight import Identity, QueuedText, SingleFlight
from embedq_consumer.batching.text_queue import TextQueue
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.cache import CachedVector, cache_key
from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.engine import DeviceLost, Encoder, Text, Tokens
from embedq_consumer.fairness import BulkTurns, Cost, InteractiveTraffic
from embedq_consumer.group import Overtaken
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.intake.records import Record
from embedq_consumer.pipeline import Pipeline
from embedq_consumer.shapes import Want
from embedq_consumer.shapes.registry.schemas import Fetch, Given, JsonReader, Reader, Registration
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.headers import value_of
from embedq_shared.topics import Lane
from tests.helpers.fake_parts import DictCache, Letters, ScriptedDevice, ScriptedSink
from tests.helpers.in_flight import TOPICS, VERSION, admitted, record, rules
from tests.helpers.metric_values import sample_value
from tests.helpers.shapes import mappings_of
from tests.helpers.support import wait_until

OTHER = "sha256:" + "cd" * 32
LIMITS = DeliveryLimits(reply_timeout_s=15)
Refusal = Callable[[Outgoing], Exception | None]


class Parts:
    """Everything between the poll loop and Kafka, with fakes at the edges."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        device: ScriptedDevice,
        refusal: Refusal,
        turns: BulkTurns | None,
        **settings: Any,
    ) -> None:
        self.metrics = Metrics()
        self.model = Letters(max_tokens=20)
        self.device = device
        self.sink = ScriptedSink(refusal)
        self.cache = DictCache()
        encoder = ResultEncoder(TOPICS, "group", 900_000)
        self.weighed: dict[int, Cost] = {}
        self.models: dict[str, Encoder] = {"default": self.model}
        self.queues: dict[str, TextQueue] = {}
        self.deliverer = Deliverer(
            encoder, self.sink, self.sink.finish, self.metrics, LIMITS, bulk_turns=turns
        )
        self.pipeline = Pipeline(
            rules(**settings),
            lambda: self.models,
            self.cache,
            self.queues,
            self.deliverer,
            tasks,
            self.weigh,
        )
        self.loops: list[asyncio.Task[None]] = []
        self.queue = self.serve("default", self.model, tasks)

    def serve(self, alias: str, model: Encoder, tasks: asyncio.TaskGroup) -> TextQueue:
        """An alias with a queue and micro-batches of its own."""
        batcher = Batcher[QueuedText](
            BatchPolicy(max_tokens=100, max_items=100, max_wait=0.0, bulk_max_wait=5.0)
        )
        budget = TokenBudget(batcher, self.metrics, lambda facts: None)
        flights = SingleFlight()
        self.models[alias] = model
        head_start, start = HeadStart(), self.device.start
        self.queues[alias] = TextQueue(flights, batcher, budget, self.metrics, head_start, start)
        runner = BatchRunner(flights, self.device, budget, self.pipeline, self.metrics)
        loop = BatchLoop(batcher, runner.run, self.metrics, tasks, head_start=head_start)
        self.loops.append(tasks.create_task(loop.run()))
        return self.queues[alias]

    def weigh(self, found: Record, cost: Cost) -> None:
        assert found.ticket.offset not in self.weighed, "weighed twice"
        self.weighed[found.ticket.offset] = cost

    async def finished(self, *offsets: int) -> None:
        """Wait until these records are finished, and no others."""
        await wait_until(lambda: sorted(self.sink.finished) == sorted(offsets), what=f"{offsets} finished")

    def sample(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)


@asynccontextmanager
async def running(
    device: ScriptedDevice | None = None,
    refusal: Refusal = lambda record: None,
    turns: BulkTurns | None = None,
    **settings: Any,
) -> AsyncIterator[Parts]:
    async with asyncio.TaskGroup() as tasks:
        parts = Parts(tasks, device or ScriptedDevice(), refusal, turns, **settings)
        try:
            yield parts
        finally:
            for loop in parts.loops:
                loop.cancel()
            for queue in parts.queues.values():
                await asyncio.to_thread(queue.close)
            await asyncio.to_thread(parts.deliverer.close)


def job(offset: int, *headers: tuple[str, bytes], **fields: Any) -> Record:
    return record(json.dumps({"dimensions": 32} | fields).encode(), *headers, offset=offset)


def computed(offset: int, lane: Lane) -> ComputedText:
    """A text that ran, of a job of one input."""
    of = admitted(input=f"text {offset}", id=f"{offset}")
    state = JobState(
        msgspec.structs.replace(of.record, lane=lane, ticket=record(offset=offset).ticket),
        of.headers,
        of.request,
        of.encoder,
    )
    state.keys[0] = b"%d" % offset
    tokens = Tokens(np.array([1, 2], dtype=np.int32))
    return QueuedText(identity=Identity.of(state, 0), tokens=tokens, arrived=0.0), [(state, 0)]


def body(outgoing: Outgoing) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(outgoing.value or b"")
    return found


def entry(truncated: Any = "") -> CachedVector:
    return CachedVector(tokens=2, truncated=truncated, scale=None, vector=b"\0" * 128)


def key(text: str, **fields: Any) -> bytes:
    return cache_key(VERSION, Text(text, **fields), 32, "float32")


async def test_polled_jobs_are_computed_published_and_finished() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input=["ab", "c"], id="one"), job(2, input="d", id="two")])
        await parts.finished(1, 2)
        results = {body(sent)["id"]: body(sent) for sent in parts.sink.to(TOPICS.results)}
        assert [datum["tokens"] for datum in results["one"]["data"]] == [2, 1]
        assert [datum["cached"] for datum in results["one"]["data"]] == [False, False]
        assert len(results["two"]["data"]) == 1
        assert parts.device.ran == [["ab", "c", "d"]]
        assert parts.sample("jobs_total", lane="interactive", status="ok") == 2


async def test_each_job_is_run_by_the_model_of_its_alias_and_no_micro_batch_has_texts_of_two() -> None:
    async with asyncio.TaskGroup() as tasks, running() as parts:
        small = Letters(hidden_size=64)
        small.model_version = OTHER
        parts.serve("small", small, tasks)
        jobs = [job(1, input=["a", "b"], id="one"), job(2, input="a", id="two", model="small")]
        parts.pipeline.take([*jobs, job(3, input="a", id="three", model="none")])
        await parts.finished(1, 2, 3)
        results = {body(sent)["id"]: body(sent) for sent in parts.sink.to(TOPICS.results)}
    assert {id: results[id]["model"] for id in results} == {"one": "default", "two": "small", "three": "none"}
    assert (results["one"]["model_version"], results["two"]["model_version"]) == (VERSION, OTHER)
    assert results["three"]["error"]["code"] == "unknown_model"
    assert sorted(parts.device.ran) == [["a"], ["a", "b"]]
    assert (parts.model.calls, small.calls) == ([["a", "b"]], [["a"]])


async def test_a_pinned_job_says_which_version_is_served_instead() -> None:
    async with running() as parts:
        parts.pipeline.take(
            [job(1, input="a", model_version=OTHER), job(2, input="a", model_version=VERSION)]
        )
        await parts.finished(1, 2)
        refused, answered = sorted(
            (body(sent) for sent in parts.sink.to(TOPICS.results)), key=lambda one: one["object"]
        )
    assert (refused["error"]["code"], refused["model_version"]) == ("unknown_model_version", VERSION)
    assert answered["model_version"] == VERSION
    assert parts.device.ran == [["a"]]


async def test_an_interactive_job_is_answered_while_the_bulk_ones_of_its_micro_batch_wait_for_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, in_thread = asyncio.Event(), Deliverer.in_thread

    async def gated(deliverer: Deliverer, lane: Lane, work: Callable[..., Any], *args: Any) -> Any:
        if lane == "bulk":
            await gate.wait()
        return await in_thread(deliverer, lane, work, *args)

    monkeypatch.setattr(Deliverer, "in_thread", gated)
    async with running() as parts:
        texts = [computed(number, "bulk") for number in range(1, 6)] + [computed(6, "interactive")]
        parts.pipeline.computed(texts, np.ones((6, 256), np.float32))
        await parts.finished(6)
        gate.set()
        await parts.finished(1, 2, 3, 4, 5, 6)


async def test_beside_interactive_work_bulk_outcomes_come_in_turns_and_need_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*args: Any) -> Any:
        raise AssertionError("a thread would contend with interactive work for Python's lock")

    monkeypatch.setattr(Deliverer, "in_thread", never)
    traffic = InteractiveTraffic()
    traffic.note(time.monotonic())
    async with running(turns=BulkTurns(traffic)) as parts:
        parts.pipeline.computed(
            [computed(number, "bulk") for number in range(300)], np.ones((300, 256), np.float32)
        )
        most = 0
        while len(parts.sink.finished) < 300:
            before = len(parts.sink.sent)
            await asyncio.sleep(0)
            most = max(most, len(parts.sink.sent) - before)
        assert most <= 32


async def test_equal_texts_of_one_poll_are_computed_once() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input=["a", "a"]), job(2, input="a")])
        await parts.finished(1, 2)
        assert parts.device.ran == [["a"]]
        assert parts.sample("deduplicated_total") == 2
        assert parts.sample("inputs_total", lane="interactive") == 3


async def test_a_text_in_windows_is_answered_when_the_last_one_ran() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input="abcdefg", chunk={"mode": "late"})])
        await parts.finished(1)
        [result] = parts.sink.to(TOPICS.results)
        assert [datum["span"] for datum in body(result)["data"]] == [[0, 4], [4, 7]]
        assert parts.cache.asked == []
        assert parts.cache.entries == {}


async def test_equal_inputs_of_a_job_are_looked_up_tokenized_computed_and_kept_once() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input=["a"] * 2048)])
        await parts.finished(1)
        assert parts.cache.asked == [key("a")]
        assert parts.model.calls == [["a"]]
        assert parts.device.ran == [["a"]]
        found = [datum for sent in parts.sink.to(TOPICS.results) for datum in body(sent)["data"]]
        assert [datum["index"] for datum in found] == list(range(2048))
        assert len({json.dumps(datum["embedding"]) for datum in found}) == 1
        assert parts.weighed[1].texts == 1
        assert parts.sample("deduplicated_total") == 2047
        assert parts.sample("inputs_total", lane="interactive") == 2048
        await wait_until(lambda: list(parts.cache.entries) == [key("a")])


async def test_a_job_is_weighed_before_the_next_record_is_drawn() -> None:
    async with running() as parts:
        weighed_at: list[list[int]] = []

        def records() -> Iterator[Record]:
            for offset in (1, 2, 3):
                weighed_at.append(list(parts.weighed))
                yield job(offset, input=["a", "b"])

        parts.pipeline.take(records())
        assert weighed_at == [[], [1], [1, 2]]
        assert parts.weighed[3] == Cost(2, 2 * (192 + 32 * 16))
        await parts.finished(1, 2, 3)


async def test_a_record_that_is_no_job_weighs_nothing() -> None:
    async with running() as parts:
        parts.pipeline.take([record(b"junk", offset=1)])
        await parts.finished(1)
        assert parts.weighed == {}


async def test_a_job_that_expires_before_it_is_tokenized_costs_no_tokenizing() -> None:
    async with running() as parts:
        later = b"%d" % int(time.time() * 1000 + 300)
        parts.cache.readable.clear()
        parts.pipeline.take([job(1, ("deadline", later), input=["a", "b"]), job(2, input="b")])
        await wait_until(lambda: time.time() * 1000 > int(later), what="the deadline's passing")
        parts.cache.readable.set()
        await parts.finished(1, 2)
        assert parts.model.calls == [["b"]]
        [error] = [
            body(sent)["error"] for sent in parts.sink.to(TOPICS.results) if body(sent)["id"] != "t.jobs-3-2"
        ]
        assert error["code"] == "expired"


async def test_a_client_that_comes_is_tokenized_and_computed_beside_another_ones_flood() -> None:
    async with running() as parts:
        flood = [
            msgspec.structs.replace(job(n, input=[f"f{n}.{at}" for at in range(60)]), client=b"flood")
            for n in range(100)
        ]
        parts.pipeline.take(flood)
        parts.pipeline.take([msgspec.structs.replace(job(1000, input="new"), client=b"new")])
        await parts.finished(*range(100), 1000)
        before = [text for batch in parts.device.ran for text in batch].index("new")
        # What calls of the tokenizer and micro-batches were under way, of 6,000.
        assert before <= 4 * 256 + 4 * 25
        assert sum(len(batch) for batch in parts.device.ran) == 6001


# -- the cache --------------------------------------------------------------------------------------------------------


async def test_what_the_cache_holds_is_answered_without_the_model_and_not_written_again() -> None:
    async with running() as parts:
        known = parts.cache.entries[key("a")] = entry()
        parts.pipeline.take([job(1, input=["a", "b"])])
        await parts.finished(1)
        [result] = parts.sink.to(TOPICS.results)
        assert [datum["cached"] for datum in body(result)["data"]] == [True, False]
        assert parts.device.ran == [["b"]]
        await wait_until(lambda: set(parts.cache.entries) == {key("a"), key("b")})
        assert parts.cache.entries[key("a")] is known


async def test_a_job_whose_every_text_is_cached_is_answered_at_once() -> None:
    async with running() as parts:
        parts.cache.entries[key("a")] = entry()
        parts.pipeline.take([job(1, input="a")])
        await parts.finished(1)
        assert parts.device.ran == []
        assert parts.model.calls == []


async def test_a_lone_jobs_text_is_tokenized_while_the_cache_is_asked_for_it() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input="a")])
        await parts.finished(1)
        parts.cache.readable.clear()
        parts.pipeline.take([job(2, input="b")])
        await wait_until(lambda: parts.model.calls == [["a"], ["b"]], what="b tokenized")
        assert parts.sink.finished == [1]
        parts.cache.readable.set()
        await parts.finished(1, 2)
        assert parts.model.calls == [["a"], ["b"]]


@asynccontextmanager
async def quick() -> AsyncIterator[Parts]:
    """A device on which a short text is known to take 5 ms, and a cache that lacked one, and that answers nothing more by itself."""
    async with running(ScriptedDevice(seconds=0.005)) as parts:
        parts.pipeline.take([job(0, input="first")])
        await parts.finished(0)
        await wait_until(lambda: list(parts.cache.entries) == [key("first")])
        parts.cache.readable.clear()
        yield parts
        parts.cache.readable.set()
        parts.device.gate.set()


def result_of(parts: Parts, number: int) -> Any:
    """The only vector of one of the results."""
    [datum] = body(parts.sink.to(TOPICS.results)[number])["data"]
    return datum


async def test_a_lone_short_text_runs_while_the_cache_is_asked_for_it_and_is_kept_there() -> None:
    async with quick() as parts:
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]], what="a ran")
        parts.pipeline.take([job(2, input="b")])
        assert parts.device.started == ["a"], "once for each that the cache lacked"
        parts.cache.readable.set()
        await parts.finished(0, 1, 2)
        assert [result_of(parts, number)["cached"] for number in (1, 2)] == [False, False]
        assert parts.device.ran == [["first"], ["a"], ["b"]]
        await wait_until(lambda: set(parts.cache.entries) == {key("first"), key("a"), key("b")})
        parts.pipeline.take([job(3, input="c")])
        assert parts.device.started == ["a", "c"]
        await parts.finished(0, 1, 2, 3)


async def test_a_hit_that_comes_before_the_vector_answers_and_the_vector_is_dropped() -> None:
    async with quick() as parts:
        known = parts.cache.entries[key("a")] = entry()
        parts.device.gate.clear()
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]], what="a runs")
        parts.cache.readable.set()
        await parts.finished(0, 1)
        assert result_of(parts, 1)["cached"] is True
        parts.device.gate.set()
        parts.pipeline.take([job(2, input="d")])
        await parts.finished(0, 1, 2)
        assert len(parts.sink.to(TOPICS.results)) == 3
        assert parts.cache.entries[key("a")] is known


async def test_a_hit_that_comes_after_the_vector_answers_nevertheless() -> None:
    async with quick() as parts:
        known = parts.cache.entries[key("a")] = entry()
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]] and parts.queue.idle, what="a ran")
        assert parts.sink.finished == [0]
        parts.cache.readable.set()
        await parts.finished(0, 1)
        assert result_of(parts, 1)["cached"] is True
        parts.pipeline.take([job(2, input="a")])
        await parts.finished(0, 1, 2)
        assert len(parts.sink.to(TOPICS.results)) == 3
        assert parts.cache.entries[key("a")] is known


async def test_after_a_hit_nothing_runs_in_vain_until_the_cache_lacks_a_text() -> None:
    async with quick() as parts:
        parts.cache.entries[key("a")] = entry()
        parts.device.gate.clear()
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]], what="a runs")
        parts.cache.readable.set()
        await parts.finished(0, 1)
        parts.device.gate.set()
        for offset in (2, 3):
            parts.pipeline.take([job(offset, input="a")])
            await parts.finished(0, *range(1, offset + 1))
        assert parts.device.ran == [["first"], ["a"]]
        assert parts.model.calls == [["first"], ["a"]]


async def test_an_equal_text_of_another_job_gets_the_vector_that_a_hit_had_made_needless() -> None:
    async with quick() as parts:
        parts.cache.entries[key("a")] = entry()
        parts.device.gate.clear()
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]], what="a runs")
        parts.cache.readable.set()
        await parts.finished(0, 1)
        del parts.cache.entries[key("a")]
        parts.pipeline.take([job(2, input="a")])
        await wait_until(lambda: parts.cache.asked == [key("first"), key("a"), key("a")])
        parts.device.gate.set()
        await parts.finished(0, 1, 2)
        assert result_of(parts, 2)["cached"] is False


async def test_nothing_runs_before_the_cache_has_answered_where_others_are_under_way() -> None:
    async with quick() as parts:
        parts.cache.entries.update({key(text): entry() for text in "abc"})
        parts.device.gate.clear()
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]], what="a runs")
        parts.queue.answered(lacked=True)
        parts.pipeline.take([job(2, input="b")])
        await wait_until(lambda: parts.model.calls[-1] == ["b"], what="b tokenized")
        parts.device.gate.set()
        await wait_until(lambda: parts.queue.idle, what="the device idle")
        parts.queue.answered(lacked=True)
        parts.pipeline.take([job(3, input="c")])  # the device is idle, and the cache is still asked for b
        await wait_until(lambda: parts.model.calls[-1] == ["c"], what="c tokenized")
        parts.cache.readable.set()
        await parts.finished(0, 1, 2, 3)
        assert (parts.device.started, parts.device.ran) == (["a"], [["first"], ["a"]])


async def test_beside_a_text_that_runs_nothing_runs_before_the_cache_has_answered() -> None:
    async with quick() as parts:
        parts.device.gate.clear()
        parts.pipeline.take([job(1, input="a")])
        await wait_until(lambda: parts.device.ran == [["first"], ["a"]], what="a runs")
        parts.cache.readable.set()
        await wait_until(lambda: parts.queue.idle is False and parts.cache.asked[-1] == key("a"))
        await asyncio.sleep(0)  # what the cache said is heard
        parts.cache.readable.clear()
        parts.pipeline.take([job(2, input="b")])
        await wait_until(lambda: parts.model.calls[-1] == ["b"], what="b tokenized")
        assert parts.device.started == ["a"]
        parts.device.gate.set()
        parts.cache.readable.set()
        await parts.finished(0, 1, 2)


async def test_no_text_of_bulk_runs_before_the_cache_has_answered() -> None:
    async with quick() as parts:
        parts.cache.entries[key("a")] = entry()
        parts.pipeline.take([msgspec.structs.replace(job(1, input="a"), lane="bulk")])
        await wait_until(lambda: parts.model.calls[-1] == ["a"], what="a tokenized")
        parts.cache.readable.set()
        await parts.finished(0, 1)
        assert (parts.device.started, parts.device.ran) == ([], [["first"]])


@pytest.mark.parametrize(
    ("held", "asked", "hit"),
    [
        ("", "error", True),
        ("", "end", True),
        ("end", "end", True),
        ("end", "start", False),
        ("end", "error", False),
    ],
)
async def test_a_cached_vector_of_a_cut_text_is_for_those_who_asked_for_that_cut(
    held: str, asked: str, hit: bool
) -> None:
    async with running() as parts:
        parts.cache.entries[key("a")] = entry(held)
        parts.pipeline.take([job(1, input="a", truncate=asked)])
        await parts.finished(1)
        assert parts.device.ran == ([] if hit else [["a"]])
        [result] = parts.sink.to(TOPICS.results)
        assert body(result)["data"][0]["truncated"] is (hit and held != "")


async def test_a_cut_text_is_cached_with_its_cut() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input="x" * 30, truncate="end")])
        await parts.finished(1)
        await wait_until(lambda: bool(parts.cache.entries))
        assert parts.cache.entries[key("x" * 30)].truncated == "end"
        assert parts.sample("truncated_total") == 1


async def test_a_mean_over_windows_has_an_entry_of_its_own() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input="abcdefg", chunk={"mode": "mean"})])
        await parts.finished(1)
        await wait_until(lambda: bool(parts.cache.entries))
        assert parts.cache.asked == list(parts.cache.entries)
        assert key("abcdefg") not in parts.cache.entries


async def rounds_to_the_cache(jobs: int) -> int:
    """Of the event loop, from results that are given to the sink to the cache that has their vectors."""
    async with running() as parts:
        parts.pipeline.take([job(number, input="a") for number in range(jobs)])
        passed = 0
        while not parts.cache.entries:
            await asyncio.sleep(0)
            passed += bool(parts.sink.sent) and not parts.cache.entries
        return passed


async def test_the_cache_is_written_a_round_later_for_a_lone_job_whose_result_is_then_with_the_broker() -> (
    None
):
    assert await rounds_to_the_cache(jobs=1) == await rounds_to_the_cache(jobs=2) + 1


async def test_a_slow_cache_write_does_not_delay_the_result() -> None:
    async with running() as parts:
        parts.cache.gate.clear()
        parts.pipeline.take([job(1, input="a")])
        await parts.finished(1)
        assert parts.cache.entries == {}
        parts.cache.gate.set()


# -- what is not computed ---------------------------------------------------------------------------------------------


async def test_a_text_over_the_size_limit_fails_alone_and_is_not_tokenized() -> None:
    async with running(max_text_bytes=8) as parts:
        parts.pipeline.take([job(1, input=["much too long", "fine"])])
        await parts.finished(1)
        [result] = parts.sink.to(TOPICS.results)
        first, second = body(result)["data"]
        assert first["error"]["code"] == "text_too_long"
        assert second["error"] is None
        assert parts.model.calls == [["fine"]]


async def test_a_text_of_too_many_tokens_fails_alone() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, input=["x" * 30, "fine"])])
        await parts.finished(1)
        [result] = parts.sink.to(TOPICS.results)
        assert [datum["error"] is None for datum in body(result)["data"]] == [False, True]
        await wait_until(lambda: list(parts.cache.entries) == [key("fine")])


async def test_a_record_that_is_not_a_job_is_answered_like_the_jobs_of_its_poll() -> None:
    async with running() as parts:
        parts.pipeline.take([record(b"junk", offset=1), job(2, input="a")])
        await parts.finished(1, 2)
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert letter.value == b"junk"
        assert parts.sample("errors_total", code="malformed") == 1
        assert parts.device.ran == [["a"]]


async def test_a_record_that_the_client_could_not_decode_is_answered_by_its_position() -> None:
    async with running() as parts:
        parts.pipeline.take_unreadable(record(offset=5), "its batch inflates to more than 1,000 bytes")
        await parts.finished(5)
        [result] = parts.sink.to(TOPICS.results)
        assert body(result)["id"] == "t.jobs-3-5"
        assert "more than 1,000 bytes" in body(result)["error"]["message"]
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert value_of(letter.headers, "embedq-error-code") == b"malformed"


@pytest.mark.parametrize(
    "headers", [(("reply-topic", b"new"),), (("reply-topic", b"new"), ("reply-partition", b"\0\0\0\1"))]
)
async def test_a_reply_topic_that_is_new_is_asked_for(headers: tuple[tuple[str, bytes], ...]) -> None:
    async with running() as parts:
        parts.sink.new_topics["new"] = 2
        parts.pipeline.take([job(1, *headers, input="a")])
        await parts.finished(1)
        assert len(parts.sink.to("new")) == 1


async def test_a_reply_topic_that_no_broker_has_gets_an_error_on_the_results_topic() -> None:
    async with running() as parts:
        parts.pipeline.take([job(1, ("reply-topic", b"new"), input="a"), job(2, input="b")])
        await parts.finished(1, 2)
        errors = [body(sent) for sent in parts.sink.to(TOPICS.results) if body(sent)["object"] == "error"]
        assert [error["error"]["code"] for error in errors] == ["invalid_header"]
        assert len(parts.sink.to(TOPICS.dead_letters)) == 1
        assert parts.device.ran == [["b"]]


# -- whatever it is -----------------------------------------------------------------------------------------------------


JOBS = st.one_of(
    st.just(b"junk"),
    st.just(None),
    st.fixed_dictionaries(
        {
            "input": st.lists(
                st.sampled_from(["a", "b", "fail", "much too long", "x" * 30]), min_size=1, max_size=4
            )
        },
        optional={
            "chunk": st.sampled_from([{"mode": "late"}, {"mode": "mean"}]),
            "truncate": st.sampled_from(["start", "end"]),
            "dimensions": st.sampled_from([32, 256, 5000]),
            "model": st.just("unknown"),
        },
    ).map(lambda fields: json.dumps(fields).encode()),
)
ADDRESSES = st.sampled_from(
    [
        (),
        (("reply-topic", b"elsewhere"),),
        (("reply-topic", b"new"),),
        (("reply-topic", b"nowhere"),),
        (("reply-topic", b"full"),),
        (("deadline", b"1000001"),),
    ]
)


@given(st.lists(st.lists(st.tuples(JOBS, ADDRESSES), min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_whatever_comes_each_record_is_answered_and_then_finished_once(
    polls: list[list[tuple[bytes | None, tuple[tuple[str, bytes], ...]]]],
) -> None:
    def fails(texts: list[str]) -> Exception | None:
        return ValueError("no") if "fail" in texts else None

    def full(outgoing: Outgoing) -> Exception | None:
        return MessageSizeTooLargeError() if outgoing.topic == "full" else None

    async def run() -> None:
        async with running(ScriptedDevice(fails), full, max_text_bytes=25) as parts:
            parts.sink.known["full"] = 1
            parts.sink.new_topics["new"] = 1
            offset = 0
            for poll in polls:
                records = [
                    record(value, *headers, offset=offset + at) for at, (value, headers) in enumerate(poll)
                ]
                offset += len(poll)
                parts.pipeline.take(records)
            await parts.finished(*range(offset))
            assert len([sent for sent in parts.sink.sent if sent.topic != TOPICS.dead_letters]) == offset

    asyncio.run(run())


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_a_text_that_the_model_cannot_run_gets_an_error_and_the_others_their_vectors() -> None:
    def fails(texts: list[str]) -> Exception | None:
        return ValueError("no") if "b" in texts else None

    async with running(ScriptedDevice(fails)) as parts:
        parts.pipeline.take([job(1, input=["a", "b", "c"])])
        await parts.finished(1)
        [result] = parts.sink.to(TOPICS.results)
        codes = [datum["error"] and datum["error"]["code"] for datum in body(result)["data"]]
        assert codes == [None, "internal", None]


async def test_a_lost_device_ends_the_process_and_finishes_nothing() -> None:
    sinks: list[ScriptedSink] = []

    async def until_it_ends() -> None:
        async with running(ScriptedDevice(lambda texts: DeviceLost("gone"))) as parts:
            sinks.append(parts.sink)
            parts.pipeline.take([job(1, input="a")])
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        await until_it_ends()
    assert raised.value.subgroup(DeviceLost) is not None
    assert sinks[0].events == []


# -- jobs that are given up ---------------------------------------------------------------------------------------------


class SlowDevice(ScriptedDevice):
    """Computes once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> tuple[Vectors, float]:
        found = await super().encode(encoder, batch)
        await self.gate.wait()
        return found

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Told so at the latest when the test is over."""
        try:
            yield
        finally:
            self.gate.set()


async def test_a_job_that_is_given_up_is_answered_and_dead_lettered_and_its_late_result_is_not_sent() -> None:
    device = SlowDevice()
    async with running(device) as parts, device.running():
        stuck = job(1, input="a", id="stuck")
        parts.pipeline.take([stuck, job(2, input="b")])
        await wait_until(lambda: bool(device.ran), what="a micro-batch that hangs")
        parts.pipeline.give_up(stuck, Overtaken(stuck.ticket.partition, 1, 900.0))
        await parts.finished(1)
        [result] = parts.sink.to(TOPICS.results)
        assert (body(result)["id"], body(result)["error"]["code"]) == ("stuck", "internal")
        assert len(parts.sink.to(TOPICS.dead_letters)) == 1
        device.gate.set()
        await parts.finished(1, 2)
        assert len(parts.sink.to(TOPICS.results)) == 2


async def test_a_record_whose_schema_is_not_known_waits_for_it_alone() -> None:
    class Registry:
        """Says nothing until it is told to."""

        def __init__(self) -> None:
            self.there = asyncio.Event()
            self.asked: list[Want] = []

        def reader(self, want: Fetch) -> Reader | None:
            return JsonReader(Given(kind="JSON", text="{}")) if self.there.is_set() else None

        def number(self, want: Registration) -> None:
            return None

        async def learn(self, want: Want) -> None:
            self.asked.append(want)
            await self.there.wait()

    registry = Registry()
    named = ("embedq-mapping", b"docs")
    async with running(mappings=mappings_of(docs={}), schemas=registry) as parts:
        parts.pipeline._registry = registry
        aside: list[tuple[list[int], bool]] = []

        def set_aside(records: Iterable[Record], *, waits: bool) -> None:
            aside.append(([found.ticket.offset for found in records], waits))

        parts.pipeline._set_aside = set_aside
        framed = [record(b"\0\0\0\0\x07" + b'{"text": "a"}', named, offset=offset) for offset in (1, 2)]
        parts.pipeline.take([*framed, job(3, input="b")])
        await parts.finished(3)
        assert registry.asked == [Fetch(7)], "once for all that wait"
        registry.there.set()
        await parts.finished(1, 2, 3)
        assert len(parts.sink.to("docs.vectors")) == 2
        assert aside == [([1, 2], True), ([1, 2], False)], "nobody gives them up for waiting"


async def test_a_deleted_row_is_answered_without_the_model() -> None:
    async with running(mappings=mappings_of(docs={})) as parts:
        gone = msgspec.structs.replace(
            record(b"", ("embedq-mapping", b"docs"), key=b"k", offset=1), value=None
        )
        parts.pipeline.take([gone])
        await parts.finished(1)
        assert [(sent.topic, sent.key, sent.value) for sent in parts.sink.sent] == [
            ("docs.vectors", b"k", None)
        ]
        assert parts.device.ran == []
