"""One run: a cluster, workers, jobs, faults, and a history of it all."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import structlog
from aiokafka.admin import NewTopic

from embedq_consumer.settings import Settings
from embedq_shared.kafka import AIOKafkaAdminClient, AIOKafkaProducer, KafkaError
from embedq_shared.topics import Topics
from tests.faults import cluster_faults, group_log, load
from tests.faults.history import Ended, Fault, HistoryWriter, Mode, Run
from tests.faults.load import JobMaker, Judge, Vectors
from tests.faults.observer import Observer
from tests.faults.producing import Producing
from tests.faults.schedule import FRAGILE, KINDS, TRACKS, TRANSACTIONAL, Step, steps
from tests.faults.workers import SupervisedWorker
from tests.helpers.cluster import Cluster
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import patient, wait_until

log = structlog.get_logger()

T = TypeVar("T")

WORKER_FAULTS: Final = ("kill", "kill_at", "leave", "freeze", "freeze_at", "reload", "kill_in_reload")
REDIS_FAULTS: Final = tuple(name for name, kind in KINDS.items() if kind.track == "redis")
BROKER_FAULTS: Final = tuple(
    name for name, kind in KINDS.items() if kind.track == "brokers" and name != "broker_disk_full"
)
"""Without the one that needs a small disk."""
EVERYTHING: Final = (*WORKER_FAULTS, *BROKER_FAULTS, *REDIS_FAULTS, "topic_deleted")

PARTITIONS: Final = 4
"""Of each topic with jobs or results."""
COPIES: Final = 3
_MAX_UNCOMMITTED: Final = 256
_MAX_POLL: Final = 64
_REPLY_TIMEOUT_S: Final = 90
_POINT_S: Final = 8.0
"""How long a worker has to come to the point that it was told."""
_SAY_EVERY_S: Final = 10.0
_ATTEMPT_S: Final = 20.0
_PAUSE_S: Final = 0.5
_LOOKS: Final = 10
"""For a topic that is to be gone, with a pause between two."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is run. Equal plans on equal machines meet equal faults, though not at equal jobs."""

    seed: int
    jobs: int
    mode: Mode = "at-least-once"
    faults: tuple[str, ...] = EVERYTHING
    workers: int = 3
    texts: int = 400
    window: int = 2000
    """Jobs without an answer, at most, before the producer waits."""
    longest_s: float | None = None
    """After so many seconds no more jobs are sent, whatever `jobs` says."""
    gaps: float = 1.0
    """How many times longer than usual the times between faults are: on few cores, faults for so many jobs, not for so many seconds."""
    settle_s: float = 240.0
    """After the last fault: how long the rest may take, on a quiet machine."""
    settings: dict[str, str] = {}
    """Of the workers, beyond those that the harness needs."""


