"""Blocking clients whose async client, in its own thread, talks to a fake service instead of Kafka."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embedq_sdk import client as client_module
from embedq_sdk.blocking import EmbedClient
from tests.helpers.fake_service import FakeService
from tests.helpers.fake_transport import FakeTransport

Clients = Callable[..., EmbedClient]


class Side:
    """The other side of the clients that a test makes: of each one's, and of the last one's."""

    def __init__(self) -> None:
        self.transports: list[FakeTransport] = []
        self.fails_to_open: Exception | None = None
        self.may_open = threading.Event()
        self.may_open.set()

    @property
    def transport(self) -> FakeTransport:
        return self.transports[-1]

    @property
    def service(self) -> FakeService:
        return self.transport.service


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Side:
    side = Side()

    def connect(*args: Any, **more: Any) -> FakeTransport:
        side.transports.append(FakeTransport(*args, **more))
        return side.transport

    monkeypatch.setattr(client_module, "KafkaTransport", connect)
    return side


@pytest.fixture
def client(side: Side) -> Iterator[Clients]:
    made: list[EmbedClient] = []

    def make(**settings: Any) -> EmbedClient:
        made.append(EmbedClient("fake:9092", **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()
