"""The whole story, start here: open the parts, load the model, run the loops until the stop, drain, close in reverse.

A job's path is `pipeline.py`, from the intake's `take` to `finish`. Two facts are decided here and nowhere else:

- **Where a job's offset is committed.** The deliverer calls `quarantine.finish`, and that calls `intake.finish`, once the
  broker has acknowledged a job's result, and `intake.commit_forever` commits each partition up to its first record that is not finished. So when a process ends in
  any way, the next one repeats what was not answered.
- **Where a reload swaps the model.** Each alias's `model.follow` reads its commands, loads and checks the new model, and swaps it in inside
  `intake.held`, where nothing is in flight: no job is computed by two models (`lifecycle/reloader.py`, `_serve`).

Every loop is a task of one group: when one fails, the others are cancelled and the process ends with exit code 1.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import structlog

from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.fairness import BulkTurns, InteractiveTraffic
from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.reloader import Hold
from embedq_consumer.lifecycle.served_model import ServedModel
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.opening import (
    StoppedEarly,
    check_directories,
    once_kafka_answers,
    open_cache,
    open_control,
    open_deliverer,
    open_fleet,
    open_health_pages,
    open_intake,
    open_models,
    open_publisher,
    open_releases,
    open_schemas,
)
from embedq_consumer.pipeline import Pipeline
from embedq_consumer.quarantine import Quarantine, Suspects
from embedq_consumer.retries import RetryPolicy, open_tiers
from embedq_consumer.rollout import FleetMember
from embedq_consumer.settings import Settings
from embedq_consumer.shapes import NoRegistry
from embedq_consumer.telemetry.health import Health
from embedq_consumer.telemetry.metrics import Metrics

log = structlog.get_logger()

_HEARTBEAT_S: Final = 0.5
"""Well below any stall timeout; the gauges that go with it are scraped every few seconds."""
_YOUNG_OBJECTS: Final = 20_000
"""New objects before a collection; the jobs in flight alone are some ten thousand."""


class Stalled(Exception):
    """Native code does not come back. No thread can be ended from outside, so the process is."""


class DrainTimedOut(Exception):
    """Some jobs were not finished in time. None is lost: their offsets are not committed."""


async def serve(
    settings: Settings, stop: asyncio.Event, leaving: Callable[[], object] = lambda: None
) -> None:
    """Run one replica until `stop` is set, then finish what was accepted and leave. While Kafka is away, it waits.

    `leaving` is called when it begins to leave, for whatever reason.

    Raises:
        SettingsError, MissingTopics, ModelError, ModelRejected, KafkaError, OSError: it cannot start.
        BaseExceptionGroup: a loop failed, for instance with `DeviceLost` or `NoModel`.
    """
    try:
        await _serve(settings, stop, leaving)
    except StoppedEarly:
        log.info("stopped")


async def _serve(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
    settings = settings.named()
    if not await _done_before(stop, asyncio.to_thread(check_directories, settings)):
        return
    mappings = await asyncio.to_thread(settings.read_mappings)
    health, metrics, turns = Health(), Metrics(), BulkTurns(InteractiveTraffic())
    async with _Parts(leaving) as parts:
        await parts.enter_async_context(open_health_pages(settings, metrics, health))
        cache = await parts.enter_async_context(open_cache(settings, metrics))
        publisher = await parts.enter_async_context(
            open_publisher(settings, mappings, turns, metrics, health, stop)
        )
        models = await parts.enter_async_context(
            open_models(settings, publisher, turns.traffic, cache, metrics, health)
        )
        aliases: list[_Alias] = []
        for model in models:
            control = await parts.enter_async_context(open_control(settings, model, metrics))
            fleet = await parts.enter_async_context(open_fleet(settings, model.alias, publisher))
            aliases.append(_Alias(model, control, fleet))

        # The desired models first, the jobs after: a late joiner must not answer with yesterday's model.
        health.set_ready("loading the model")
        for model, control, fleet in aliases:
            desired = await once_kafka_answers(control.open, health, stop)
            await once_kafka_answers(fleet.open, health, stop)
            if not await _done_before(stop, model.start(fleet.begin(desired))):
                return
        schemas = await parts.enter_async_context(open_schemas(settings, health))
        parts.enter_context(_long_lived_objects_frozen())

        suspects = Suspects(settings.claimant())
        tiers = open_tiers(settings.topics, settings.retry_delays, publisher.topics.partitions)
        intake = await parts.enter_async_context(
            open_intake(settings, mappings, tiers, suspects, turns, metrics, health, stop)
        )
        quarantine = Quarantine(suspects, intake.commits, intake, metrics)
        results = ResultEncoder(
            settings.topics,
            settings.consumer_group,
            settings.max_result_bytes,
            replica=settings.replica,
            retries=RetryPolicy(tiers),
        )
        releases = await parts.enter_async_context(
            open_releases(settings, publisher, intake, results, health)
        )
        deliverer = await parts.enter_async_context(
            open_deliverer(settings, publisher, results, releases, intake, quarantine.finish, turns, metrics)
        )
        policy = msgspec.structs.replace(
            settings.admission,
            mappings=mappings,
            schemas=schemas or NoRegistry(),
            note_dimensions=models.note_dimensions,
            note_use=models.note_use,
            share_of=models.routes.splits.target,
            pool_of=models.routes.pool_of_job,
        )
        async with _tasks() as tasks:
            pipeline = Pipeline(
                policy,
                models.encoders,
                cache,
                models.queues,
                deliverer,
                tasks,
                intake.weigh,
                schemas,
                intake.set_aside,
            )
            quarantine.hand_to(pipeline)
            _expect_heartbeats(health, settings.stall_timeout_s)
            loops = {
                "intake": intake.run(quarantine.start, quarantine.take_unreadable, quarantine),
                "quarantine": quarantine.run(),
                "commit": intake.commit_forever(),
                "deletions": intake.deletions.run(),
                "watermarks": intake.watch(pipeline.give_up, partial(health.hinder, "watermark")),
                "delivery": publisher.watch(),
                "heartbeat": _beat_forever(health, models, metrics),
                "transactions": releases.run() if releases else _nothing(),
                "ready": _ready_after(intake.joined, health),
            }
            for alias in aliases:
                loops |= _loops_of(alias, pipeline, intake.held, tasks)
            running = [tasks.create_task(loop, name=name) for name, loop in loops.items()]
            for loop in running:
                loop.add_done_callback(lambda ended: None if _ended_well(ended) else leaving())

            await stop.wait()

            health.set_ready("draining")
            await _drain(intake.stop, [model.reporter for model in models], settings.drain_timeout_s)
            for loop in running:
                loop.cancel()
    log.info("stopped")


class _Alias(NamedTuple):
    """An alias that this replica serves, its commands, and its part in their roll-outs."""

    model: ServedModel
    control: ControlTopic
    fleet: FleetMember


def _loops_of(
    alias: _Alias, pipeline: Pipeline, hold: Hold, tasks: asyncio.TaskGroup
) -> dict[str, Coroutine[Any, Any, None]]:
    """What runs for each alias, by name."""
    model, control, fleet = alias
    loops = {
        "batches": model.run_batches(pipeline, tasks),
        "control": model.follow(fleet.commands(control), hold, partial(fleet.turn, voice=model.reporter)),
        "fleet": fleet.run(),
        "status": model.reporter.resend_forever(),
        "memory": model.watch_memory(),
    }
    return {f"{name} of {model.alias}": loop for name, loop in loops.items()}


class Busy(Protocol):
    """What runs native code, such as the served models."""

    @property
    def busy_since(self) -> Mapping[str, float | None]:
        """Monotonic seconds since when the oldest call runs, by loop; None while none does."""


class _Parts(AsyncExitStack):
    """The open parts. `leaving` is called before the first of them is closed, for whatever reason."""

    def __init__(self, leaving: Callable[[], object]) -> None:
        super().__init__()
        self._leaving = leaving

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> bool:
        self._leaving()
        return bool(await super().__aexit__(kind, failure, traceback))


async def _done_before(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Whether `work` came to its end before the stop, which cancels it."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and not working.done():
            return False
        await working
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait((working, stopping))
    return not stop.is_set()


# -- running ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Every task of the service. A drain that took too long cancels what is left, and is not a failure."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except* DrainTimedOut:
        log.warning("drain_timed_out")


async def _drain(
    stop_intake: Callable[[float], Awaitable[bool]], reporters: Iterable[StatusReporter], timeout_s: float
) -> None:
    """Take no more jobs, finish and commit those in flight, and say goodbye.

    Raises:
        DrainTimedOut: some were not finished in time.
    """
    log.info("draining")
    drained = await stop_intake(timeout_s)
    for reporter in reporters:
        await reporter.update("stopped", "STOPPED")
    if not drained:
        raise DrainTimedOut


def _ended_well(task: asyncio.Task[Any]) -> bool:
    return not task.cancelled() and task.exception() is None


async def _nothing() -> None:
    """A loop that is switched off."""


async def _ready_after(joined: asyncio.Event, health: Health) -> None:
    await joined.wait()
    health.set_ready(None)
    log.info("ready")


def _expect_heartbeats(health: Health, stall_timeout_s: float) -> None:
    for loop in ("intake", "compute", "tokenize"):
        health.register(loop, stall_timeout_s, time.monotonic())


async def _beat_forever(
    health: Health, models: Busy, metrics: Metrics, clock: Callable[[], float] = time.monotonic
) -> None:
    """The heartbeats of native code: idle is healthy, working is healthy until the stall timeout.

    Raises:
        Stalled: one has worked for longer.
    """
    while True:
        now = clock()
        busy = models.busy_since
        for loop, since in busy.items():
            health.beat(loop, now if since is None else since)
        metrics.ready.set(health.ready(now).well)
        metrics.heartbeat_age.set(health.oldest_beat(now))
        if stalled := [loop for loop in busy if loop in health.silent(now)]:
            raise Stalled(f"{', '.join(stalled)}: stuck for longer than EMBEDQ_STALL_TIMEOUT_S")
        await asyncio.sleep(_HEARTBEAT_S)


@contextmanager
def _long_lived_objects_frozen() -> Iterator[None]:
    """Exempt what lives as long as the process from garbage collection: libraries and the model, half a million objects.

    Each full collection would walk through them, and every thread would wait a quarter of a second, every other second
    under load. Jobs leave no cycles, so that a higher threshold costs little memory. A model that is loaded later is not
    frozen, and no model's weights wait for the collector (`Encoder.close`).
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()  # else nothing frees the libraries' objects at exit, and some complain
