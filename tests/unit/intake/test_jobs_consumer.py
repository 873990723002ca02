"""The consumer of jobs: the real one is configured on purpose, and has all that its Protocol asks for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from embedq_consumer.intake import jobs_consumer as module
from embedq_consumer.intake.jobs_consumer import (
    IntakeOptions,
    JobsConsumer,
    make_jobs_consumer,
)
from tests.helpers.scripted_consumer import ScriptedConsumer

METHODS = sorted(name for name in vars(JobsConsumer) if not name.startswith("_"))


def options(**changes: Any) -> IntakeOptions:
    defaults: dict[str, Any] = {
        "group": "g",
        "max_in_flight_jobs": 1,
        "max_started_texts": 1,
        "max_pending_bytes": 1,
        "max_in_flight_bytes": 1,
        "max_poll_records": 1,
        "max_uncommitted": 1,
        "commit_interval_s": 1.0,
        "session_timeout_ms": 45_000,
        "rebalance_timeout_ms": 60_000,
    }
    return IntakeOptions(**defaults | changes)


class Recorded:
    """Stands where the client's class is; knows what it was made with."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


def settings_of(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    monkeypatch.setattr(module, "AIOKafkaConsumer", Recorded)
    made: Any = make_jobs_consumer({"bootstrap_servers": "kafka:9092"}, options(**changes))
    found: dict[str, Any] = made.settings
    return found


def test_offsets_are_committed_by_the_ledger_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch)
    assert (found["bootstrap_servers"], found["group_id"]) == ("kafka:9092", "g")
    assert found["enable_auto_commit"] is False
    assert found["auto_offset_reset"] == "earliest"  # a new group takes the jobs that wait already
    assert found["isolation_level"] == "read_committed"
    assert found["partition_assignment_strategy"] == (RoundRobinPartitionAssignor,)


@pytest.mark.parametrize(("session_ms", "heartbeat_ms"), [(45_000, 3000), (6000, 2000)])
def test_three_heartbeats_fit_into_a_session(
    monkeypatch: pytest.MonkeyPatch, session_ms: int, heartbeat_ms: int
) -> None:
    found = settings_of(monkeypatch, session_timeout_ms=session_ms)
    assert (found["session_timeout_ms"], found["heartbeat_interval_ms"]) == (session_ms, heartbeat_ms)


def test_a_join_may_take_longer_than_the_rebalance_that_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch, rebalance_timeout_ms=60_000)
    assert found["request_timeout_ms"] > found["rebalance_timeout_ms"] == 60_000


@pytest.mark.parametrize("consumer", [AIOKafkaConsumer, ScriptedConsumer])
@pytest.mark.parametrize("method", METHODS)
def test_the_real_consumer_and_the_scripted_one_take_the_calls_of_the_protocol(
    consumer: type, method: str
) -> None:
    asked = inspect.signature(getattr(JobsConsumer, method))
    has = inspect.signature(getattr(consumer, method))
    positional: list[Any] = [None]
    named: dict[str, Any] = {}
    for name, parameter in [*asked.parameters.items()][1:]:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named[name] = None
        else:
            positional.append(None)
    has.bind(*positional, **named)
    real = getattr(consumer, method)
    assert inspect.iscoroutinefunction(real) is inspect.iscoroutinefunction(getattr(JobsConsumer, method))


async def test_the_real_consumer_accepts_these_settings() -> None:
    """Made and not started: an unknown setting, or one that is out of range, raises."""
    consumer = make_jobs_consumer({"bootstrap_servers": "localhost:1"}, options())
    assert isinstance(consumer, AIOKafkaConsumer)
    await consumer.stop()
