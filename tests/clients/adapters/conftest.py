"""Adapters whose client talks to a fake service instead of Kafka."""

from __future__ import annotations

from typing import Any

import pytest

from embedq_sdk import client as client_module
from tests.helpers.fake_service import FakeService
from tests.helpers.fake_transport import FakeTransport


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """What every client that a test makes talks to."""
    shared = FakeService()

    def connect(*args: Any, **more: Any) -> FakeTransport:
        transport = FakeTransport(*args, **more)
        transport.service = shared
        return transport

    monkeypatch.setattr(client_module, "KafkaTransport", connect)
    return shared
