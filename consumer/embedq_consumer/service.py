"""The whole story, start here: open the parts, load the model, run the loops until the stop, drain, close in reverse.

A job's path is `pipeline.py`, from the poll loop's `take` to `finish`. Two facts are decided here and nowhere else:

- **Where a job's offset is committed.** The deliverer calls `quarantine.finish`, and that calls `intake.finish`, once the
  broker has acknowledged a job's result, and `intake.commit_forever` commits each partition up to its first record that is not finished. So when a process ends in
  any way, the next one repeats what was not answered.
- **Where a reload swaps the model.** `model.follow` reads commands, loads and checks the new model, and swaps it in inside
  `intake.held`, where nothing is in flight: no job is computed by two models (`lifecycle/reloader.py`, `_serve`).

Every loop is a task of one group: when one fails, the others are cancelled and the process ends with exit code 1.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

import msgspec
import structlog

from embedq_consumer.cache import BadCacheSetting, EntryCodec, SecretSource, VectorCache, load_secret
from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits, Finish
from embedq_consumer.delivery.kafka_producer import KafkaProducers
from embedq_consumer.delivery.publisher import Publisher
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.engine import default_batch_tokens, load_encoder
from embedq_consumer.exactly_once import ReleaseLoop, make_release_loop, transactional_producers
from embedq_consumer.intake import Intake, make_jobs_clients
from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.served_model import ServedModel
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.pipeline import Pipeline
from embedq_consumer.quarantine import Quarantine, Suspects
from embedq_consumer.retries import RetryPolicy, RetryTiers, open_tiers
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.telemetry.health import CannotListen, Health, HealthServer
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.backoff import backoff
from embedq_shared.kafka import BrokerUnreachable, KafkaConnectionError, reason
from embedq_shared.messages import STATUS_INTERVAL_S
from embedq_shared.weighted_semaphore import WeightedSemaphore

log = structlog.get_logger()

T = TypeVar("T")

_HEARTBEAT_S: Final = 0.5
"""Well below any stall timeout; the gauges that go with it are scraped every few seconds."""
_YOUNG_OBJECTS: Final = 20_000
"""New objects before a collection; the jobs in flight alone are some ten thousand."""
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 2.0
"""Between two tries to reach Kafka, which takes seconds itself to start."""
_AWAY: Final = (BrokerUnreachable, KafkaConnectionError, TimeoutError)
"""Kafka is not there yet. A broker that is there and does not let us in says something else."""
_TRANSACTION_TIMEOUT_MS: Final = 15_000
"""How long the brokers leave a dead replica's transaction open: so long readers of its results wait, and the next owner of its
partitions. Longer than the steps of one that lives."""
_MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""Of one request to the broker, which may carry many results."""


class MissingTopics(Exception):
    """The service creates no topic; the message says which are missing and what creates them."""


class Stalled(Exception):
    """Native code does not come back. No thread can be ended from outside, so the process is."""


class _StoppedEarly(Exception):
    """Told to stop while Kafka was waited for: nothing was accepted yet."""


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
    except _StoppedEarly:
        log.info("stopped")


