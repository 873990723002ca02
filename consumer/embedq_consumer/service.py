"""The whole story, start here: open the parts, load the model, run the loops until the stop, drain, close in reverse.

A job's path is `pipeline.py`, from the poll loop's `take` to `finish`. Two facts are decided here and nowhere else:

- **Where a job's offset is committed.** The deliverer calls `intake.finish` once the broker has acknowledged a job's
  result, and `intake.commit_forever` commits each partition up to its first record that is not finished. So when a process ends in
  any way, the next one repeats what was not answered.
- **Where a reload swaps the model.** `model.follow` reads commands, loads and checks the new model, and swaps it in inside
  `intake.held`, where nothing is in flight: no job is computed by two models (`lifecycle/reloader.py`, `_serve`).

Every loop is a task of one group: when one fails, the others are cancelled and the process ends with exit code 1.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from embedq_consumer.cache import VectorCache
from embedq_consumer.delivery.deliverer import Deliverer, Finish
from embedq_consumer.delivery.kafka_producer import producers
from embedq_consumer.delivery.publisher import Publisher
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.engine import default_batch_tokens, load_encoder
from embedq_consumer.intake import Intake, make_jobs_consumer
from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.model_slot import ModelSlot
from embedq_consumer.lifecycle.served_model import ServedModel
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.pipeline import Pipeline
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.telemetry.health import Health, HealthServer
from embedq_consumer.telemetry.metrics import Metrics

log = structlog.get_logger()

_HEARTBEAT_S: Final = 0.5
"""Well below any stall timeout; the gauges that go with it are scraped every few seconds."""
_YOUNG_OBJECTS: Final = 20_000
"""New objects before a collection; the jobs in flight alone are some ten thousand."""
_MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""Of one request to the broker, which may carry many results."""


class MissingTopics(Exception):
    """The service creates no topic; the message says which are missing and what creates them."""


class DrainTimedOut(Exception):
    """Some jobs were not finished in time. None is lost: their offsets are not committed."""


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run one replica until `stop` is set, then finish what was accepted and leave.

    Raises:
        SettingsError, MissingTopics, ModelError, ModelRejected, KafkaError, OSError: it cannot start.
        BaseExceptionGroup: a loop failed, for instance with `DeviceLost`, `NoModel` or `BrokerUnavailable`.
    """
    settings = settings.named()
    await asyncio.to_thread(_check_directories, settings)
    health, metrics = Health(), Metrics()
    async with AsyncExitStack() as parts:
        await parts.enter_async_context(_health_pages(settings, metrics, health))
        cache = await parts.enter_async_context(_cache(settings, metrics))
        publisher = await parts.enter_async_context(_publisher(settings, metrics))
        model = await parts.enter_async_context(_model(settings, publisher, metrics, health))
        control = await parts.enter_async_context(_control(settings, metrics))

        # The desired model first, the jobs after: a late joiner must not answer with yesterday's model.
        health.set_ready("loading the model")
        await model.start(await control.open())
        if stop.is_set():
            return
        parts.enter_context(_long_lived_objects_frozen())

        intake = await parts.enter_async_context(_intake(settings, metrics, health))
        deliverer = await parts.enter_async_context(_deliverer(settings, publisher, intake.finish, metrics))
        async with _tasks() as tasks:
            pipeline = Pipeline(
                settings.admission, model.encoder, cache, model.queue, deliverer, tasks, intake.weigh
            )
            _expect_heartbeats(health, settings.stall_timeout_s)
            loops = {
                "intake": intake.run(pipeline.take, pipeline.take_unreadable),
                "commit": intake.commit_forever(),
                "batches": model.run_batches(pipeline, tasks),
                "control": model.follow(control, intake.held),
                "status": model.reporter.resend_forever(),
                "heartbeat": _beat_forever(health, model.slot, metrics),
                "ready": _ready_after(intake.joined, health),
            }
            running = [tasks.create_task(loop, name=name) for name, loop in loops.items()]

            await stop.wait()

            health.set_ready("draining")
            await _drain(intake.stop, model.reporter, settings.drain_timeout_s)
            for loop in running:
                loop.cancel()
    log.info("stopped")


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
    stop_intake: Callable[[float], Awaitable[bool]], reporter: StatusReporter, timeout_s: float
) -> None:
    """Take no more jobs, finish and commit those in flight, and say goodbye.

    Raises:
        DrainTimedOut: some were not finished in time.
    """
    log.info("draining")
    drained = await stop_intake(timeout_s)
    await reporter.update("stopped", "STOPPED")
    if not drained:
        raise DrainTimedOut


async def _ready_after(joined: asyncio.Event, health: Health) -> None:
    await joined.wait()
    health.set_ready(None)
    log.info("ready")


def _expect_heartbeats(health: Health, stall_timeout_s: float) -> None:
    for loop in ("intake", "compute"):
        health.register(loop, stall_timeout_s, time.monotonic())


async def _beat_forever(
    health: Health, slot: ModelSlot, metrics: Metrics, clock: Callable[[], float] = time.monotonic
) -> None:
    """The compute loop's heartbeat: idle is healthy, computing is healthy until the stall timeout."""
    while True:
        now = clock()
        health.beat("compute", slot.busy_since or now)
        metrics.ready.set(health.ready(now).well)
        metrics.heartbeat_age.set(health.oldest_beat(now))
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


