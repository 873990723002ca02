"""One gateway process: its parts, its paths, and what runs beside the requests.

A request comes in at `Entrance`, which gives it to the handler of its path; a handler reads it in its dialect, asks
`Embedder`, and writes the answer in its dialect again. `Embedder` finds out who asks, and sends the texts through the SDK's
client, as a job in Kafka. The gateway keeps nothing: what it accepted is in Kafka, and any other gateway is as good.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.routing import BaseRoute, Router

from embedq_gateway.batches.answering import MAX_ATTEMPTS
from embedq_gateway.batches.opening import Batches, NoBatches
from embedq_gateway.console.page import console_routes
from embedq_gateway.dialects.cohere import Cohere
from embedq_gateway.dialects.openai import OpenAI
from embedq_gateway.dialects.tei import Tei
from embedq_gateway.embedding import Embedder
from embedq_gateway.fleet.fleet import Fleet
from embedq_gateway.fleet.follower import FleetFollower
from embedq_gateway.http import logs
from embedq_gateway.http.access_log import AccessLog
from embedq_gateway.http.connections import STATE, Connections
from embedq_gateway.http.entrance import Entrance
from embedq_gateway.http.pace import Bounds
from embedq_gateway.joining import JoiningClient
from embedq_gateway.keys import Door, KeyFileError, is_loopback
from embedq_gateway.keys.keeper import KeyKeeper
from embedq_gateway.openapi.pages import Pages
from embedq_gateway.operations.admin import Admin, KeyFileState, ReloadRequest
from embedq_gateway.operations.health import Health, not_ready
from embedq_gateway.operations.history import History
from embedq_gateway.operations.lag import LagReader, sample
from embedq_gateway.operations.metrics import GatewayMetrics
from embedq_gateway.settings import PREFIX, GatewaySettings, SettingsError, kafka_settings
from embedq_sdk import EmbedClient
from embedq_sdk.admin import RolloutUpdate, reload_model
from embedq_sdk.errors import ClientClosed, EmbedError
from embedq_sdk.transport import KafkaConnection
from embedq_shared.settings.kafka import KafkaSettings

log = logging.getLogger("embedq.gateway")

_PAUSE_S: Final = 1.0
"""Between two tries to connect, each of which takes its time, too."""
_WATCH_S: Final = 1.0
"""Between two looks at what may have broken by itself."""
_YOUNG_OBJECTS: Final = 10_000
"""Before a garbage collection of the youngest: requests leave few cycles, and Python's 700 would mean a look every ten of them."""