async def _serve(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
    settings = settings.named()
    if not await _done_before(stop, asyncio.to_thread(_check_directories, settings)):
        return
    health, metrics = Health(), Metrics()
    async with _Parts(leaving) as parts:
        await parts.enter_async_context(_health_pages(settings, metrics, health))
        cache = await parts.enter_async_context(_cache(settings, metrics))
        publisher = await parts.enter_async_context(_publisher(settings, metrics, health, stop))
        model = await parts.enter_async_context(_model(settings, publisher, metrics, health))
        control = await parts.enter_async_context(_control(settings, metrics))

        # The desired model first, the jobs after: a late joiner must not answer with yesterday's model.
        health.set_ready("loading the model")
        desired = await _once_kafka_answers(control.open, health, stop)
        if not await _done_before(stop, model.start(desired)):
            return
        parts.enter_context(_long_lived_objects_frozen())

        suspects = Suspects(settings.claimant())
        tiers = open_tiers(settings.topics, settings.retry_delays, publisher.topics.partitions)
        intake = await parts.enter_async_context(_intake(settings, tiers, suspects, metrics, health, stop))
        quarantine = Quarantine(suspects, intake.commits, intake.finish, metrics)
        results = ResultEncoder(
            settings.topics,
            settings.group,
            settings.max_result_bytes,
            replica=settings.replica,
            retries=RetryPolicy(tiers, suspects.on_trial),
        )
        releases = await parts.enter_async_context(_releases(settings, publisher, intake, results, health))
        deliverer = await parts.enter_async_context(
            _deliverer(settings, publisher, results, releases, quarantine.finish, metrics)
        )
        async with _tasks() as tasks:
            pipeline = Pipeline(settings.admission, model.encoder, cache, model.queue, deliverer, tasks)
            quarantine.hand_to(pipeline)
            _expect_heartbeats(health, settings.stall_timeout_s)
            loops = {
                "intake": intake.run(quarantine.take, quarantine.take_unreadable),
                "quarantine": quarantine.run(),
                "commit": intake.commit_forever(),
                "watermarks": intake.watch(pipeline.give_up, partial(health.hinder, "watermark")),
                "batches": model.run_batches(pipeline, tasks),
                "control": model.follow(control, intake.held),
                "status": model.reporter.resend_forever(),
                "memory": model.watch_memory(),
                "delivery": publisher.watch(),
                "heartbeat": _beat_forever(health, model, metrics),
                "transactions": releases.run() if releases else _nothing(),
                "ready": _ready_after(intake.joined, health),
            }
            running = [tasks.create_task(loop, name=name) for name, loop in loops.items()]
            for loop in running:
                loop.add_done_callback(lambda ended: None if _ended_well(ended) else leaving())

            await stop.wait()

            health.set_ready("draining")
            await _drain(intake.stop, model.reporter, settings.drain_timeout_s)
            for loop in running:
                loop.cancel()
    log.info("stopped")


class Busy(Protocol):
    """What runs native code, such as the served model."""

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
    health: Health, model: Busy, metrics: Metrics, clock: Callable[[], float] = time.monotonic
) -> None:
    """The heartbeats of native code: idle is healthy, working is healthy until the stall timeout.

    Raises:
        Stalled: one has worked for longer.
    """
    while True:
        now = clock()
        for loop, since in model.busy_since.items():
            health.beat(loop, now if since is None else since)
        metrics.ready.set(health.ready(now).well)
        metrics.heartbeat_age.set(health.oldest_beat(now))
        if stalled := [loop for loop in model.busy_since if loop in health.silent(now)]:
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


# -- opening, in the order of `serve` ---------------------------------------------------------------------------------


def _check_directories(settings: Settings) -> None:
    for name, directory in (("MODEL", Path(settings.model)), ("MODEL_ROOT", settings.root)):
        if not directory.is_dir():
            raise SettingsError(f"EMBEDQ_{name}: expected a directory, {directory} is not one")


async def _once_kafka_answers(open: Callable[[], Awaitable[T]], health: Health, stop: asyncio.Event) -> T:
    """What `open` returns, once it can: it is called again as long as no broker can be reached.

    Raises:
        _StoppedEarly: `stop` was set meanwhile.
    """
    attempt = 0
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while not stop.is_set():
            opening = asyncio.ensure_future(open())
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                await asyncio.wait({opening})
                break
            try:
                opened = opening.result()
            except _AWAY as error:
                if attempt == 0:
                    log.warning("waiting_for_kafka", reason=reason(error))
                health.hinder("start", f"waiting for Kafka: {reason(error)}")
            else:
                health.hinder("start", None)
                return opened
            pause = backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
            await asyncio.wait({stopped}, timeout=pause)
            attempt += 1
        raise _StoppedEarly
    finally:
        stopped.cancel()


@asynccontextmanager
async def _health_pages(settings: Settings, metrics: Metrics, health: Health) -> AsyncIterator[None]:
    try:
        server = HealthServer(settings.http_port, metrics.registry, health, host=settings.http_host)
    except CannotListen as error:
        raise SettingsError(f"EMBEDQ_{error}") from error
    try:
        log.info("starting", replica=settings.replica, http_port=server.port)
        yield
    finally:
        await asyncio.to_thread(server.close)