class Harness:
    """A run on a cluster that is there already. `history` is where it notes what it sees."""

    # More than six parameters: a run is made of these.
    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        models: Sequence[Path],
        expected: dict[str, Vectors],
        directory: Path,
        *,
        say: Any = log.info,
    ) -> None:
        """`models`: the first one serves, the others are what reloads change to; all below one folder. `expected`: vectors of
        the run's texts, by model version. `directory`: logs and history."""
        self._plan = plan
        self._cluster = cluster
        self._models = models
        self._directory = directory
        self._say = say
        self._expected = expected
        self._started = time.monotonic()
        self._prefix = fresh_prefix()
        self.topics = Topics(self._prefix)
        self._own_topic = f"{self._prefix}.client"
        self._fragile = f"{self._prefix}.fragile" if set(plan.faults) & FRAGILE else None
        self.history = HistoryWriter(directory / "history.jsonl")
        hidden = next(iter(expected.values())).shape[1]
        self._maker = JobMaker(
            plan.seed,
            self.topics,
            load.texts(plan.seed, plan.texts),
            hidden=hidden,
            own_topic=self._own_topic,
            fragile_topic=self._fragile,
        )
        self._observer = Observer(
            cluster.direct_servers,
            self.topics,
            [topic for topic in (self._own_topic, self._fragile) if topic],
            history=self.history,
            maker=self._maker,
            judge=Judge(expected),
            mode=plan.mode,
            group=f"{self._prefix}.embedq",
            clock=self._clock,
        )
        self._producing = Producing(
            cluster.direct_servers,
            self._maker,
            jobs=plan.jobs,
            window=plan.window,
            waiting=lambda: len(self._observer.progress.open),
            more=lambda: bool(self._first_round),
            over=lambda: plan.longest_s is not None and self._clock() > plan.longest_s,
        )
        self._quiet = asyncio.Event()
        """No more faults are to begin."""
        self._first_round = {
            name for name in plan.faults if name not in TRANSACTIONAL or plan.mode == "exactly-once"
        }
        """Kinds of faults that have not come yet: jobs go on until each has."""
        self._control_version = 0
        self.workers = [
            SupervisedWorker(
                f"worker-{number}",
                cluster,
                self.topics,
                models[0],
                directory,
                history=self.history,
                clock=self._clock,
                settings=self._settings(),
            )
            for number in range(plan.workers)
        ]

    async def run(self) -> Path:
        """Do it all; the history's path.

        Raises:
            AssertionError: jobs were not answered, or not committed, in the time that a run has to settle; the history is whole
                all the same, and the checker says which.
        """
        plan = self._plan
        others = [topic for topic in (self._own_topic, self._fragile) if topic]
        await make_topics(self._cluster, self._prefix, partitions=PARTITIONS, copies=COPIES, names=others)
        self._started = time.monotonic()
        self.history.add(
            Run(
                at=0.0,
                seed=plan.seed,
                mode=plan.mode,
                kafka=self._cluster.kafka_description,
                model=self._models[0].name,
                workers=plan.workers,
                once=(self.topics.bulk,) if plan.mode == "exactly-once" else (),
                repeats_each=2 * PARTITIONS * _MAX_UNCOMMITTED + plan.workers * _MAX_POLL,
                slack_s=patient(
                    30.0
                ),  # a worker that starts takes half of it, and its joining moves partitions
                settings={name: str(value) for name, value in self._settings().items()},
            )
        )
        async with self._background(*(worker.run() for worker in self.workers), self._observer.run()):
            await asyncio.gather(*(worker.ready() for worker in self.workers))
            self._say(f"{plan.workers} workers are ready after {self._clock():.0f} s")
            async with self._background(self._tell_progress()):
                faults = [asyncio.create_task(self._follow(track)) for track in TRACKS]
                try:
                    await self._producing.run()
                    self._quiet.set()
                    await asyncio.gather(*faults)
                finally:
                    for task in faults:
                        task.cancel()
                    await asyncio.to_thread(self._cluster.heal)
                    for worker in self.workers:
                        worker.send(signal.SIGCONT)
                try:
                    await self._settle()
                finally:
                    await asyncio.gather(*(worker.close() for worker in self.workers))
                    await self._end()
        return self.history.path

    def _clock(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "session_timeout_ms": 6000,
            "rebalance_timeout_ms": 20_000,
            "commit_interval_ms": 200,
            "max_uncommitted_jobs": _MAX_UNCOMMITTED,
            "max_poll_records": _MAX_POLL,
            "max_in_flight_jobs": 512,
            "max_result_bytes": 4096,  # so that many results come in parts
            "cache_ttl_s": 3,  # so that many texts are computed again
            "reply_topics": f"{self._prefix}.*",
            **self._plan.settings,
        }
        if "reply_timeout_s" in Settings.__struct_fields__:
            # Longer than any fault here: only an address that is gone for good is to be given up.
            settings.setdefault("reply_timeout_s", _REPLY_TIMEOUT_S)
        if self._plan.mode == "exactly-once":
            settings["bulk_delivery"] = "exactly-once"
        return settings

    # -- faults -------------------------------------------------------------------------------------------------------

    async def _follow(self, track: str) -> None:
        """Let the faults of one track come one after the other, until no more are to begin."""
        for step in self._steps(track):
            with suppress(TimeoutError):
                async with asyncio.timeout(step.after_s):
                    await self._quiet.wait()
            if self._quiet.is_set():
                return
            await self._apply(step)
            self._first_round.discard(step.fault)

    def _steps(self, track: str) -> Iterator[Step]:
        kinds = [
            name
            for name in self._plan.faults
            if self._plan.mode == "exactly-once" or name not in TRANSACTIONAL
        ]
        return steps(
            self._plan.seed,
            track,
            kinds,
            workers=self._plan.workers,
            brokers=len(self._cluster.nodes),
            gaps=self._plan.gaps,
        )

    async def _apply(self, step: Step) -> None:
        match KINDS[step.fault].track:
            case "workers":
                target = f"worker-{step.target}"
                async with self._noted(step, target):
                    await self._on_worker(step, self.workers[step.target])
            case "brokers" | "redis":
                node = await cluster_faults.met_by(self._cluster, step.fault, step.target)
                target = "redis" if step.fault.startswith("redis") else f"broker-{node}"
                async with self._noted(step, target):
                    undo = await asyncio.to_thread(cluster_faults.begin, self._cluster, step.fault, node)
                    try:
                        await asyncio.sleep(step.seconds)
                    finally:
                        await asyncio.to_thread(undo)
            case _:
                assert self._fragile is not None
                async with self._noted(step, self._fragile):
                    await self._delete_topic(self._fragile, step.seconds)

    async def _on_worker(self, step: Step, worker: SupervisedWorker) -> None:
        match step.fault:
            case "kill":
                await worker.end(signal.SIGKILL, step.seconds)
            case "leave":
                await worker.end(signal.SIGTERM, step.seconds)
            case "freeze":
                await worker.freeze(step.seconds)
            case "reload":
                await self._reload()
                await asyncio.sleep(step.seconds)
            case "kill_in_reload":
                if worker.order(step.point, step.passes, "SIGKILL"):
                    await self._reload()
                await asyncio.sleep(step.seconds)
            case "kill_at" | "kill_in_transaction":
                worker.order(step.point, step.passes, "SIGKILL")
                await asyncio.sleep(step.seconds)
            case "freeze_at" | "freeze_in_transaction":
                if worker.order(step.point, step.passes, "SIGSTOP") and await worker.stands_still(_POINT_S):
                    await worker.freeze(step.seconds)
            case other:
                raise RuntimeError(f"no fault is called {other}. This is a bug.")

    async def _reload(self) -> None:
        """Change the model on all workers: a control record, as an operator without our command line would write it."""
        self._control_version += 1
        model = self._models[self._control_version % len(self._models)]
        record = {
            "alias": "default",
            "version": self._control_version,
            "path": model.name,
            "command_id": f"c{self._control_version}",
        }
        with suppress(KafkaError, OSError, TimeoutError):  # no reload this time
            async with (
                asyncio.timeout(20),
                AIOKafkaProducer(bootstrap_servers=self._cluster.direct_servers) as producer,
            ):
                await producer.send_and_wait(
                    self.topics.control, msgspec.json.encode(record), key=b"default", partition=0
                )

    async def _delete_topic(self, topic: str, seconds: float) -> None:
        """Delete a client's topic, and make it again later; nobody else may make it in between."""
        await self._administered(lambda admin: admin.delete_topics([topic]))
        await self._administered(lambda admin: _gone(admin, topic))
        self._observer.forget(topic)
        await asyncio.sleep(seconds)
        for _ in range(_LOOKS):  # a broker that stood still a moment ago may not know yet that it is gone
            if topic not in await self._administered(lambda admin: admin.list_topics()):
                break
            await asyncio.sleep(_PAUSE_S)
        else:
            self._note("topic_came_back", topic, "begin", "nobody made it")
            return
        await self._administered(lambda admin: admin.create_topics([NewTopic(topic, PARTITIONS, COPIES)]))

    async def _administered(self, work: Callable[[AIOKafkaAdminClient], Awaitable[T]]) -> T:
        """What `work` returns, tried again with another client while brokers come and go."""
        while True:
            admin = AIOKafkaAdminClient(
                bootstrap_servers=self._cluster.direct_servers, request_timeout_ms=10_000
            )
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    await admin.start()
                    return await work(admin)
            except (KafkaError, OSError, TimeoutError) as error:
                self._say(f"{self._clock():7.1f} s  tried again: {error!r}")
                await asyncio.sleep(_PAUSE_S)
            finally:
                with suppress(KafkaError, OSError, TimeoutError):
                    async with asyncio.timeout(_ATTEMPT_S):
                        await admin.close()

    @asynccontextmanager
    async def _noted(self, step: Step, target: str) -> AsyncIterator[None]:
        detail = f"{step.point}:{step.passes}" if step.point else f"{step.seconds} s"
        self._note(step.fault, target, "begin", detail)
        try:
            yield
        finally:
            self._note(step.fault, target, "end", detail)

    def _note(self, name: str, target: str, phase: Literal["begin", "end"], detail: str) -> None:
        self.history.add(Fault(at=self._clock(), name=name, target=target, phase=phase, detail=detail))
        if phase == "begin":
            self._say(f"{self._clock():7.1f} s  {name} {target} {detail}")

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Without faults: every job is answered, and the group has committed the end of both lanes."""
        progress = self._observer.progress

        async def all_answered() -> bool:
            # What was written to a topic that was then deleted is an answer that nobody sees; the commits tell of it.
            if any(not self._maker.job(id).fragile for id in progress.open):
                return False
            if len(progress.accepted) < self._producing.acknowledged:
                return False
            ends = await self._ends(self.topics.lanes)
            return ends is not None and all(
                progress.committed.get(name, 0) == end for name, end in ends.items() if end
            )

        await wait_until(
            all_answered,
            within=self._plan.settle_s,
            what="the last answers and commits",
        )

    async def _end(self) -> None:
        """Read the logs to their ends, and close the history."""
        read = (
            *(self.topics.results, self.topics.replies, self.topics.dead_letters, self._own_topic),
            group_log.TOPIC,
        )
        if self._plan.mode == "at-least-once":
            if (found := await self._ends(read)) is not None:
                await wait_until(
                    lambda: self._observer.has_read(found), within=60, what="the ends of results and commits"
                )
        else:
            await asyncio.sleep(2.0)  # the last markers have no record by which they could be waited for
        await wait_until(
            lambda: self._observer.has_noted_commits, within=60, what="the ends after the last commits"
        )
        ends = await self._ends(self.topics.lanes) or {}
        self.history.add(Ended(at=self._clock(), ends=ends, acknowledged=self._producing.acknowledged))
        self.history.close()

    async def _ends(self, topics: Sequence[str]) -> dict[str, int] | None:
        try:
            async with asyncio.timeout(20):
                return await self._observer.ends(topics)
        except (KafkaError, OSError, TimeoutError):
            return None

    async def _tell_progress(self) -> None:
        progress = self._observer.progress
        while True:
            await asyncio.sleep(_SAY_EVERY_S)
            codes = Counter(code for worker in self.workers for code in worker.ends)
            self._say(
                f"{self._clock():7.1f} s  {self._producing.acknowledged} sent, {len(progress.answered)} answered, "
                f"{progress.repeats} repeated, {sum(filter(None, progress.committed.values()))} committed, "
                f"ends of workers: {dict(codes)}"
            )

    @asynccontextmanager
    async def _background(self, *work: Any) -> AsyncIterator[None]:
        """Run these beside the block; the first failure of one of them ends the block, and they end with it."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each) for each in work]
            try:
                yield
            finally:
                for task in running:
                    task.cancel()


async def _gone(admin: AIOKafkaAdminClient, topic: str) -> None:
    """Raises KafkaError as long as the topic is there: the brokers may still be at it, or never have heard of it."""
    if topic in await admin.list_topics():
        await admin.delete_topics([topic])
        raise KafkaError(f"{topic} is still there")