class Gateway:
    """The parts of one gateway process, each made before the event loop runs and opened by `running`."""

    def __init__(self, settings: GatewaySettings, kafka: KafkaSettings) -> None:
        self.settings = settings
        self._security = options = msgspec.structs.asdict(kafka.kafka_options())
        self._servers = servers = options.pop("servers")
        self._topics = kafka.topics
        self.client = EmbedClient(
            servers,
            topic_prefix=kafka.topic_prefix,
            max_in_flight_texts=settings.max_in_flight_texts,
            **options,
        )
        self.metrics = GatewayMetrics()
        self.keeper = _keeper(settings, self.metrics)
        self.keys = self.keeper.door if self.keeper else _open_door(settings)
        self.connections = Connections(_bounds(settings), ended=self.metrics.connections_ended.inc)
        self.fleet = Fleet()
        connection = KafkaConnection.of(servers, options)
        self.follower = FleetFollower(self.fleet, connection, kafka.topics)
        self.history = History()
        self.lag = LagReader(connection, kafka.topics, settings.group)
        self.leaving = asyncio.Event()
        joining = JoiningClient(self.client, settings.join_texts)
        self.embedder = Embedder(joining, self.fleet, settings)
        self.admin = Admin(
            fleet=self.fleet,
            fresh=self._fresh,
            history=self.history,
            keys=self._key_file,
            reload=self._reload,
            leaving=self.leaving,
        )
        self.batches: Batches | NoBatches = NoBatches()
        if settings.files:
            # A client of its own: what waits there for hours leaves the room of requests alone.
            client = EmbedClient(
                servers, topic_prefix=kafka.topic_prefix, max_attempts=MAX_ATTEMPTS, **options
            )
            self.batches = Batches(settings, client)
        self.entrance = Entrance(
            self.routes(), self.keys, self.running, most_held_bytes=settings.max_held_bytes
        )
        self.entrance.observers.append(self.metrics.observe)
        self.access_log = AccessLog() if settings.access_log else None
        if self.access_log is not None:
            self.entrance.observers.append(self.access_log)

    def routes(self) -> list[BaseRoute]:
        """Every path, the busiest first."""
        return [
            *OpenAI(self.embedder, self.fleet, self.settings).routes(),
            *self.batches.routes(),
            *Tei(self.embedder, self.fleet, self.settings).routes(),
            *Cohere(self.embedder, self.settings).routes(),
            *Health(self.not_ready, self.metrics).routes(),
            *self.admin.routes(),
            *Pages().routes(),
            *console_routes(),
        ]

    def not_ready(self) -> str | None:
        """Why no request should be sent here; None: there is no reason."""
        model = self.fleet.model(self.settings.default_alias, time.time())
        return not_ready(
            leaving=self.entrance.closing,
            answering=self.client.answering,
            fresh=self._fresh(),
            alias=self.settings.default_alias,
            serving=model.replicas if model else 0,
        )

    @asynccontextmanager
    async def running(self, _: Router) -> AsyncIterator[dict[str, Any]]:
        """Connect and follow in the background: requests are answered from the first moment on, with 503 at first."""
        self._leave_in_two_steps()
        tasks = [
            self._start("connect", self._connect()),
            self._start("fleet", self.follower.run()),
            self._start("watch", self._watch()),
            self._start("batches", self.batches.run()),
            self._start("history", sample(self.history, self.lag, self.metrics.tokens_so_far)),
        ]
        if self.keeper is not None:
            tasks.append(self._start("keys", self.keeper.follow()))
        try:
            yield {STATE: self.connections}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.client.close()
            if self.access_log is not None:
                self.access_log.flush()

    async def _connect(self) -> None:
        """Open the client, however long Kafka is away."""
        said = ""
        while True:
            try:
                await self.client.open()
            except ClientClosed:
                return
            except EmbedError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("kafka_not_connected", extra={"reason": said})
                await asyncio.sleep(_PAUSE_S)
            else:
                log.info("kafka_connected", extra={"reply_partition": self.client.reply_partition})
                return

    async def _watch(self) -> None:
        """Look at what time changes: peers that are too slow, readiness, and a client that broke down. That one does not mend
        itself: recovery is the next process.
        """
        while True:
            if self.client.fault is not None:
                raise self.client.fault
            self.connections.sweep(time.monotonic())
            self.measure()
            if self.entrance.closing:
                self.leaving.set()
            await asyncio.sleep(_WATCH_S)

    def _leave_in_two_steps(self) -> None:
        """From SIGTERM on answers close their connections, and load balancers see that we are not ready; uvicorn, which then
        accepts nothing more and waits for what was accepted, is told a little later."""
        loop = asyncio.get_running_loop()
        leave = signal.getsignal(signal.SIGTERM)

        def begin(number: int) -> None:
            if not self.entrance.closing and callable(leave):
                log.info("leaving")
                self.entrance.closing = True
                loop.call_later(self.settings.drain_delay_s, leave, number, None)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: loop.call_soon_threadsafe(begin, number))

    def measure(self) -> None:
        """Bring the gauges of this process up to date."""
        idle = self.connections.idle
        self.metrics.measure(
            in_flight=len(self.entrance.in_flight),
            busy=len(self.connections) - idle,
            idle=idle,
            ready=self.not_ready() is None,
        )

    def _fresh(self) -> bool:
        return self.follower.fresh(time.monotonic())

    def _key_file(self) -> KeyFileState | None:
        if self.keeper is None:
            return None
        return KeyFileState(names=self.keys.names, fault=self.keeper.fault)

    def _reload(self, asked: ReloadRequest) -> AsyncGenerator[RolloutUpdate, None]:
        return reload_model(
            self._servers,
            asked.path,
            alias=asked.alias,
            digest=asked.digest,
            policy=asked.command_policy,
            quantization=asked.quantization,
            min_cosine=asked.min_cosine,
            golden=asked.golden,
            golden_min_cosine=asked.golden_min_cosine,
            min_dimensions=asked.min_dimensions,
            pool=asked.pool,
            expected_version=asked.expected_version,
            max_unavailable=asked.max_unavailable,
            canary=asked.canary,
            soak=asked.soak,
            timeout=asked.timeout,
            topic_prefix=self._topics.prefix,
            **self._security,
        )

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"embedq-gateway-{name}")
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that fails ends the process, as a signal would: what was accepted is still answered if it can be."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        self.entrance.fault = error
        log.critical("task_failed", extra={"task": task.get_name(), "reason": repr(error)}, exc_info=error)
        signal.raise_signal(signal.SIGTERM)


def _keeper(settings: GatewaySettings, metrics: GatewayMetrics) -> KeyKeeper | None:
    """The file of keys, read; None where there is none.

    Raises:
        SettingsError: it cannot be used.
    """
    if not settings.keys_file:
        return None

    def told(outcome: str) -> None:
        metrics.key_file_readings.labels(outcome).inc()
        metrics.key_file_broken.set(outcome != "ok")

    try:
        return KeyKeeper(Path(settings.keys_file), workers=settings.workers, told=told)
    except KeyFileError as error:
        raise SettingsError(f"{PREFIX}KEYS_FILE: {error}") from error


def _bounds(settings: GatewaySettings) -> Bounds:
    return Bounds(
        connections=settings.max_connections,
        head_bytes=settings.max_head_bytes,
        head_s=settings.head_timeout_s,
        idle_s=settings.idle_timeout_s,
        body_bytes_per_s=settings.body_bytes_per_s,
    )


def _open_door(settings: GatewaySettings) -> Door:
    return Door(None, loopback=is_loopback(settings.host) and not settings.allow_anonymous)


def create(environ: Mapping[str, str] = os.environ) -> Entrance:
    """The ASGI application that the environment describes; uvicorn calls this in each process.

    Raises:
        SettingsError: a setting is wrong.
    """
    settings = GatewaySettings.from_env(environ)
    logs.configure(settings.log_level)
    entrance = Gateway(settings, kafka_settings(environ)).entrance
    # A full garbage collection would walk through libraries and settings, 50,000 objects, and every request wait 20 ms for it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    return entrance