@asynccontextmanager
async def _cache(settings: Settings, metrics: Metrics) -> AsyncIterator[VectorCache]:
    options = settings.cache
    try:
        await asyncio.to_thread(options.redis.check)
        source = settings.cache_secret(os.environ) if options.redis.url else SecretSource()
        secret = await asyncio.to_thread(load_secret, source)
    except BadCacheSetting as error:
        raise SettingsError(f"EMBEDQ_{error}") from None
    try:
        cache = await asyncio.to_thread(VectorCache, options, EntryCodec(secret.value), metrics)
    except ValueError:  # its message may quote a password
        raise SettingsError("EMBEDQ_REDIS_URL: expected an address such as redis://HOST:6379/0") from None
    if options.redis.url:
        if secret.origin == "process":
            log.warning(
                "cache_key_not_kept",
                hint="this process's entries are of no use to any other, nor to the next one; set EMBEDQ_CACHE_KEY or "
                "EMBEDQ_CACHE_KEY_FILE",
            )
        else:
            log.info("cache_key", origin=secret.origin, file=secret.path)
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


@asynccontextmanager
async def _publisher(
    settings: Settings, metrics: Metrics, health: Health, stop: asyncio.Event
) -> AsyncIterator[Publisher]:
    publisher = Publisher(
        KafkaProducers(settings.kafka(), max_bytes=_MAX_REQUEST_BYTES),
        metrics,
        # Half of a lane: the other half goes on with places that work.
        max_held=max(1, settings.max_in_flight_jobs // 2),
        hinder=partial(health.hinder, "delivery"),
    )
    try:
        await _once_kafka_answers(publisher.open, health, stop)
        topics = settings.topics
        needed = (*topics.lanes, topics.results, topics.control, topics.status, topics.dead_letters)
        if missing := [topic for topic in needed if publisher.topics.partitions(topic) is None]:
            raise MissingTopics(
                f"no topic {', '.join(missing)} on the broker, or none that this user may see; "
                "`embedq topics create` makes them"
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

    load = partial(load_encoder, options=await asyncio.to_thread(lambda: settings.load))
    announce = partial(publisher.announce, within=STATUS_INTERVAL_S)
    model = ServedModel(options, load, announce, metrics, health.tell)
    try:
        yield model
    finally:
        await asyncio.to_thread(model.close)


@asynccontextmanager
async def _control(settings: Settings, metrics: Metrics) -> AsyncIterator[ControlTopic]:
    control = ControlTopic(settings.kafka(), settings.topics, settings.alias, metrics)
    try:
        yield control
    finally:
        await control.close()


@asynccontextmanager
async def _intake(
    settings: Settings,
    tiers: RetryTiers,
    suspects: Suspects,
    metrics: Metrics,
    health: Health,
    stop: asyncio.Event,
) -> AsyncIterator[Intake]:
    options = msgspec.structs.replace(settings.intake, retries=tiers)
    intake = Intake(
        make_jobs_clients(settings.kafka(), options),
        options,
        topics=settings.topics,
        metrics=metrics,
        beat=lambda: health.beat("intake", time.monotonic()),
        custodian=suspects,
    )
    try:
        await _once_kafka_answers(intake.open, health, stop)
        yield intake
    finally:
        await intake.close()


@asynccontextmanager
async def _releases(
    settings: Settings, publisher: Publisher, intake: Intake, results: ResultEncoder, health: Health
) -> AsyncIterator[ReleaseLoop | None]:
    """Exactly-once delivery of the bulk lane, if it is switched on."""
    if (options := settings.exactly_once) is None:
        yield None
        return
    releases = make_release_loop(
        options,
        transactional_producers(
            settings.kafka(),
            f"{settings.group}.{settings.replica}",
            timeout_ms=_TRANSACTION_TIMEOUT_MS,
            max_bytes=_MAX_REQUEST_BYTES,
        ),
        positions=intake.positions,
        committing=intake.committing,
        encoder=results,
        kafka=publisher,
        hinder=partial(health.hinder, "transactions"),
    )
    try:
        yield releases
    finally:
        await releases.close()


@asynccontextmanager
async def _deliverer(
    settings: Settings,
    publisher: Publisher,
    results: ResultEncoder,
    releases: ReleaseLoop | None,
    finish: Finish,
    metrics: Metrics,
) -> AsyncIterator[Deliverer]:
    memory = WeightedSemaphore(settings.max_pending_bytes)
    limits = DeliveryLimits(
        reply_timeout_s=settings.reply_timeout_s,
        # Half of what may stay uncommitted: with all of it, the partition's other jobs would wait for this one.
        max_behind=max(1, settings.max_uncommitted_jobs // 2),
    )
    deliverer = Deliverer(results, publisher, finish, memory, metrics, limits, bulk=releases)
    try:
        yield deliverer
    finally:
        await asyncio.to_thread(deliverer.close)
