"""One gateway process: its parts, its paths, and what runs beside the requests.

A request comes in at `Entrance`, which gives it to the handler of its path; a handler reads it in its dialect, asks
`Embedder`, and writes the answer in its dialect again. `Embedder` finds out who asks, and sends the texts through the SDK's
client, as a job in Kafka. The gateway keeps nothing: what it accepted is in Kafka, and any other gateway is as good.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from starlette.routing import BaseRoute, Router

from embedq_gateway.dialects.cohere import Cohere
from embedq_gateway.dialects.openai import OpenAI
from embedq_gateway.dialects.tei import Tei
from embedq_gateway.embedding import Embedder
from embedq_gateway.fleet.fleet import Fleet
from embedq_gateway.fleet.follower import FleetFollower
from embedq_gateway.http import logs
from embedq_gateway.http.entrance import Entrance
from embedq_gateway.keys.caller import Keys, OpenDoor
from embedq_gateway.openapi.pages import Pages
from embedq_gateway.operations.health import Health
from embedq_gateway.settings import GatewaySettings, kafka_settings
from embedq_sdk import EmbedClient
from embedq_sdk.errors import ClientClosed, EmbedError
from embedq_sdk.transport import KafkaConnection
from embedq_shared.settings.kafka import KafkaSettings

log = logging.getLogger("embedq.gateway")

_PAUSE_S: Final = 1.0
"""Between two tries to connect, each of which takes its time, too."""
_WATCH_S: Final = 1.0
"""Between two looks at what may have broken by itself."""


class Gateway:
    """The parts of one gateway process, each made before the event loop runs and opened by `running`."""

    def __init__(self, settings: GatewaySettings, kafka: KafkaSettings) -> None:
        self.settings = settings
        options = msgspec.structs.asdict(kafka.kafka_options())
        servers = options.pop("servers")
        self.client = EmbedClient(
            servers,
            topic_prefix=kafka.topic_prefix,
            max_in_flight_texts=settings.max_in_flight_texts,
            **options,
        )
        self.keys: Keys = OpenDoor()
        self.fleet = Fleet()
        self.follower = FleetFollower(self.fleet, KafkaConnection.of(servers, options), kafka.topics)
        self.embedder = Embedder(self.client, self.fleet, settings)
        self.entrance = Entrance(self.routes(), self.keys, self.running)
        if settings.access_log:
            self.entrance.observers.append(logs.log_request)

    def routes(self) -> list[BaseRoute]:
        """Every path, the busiest first."""
        return [
            *OpenAI(self.embedder, self.fleet, self.settings).routes(),
            *Tei(self.embedder, self.fleet, self.settings).routes(),
            *Cohere(self.embedder, self.settings).routes(),
            *Health().routes(),
            *Pages().routes(),
        ]

    @asynccontextmanager
    async def running(self, _: Router) -> AsyncIterator[None]:
        """Connect and follow in the background: requests are answered from the first moment on, with 503 at first."""
        self._leave_in_two_steps()
        tasks = [
            self._start("connect", self._connect()),
            self._start("fleet", self.follower.run()),
            self._start("watch", self._watch()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.client.close()

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
        """A client that broke down does not mend itself: recovery is the next process."""
        while True:
            if self.client.fault is not None:
                raise self.client.fault
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


def create(environ: Mapping[str, str] = os.environ) -> Entrance:
    """The ASGI application that the environment describes; uvicorn calls this in each process.

    Raises:
        SettingsError: a setting is wrong.
    """
    settings = GatewaySettings.from_env(environ)
    logs.configure(settings.log_level)
    return Gateway(settings, kafka_settings(environ)).entrance
