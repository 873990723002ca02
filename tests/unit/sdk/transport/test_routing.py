"""Where a client sends its jobs: to the default pool, at no cost, until there is another one; then where the control topic says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from embedq_sdk.embeddings import ReadError, job_failed
from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing, UnknownModel
from embedq_sdk.job_options import JobInputs, JobLimits, JobOptions
from embedq_sdk.stream import JobStream, StreamOptions
from embedq_sdk.transport import routing
from embedq_sdk.transport.job_runner import Deadline, JobRunner
from embedq_sdk.transport.pending_jobs import PendingJob, Route
from embedq_sdk.transport.routing import Router
from embedq_shared.codec import encode_record
from embedq_shared.messages import Control, ErrorBody
from embedq_shared.topics import Topics
from embedq_shared.weighted_semaphore import WeightedSemaphore
from tests.helpers.fake_service import Answer, Received
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.support import patient, wait_until

ONE: Collection[str] = Topics("t").lanes
TWO = [*ONE, *Topics("t", "big").lanes]


def says(alias: str, pool: str | None, version: int = 1) -> Any:
    command = Control(alias=alias, version=version, path="p", command_id=f"{version}", pool=pool)
    return SimpleNamespace(key=alias.encode(), value=encode_record(command))


class Records:
    """The control topic, as a test writes it."""

    def __init__(self, *records: Any, names: Collection[str] = TWO) -> None:
        self.names = names
        self.written = list(records)
        self.calls: list[str] = []
        self.problem: Exception | None = None
        self.news = asyncio.Event()
        self.read = 0

    async def topics(self) -> Collection[str]:
        self.calls.append("topics")
        return self.names

    async def open(self) -> list[Any]:
        self.calls.append("open")
        if self.problem is not None:
            raise self.problem
        self.read = 0
        return self._taken()

    async def next(self) -> list[Any]:
        await self.news.wait()
        self.news.clear()
        if self.problem is not None:
            raise self.problem
        return self._taken()

    async def close(self) -> None:
        pass

    def write(self, *records: Any) -> None:
        self.written += records
        self.news.set()

    def _taken(self) -> list[Any]:
        found, self.read = self.written[self.read :], len(self.written)
        return found


@asynccontextmanager
async def running(records: Records, known: Collection[str] = TWO) -> AsyncIterator[Router]:
    router = Router(Topics("t"), "fake:9092", records)
    router.see_topics(known)
    task = asyncio.create_task(router.run())
    try:
        yield router
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def soon() -> float:
    return asyncio.get_running_loop().time() + patient(10)


def topic(router: Router, model: str | None, lane: Any = "interactive") -> str:
    return router.topic(Route(model, lane, "1"))


def a_job(route: Route, topic: str) -> PendingJob:
    future = asyncio.get_running_loop().create_future()
    return PendingJob(
        future, topic=topic, value=b"", headers=[], correlation=b"", count=1, size=1, timeout=1.0, route=route
    )


REFUSAL = job_failed(ReadError(code="unknown_model", message="not here"))


async def test_without_another_pool_nothing_is_read_and_nobody_waits() -> None:
    records = Records()
    async with running(records, ONE) as router:
        assert router.knows("any")
        await router.ready("any", 0.0)
        assert topic(router, None) == topic(router, "any") == "t.jobs"
        assert topic(router, "any", "bulk") == "t.jobs.bulk"
    assert records.calls == []


@pytest.mark.parametrize("model", [None, "default"])
async def test_a_job_for_the_default_alias_waits_for_nothing_beside_other_pools(model: str | None) -> None:
    records = Records(says("default", "big"))
    async with running(records) as router:
        await router.ready(model, 0.0)
        assert topic(router, model) == "t.jobs"
    assert records.calls == []


async def test_a_job_goes_where_its_alias_lives_and_follows_it() -> None:
    records = Records(says("large", "big"), says("small", None))
    async with running(records) as router:
        assert not router.knows("large")
        await router.ready("large", soon())
        assert [topic(router, one) for one in ("large", "small", "nobody's")] == [
            "t.jobs.big",
            "t.jobs",
            "t.jobs",
        ]
        assert topic(router, "large", "bulk") == "t.jobs.big.bulk"
        records.write(says("small", "big", 2), says("large", None, 2))
        await wait_until(lambda: topic(router, "small") == "t.jobs.big", what="the move")
        assert topic(router, "large") == "t.jobs"
    assert records.calls == ["open"], "it is known which topics there are"


async def test_a_pool_that_is_made_later_is_seen_with_the_command_that_names_it() -> None:
    records = Records(names=[*TWO, *Topics("t", "new").lanes])
    async with running(records) as router:
        await router.ready("a", soon())
        records.write(says("a", "new"))
        await wait_until(lambda: topic(router, "a") == "t.jobs.new", what="the new pool")
    assert records.calls == ["open", "topics"]


async def test_a_pool_without_topics_is_named_and_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(says("a", "new"))
    async with running(records) as router:
        await router.ready("a", soon())
        with pytest.raises(TopicMissing, match=r"t\.jobs\.new"):
            topic(router, "a")
        records.names = [*TWO, *Topics("t", "new").lanes]
        monkeypatch.setattr(routing, "_LOOK_S", 0.0)
        records.write()
        await wait_until(lambda: records.calls.count("topics") == 2, what="another look")
        await wait_until(lambda: "new" in router._pools, what="the topics")
        assert topic(router, "a") == "t.jobs.new"


@pytest.mark.parametrize(
    "problem",
    [KafkaRefused(servers="s", reason="no right"), TopicMissing(servers="s", topic="t.control")],
)
async def test_where_the_control_topic_may_not_be_read_jobs_go_to_the_default_pool(
    problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(says("large", "big"))
    records.problem = problem
    async with running(records) as router:
        await router.ready("large", soon())
        assert topic(router, "large") == "t.jobs"
    assert str(problem) in caplog.text


async def test_while_kafka_is_away_a_job_waits_until_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_PAUSE_S", 0.01)
    records = Records(says("large", "big"))
    records.problem = KafkaUnavailable(servers="s", reason="away")
    async with running(records) as router:
        with pytest.raises(KafkaUnavailable, match="the control topic"):
            await router.ready("large", asyncio.get_running_loop().time() + 0.05)
        records.problem = None
        await router.ready("large", soon())
        assert topic(router, "large") == "t.jobs.big"
        # What is known is known, and read anew once it can be: what was removed meanwhile is gone.
        tries = records.calls.count("open")
        records.problem = KafkaUnavailable(servers="s", reason="away again")
        records.write()
        await wait_until(lambda: records.calls.count("open") > tries, what="another try")
        assert topic(router, "large") == "t.jobs.big"
        records.written.clear()
        records.problem = None
        await wait_until(lambda: topic(router, "large") == "t.jobs", what="the topic as it is now")


async def test_an_unknown_model_is_looked_for_elsewhere_once() -> None:
    records = Records()
    sent: list[PendingJob] = []
    async with running(records) as router:
        await router.ready("a", soon())
        job = a_job(Route("a", "bulk", "1"), topic(router, "a", "bulk"))
        records.write(says("a", "big"))
        await wait_until(lambda: topic(router, "a") == "t.jobs.big", what="the move")
        router.try_elsewhere(job, REFUSAL, sent.append)
        assert (sent, job.topic, job.attempt) == ([job], "t.jobs.big.bulk", 0)
        records.write(says("a", None, 2))
        await wait_until(lambda: topic(router, "a") == "t.jobs", what="the way back")
        router.try_elsewhere(job, REFUSAL, sent.append)
        with pytest.raises(UnknownModel):
            await job.future
    assert len(sent) == 1


async def test_a_client_that_is_older_than_the_first_pool_learns_of_it_by_an_unknown_model() -> None:
    records = Records(says("a", "big"))
    sent: list[PendingJob] = []
    async with running(records, ONE) as router:
        moved, nobodys = a_job(Route("a", "interactive", "1"), "t.jobs"), a_job(Route("b", "bulk", "2"), "b")
        nobodys.topic = "t.jobs.bulk"
        for job in (moved, nobodys):
            router.try_elsewhere(job, REFUSAL, sent.append)
        await wait_until(nobodys.future.done, what="its end")
        assert isinstance(nobodys.future.exception(), UnknownModel)
        assert (sent, moved.topic) == ([moved], "t.jobs.big")
        moved.drop()
    assert records.calls == ["topics", "open"]


async def test_in_a_service_without_pools_unknown_models_cost_one_look_in_a_while() -> None:
    records = Records(names=ONE)
    async with running(records, ONE) as router:
        for _ in range(3):
            job = a_job(Route("b", "interactive", "2"), "t.jobs")
            router.try_elsewhere(job, REFUSAL, lambda job: None)
            with pytest.raises(UnknownModel):
                await job.future
    assert records.calls == ["topics"]


@pytest.mark.parametrize("model", [None, "default"])
async def test_a_job_that_has_nowhere_else_to_go_fails_at_once(model: str | None) -> None:
    records = Records()
    async with running(records) as router:
        job = a_job(Route(model, "interactive", "1"), "t.jobs")
        router.try_elsewhere(job, REFUSAL, lambda job: None)
        assert job.future.exception() is REFUSAL
    assert records.calls == []


class Sending:
    """A runner that sends where a router says, to a service that serves `large` in the pool `big` alone."""

    def __init__(self, router: Router) -> None:
        self.transport = FakeTransport()
        self.runner = JobRunner(self.transport, router, WeightedSemaphore(10, 1000))
        self.transport.deliver = self.runner.deliver
        self.transport.service.behave = self._answer
        self.runner.open()
        self.asked: list[str] = []
        """The topics of the jobs that were answered."""

    def _answer(self, job: Received) -> list[Answer]:
        self.asked.append(job.topic)
        service = self.transport.service
        if job.topic.startswith("t.jobs.big"):
            return [service.good(job)]
        return [service.failure(job, ErrorBody.of("unknown_model", "not here"))]

    async def call(self, **options: Any) -> Any:
        [found] = await self.runner.run(
            [JobInputs(["x"], 1)], JobOptions(**options), Deadline.after(patient(10))
        )
        return found.outcome

    @property
    def topics(self) -> list[str]:
        return [job.topic for job in self.transport.sent]


async def test_every_kind_of_call_asks_where_its_jobs_go() -> None:
    for kind in ("run", "submit", "stream"):
        async with running(Records(says("large", "big"))) as router:
            sending, options = Sending(router), JobOptions(model="large", lane="bulk")
            match kind:
                case "run":
                    assert isinstance(await sending.call(model="large", lane="bulk"), list)
                case "submit":
                    await sending.runner.submit("x", 1, options, id="1", format="json", timeout=patient(10))
                case _:
                    window = StreamOptions(limits=JobLimits(), timeout=patient(10), batch_size=1, in_flight=1)
                    _, [finished] = await JobStream(sending.runner, options, window).collect(["x"])
                    assert isinstance(finished.outcome, list)
            assert sending.topics == ["t.jobs.big.bulk"], kind


async def test_a_caller_sees_nothing_of_a_job_that_was_sent_to_the_wrong_pool_first() -> None:
    records = Records(says("large", "big"))
    async with running(records, ONE) as router:
        sending = Sending(router)
        assert isinstance(await sending.call(model="large"), list)
        assert sending.asked == ["t.jobs", "t.jobs.big"]
        assert isinstance(await sending.call(model="nobody's"), UnknownModel)
        assert sending.asked[2:] == ["t.jobs"]


async def test_a_pool_without_topics_fails_the_call_and_holds_nothing() -> None:
    async with running(Records(says("a", "new"))) as router:
        sending = Sending(router)
        with pytest.raises(TopicMissing):
            await sending.call(model="a")
        assert (sending.topics, sending.runner.in_flight.held) == ([], (0, 0))
