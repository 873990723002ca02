"""A gateway in this process, over a fake service: everything but uvicorn and Kafka is real."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import httpx

from embedq_gateway.app import Gateway
from embedq_gateway.settings import GatewaySettings
from embedq_sdk import client as client_module
from embedq_shared.messages import Status
from embedq_shared.settings.kafka import KafkaSettings
from tests.helpers.fake_service import HIDDEN_SIZE, OLD, FakeService
from tests.helpers.fake_transport import FakeTransport

MAX_TOKENS = 512


class Door:
    """A gateway, an HTTP client in front of it, and the fake service behind it."""

    def __init__(self, gateway: Gateway, transport: FakeTransport, http: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.transport = transport
        self.http = http

    @property
    def service(self) -> FakeService:
        return self.transport.service

    def see(self, replica: str = "r1", **more: Any) -> None:
        """A replica says how it is: alive and serving `default`, unless told otherwise."""
        self.gateway.fleet.board.see(replica, a_status(replica, **more))

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A JSON request; `x_request_id` is the header `x-request-id`."""
        return await self.http.post(
            path, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


def a_status(replica: str = "r1", **more: Any) -> Status:
    """A replica that serves `default`."""
    known: dict[str, Any] = {
        "replica": replica,
        "alias": "default",
        "version": 1,
        "step": "serving",
        "state": "READY",
        "model_version": OLD,
        "error": None,
        "at": int(time.time() * 1000),
        "serving": True,
        "dimensions": HIDDEN_SIZE,
        "max_tokens": MAX_TOKENS,
    }
    return Status(**(known | more))


@asynccontextmanager
async def a_gateway(
    *, opened: bool = True, change: Callable[[Gateway], None] = lambda gateway: None, **settings: Any
) -> AsyncIterator[Door]:
    """A gateway with these settings, connected unless told otherwise, and one replica alive. `change` may alter its parts."""
    transports: list[FakeTransport] = []

    def connect(*args: Any, **more: Any) -> FakeTransport:
        transports.append(FakeTransport(*args, **more))
        return transports[-1]

    with mock.patch.object(client_module, "KafkaTransport", connect):
        # It reads files, as it may where nothing runs yet.
        gateway = await asyncio.to_thread(
            Gateway, GatewaySettings(**settings), KafkaSettings(kafka_servers="fake:9092")
        )
    change(gateway)
    transport = httpx.ASGITransport(app=gateway.entrance, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        door = Door(gateway, transports[0], http)
        door.see()
        if opened:
            await gateway.client.open()
        try:
            yield door
        finally:
            await gateway.client.close()