# -- opening, in the order of `serve` ---------------------------------------------------------------------------------


def _check_directories(settings: Settings) -> None:
    for name, directory in (("MODEL", Path(settings.model)), ("MODEL_ROOT", settings.root)):
        if not directory.is_dir():
            raise SettingsError(f"EMBEDQ_{name}: expected a directory, {directory} is not one")


@asynccontextmanager
async def _health_pages(settings: Settings, metrics: Metrics, health: Health) -> AsyncIterator[None]:
    server = HealthServer(settings.http_port, metrics.registry, health, host=settings.http_host)
    try:
        log.info("starting", replica=settings.replica, http_port=server.port)
        yield
    finally:
        await asyncio.to_thread(server.close)


@asynccontextmanager
async def _cache(settings: Settings, metrics: Metrics) -> AsyncIterator[VectorCache]:
    try:
        cache = VectorCache(settings.cache, metrics)
    except ValueError:  # its message may quote a password
        raise SettingsError("EMBEDQ_REDIS_URL: expected an address such as redis://HOST:6379/0") from None
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


@asynccontextmanager
async def _publisher(settings: Settings, metrics: Metrics) -> AsyncIterator[Publisher]:
    publisher = Publisher(
        producers(settings.kafka(), max_bytes=_MAX_REQUEST_BYTES),
        metrics,
        timeout_s=settings.publish_timeout_s,
    )
    await publisher.open()
    try:
        topics = settings.topics
        needed = (*topics.lanes, topics.results, topics.control, topics.status, topics.dead_letters)
        if missing := [topic for topic in needed if publisher.topics.partitions(topic) is None]:
            raise MissingTopics(
                f"no topic {', '.join(missing)} on the broker; `embedq topics create` makes them"
            )
        yield publisher
    finally:
        await publisher.close()


@asynccontextmanager
async def _model(
    settings: Settings, publisher: Publisher, metrics: Metrics, health: Health
) -> AsyncIterator[ServedModel]:
    batch_tokens = settings.max_batch_tokens or await asyncio.to_thread(default_batch_tokens, settings.device)
    options = await asyncio.to_thread(settings.served_model, batch_tokens)

    load = partial(load_encoder, options=settings.load)
    model = ServedModel(options, load, publisher.publish, metrics, health.tell)
    try:
        yield model
    finally:
        await asyncio.to_thread(model.close)  # waits for a micro-batch that runs


@asynccontextmanager
async def _control(settings: Settings, metrics: Metrics) -> AsyncIterator[ControlTopic]:
    control = ControlTopic(settings.kafka(), settings.topics, settings.alias, metrics)
    try:
        yield control
    finally:
        await control.close()


@asynccontextmanager
async def _intake(settings: Settings, metrics: Metrics, health: Health) -> AsyncIterator[Intake]:
    intake = Intake(
        make_jobs_consumer(settings.kafka(), settings.intake),
        settings.intake,
        topics=settings.topics,
        metrics=metrics,
        beat=lambda: health.beat("intake", time.monotonic()),
    )
    try:
        await intake.open()
        yield intake
    finally:
        await intake.close()


@asynccontextmanager
async def _deliverer(
    settings: Settings, publisher: Publisher, finish: Finish, metrics: Metrics
) -> AsyncIterator[Deliverer]:
    results = ResultEncoder(settings.topics, settings.group, settings.max_result_bytes)
    deliverer = Deliverer(results, publisher, finish, metrics)
    try:
        yield deliverer
    finally:
        await asyncio.to_thread(deliverer.close)
