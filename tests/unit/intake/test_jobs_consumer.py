"""The intake's clients: the real ones are configured on purpose, and have all that their Protocols ask for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from embedq_consumer.group import Member, OffsetStore
from embedq_consumer.group import member as member_module
from embedq_consumer.intake import jobs_consumer as module
from embedq_consumer.intake.jobs_consumer import IntakeOptions, JobsConsumer, make_jobs_clients
from embedq_shared.kafka import BoundedConsumer, GroupMember, GroupMemberOptions
from tests.helpers.scripted_consumer import ScriptedConsumer, ScriptedMember


def options(**changes: Any) -> IntakeOptions:
    defaults: dict[str, Any] = {
        "group": "g",
        "replica": "r",
        "static_membership": False,
        "max_in_flight_jobs": 1,
        "max_started_texts": 1,
        "max_pending_bytes": 1,
        "max_in_flight_bytes": 1,
        "read_ahead_s": 1.0,
        "max_poll_records": 1,
        "max_uncommitted": 1,
        "commit_interval_s": 1.0,
        "session_timeout_ms": 10_000,
        "rebalance_timeout_ms": 60_000,
        "stuck_after_s": 1.0,
        "stuck_limit_s": 1.0,
    }
    return IntakeOptions(**defaults | changes)


class Recorded:
    """Stands where a client's class is; knows what it was made with."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.arguments = arguments
        self.settings = settings


def made(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[dict[str, Any], GroupMemberOptions]:
    monkeypatch.setattr(module, "BoundedConsumer", Recorded)
    monkeypatch.setattr(member_module, "GroupMember", Recorded)
    clients: Any = make_jobs_clients({"bootstrap_servers": "kafka:9092"}, options(**changes))
    kafka, membership = clients.member.arguments
    assert kafka == {"bootstrap_servers": "kafka:9092"}
    return clients.consumer.settings, membership


def test_who_reads_knows_no_group_and_who_is_a_member_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer, membership = made(monkeypatch)
    assert (consumer["bootstrap_servers"], consumer["group_id"]) == ("kafka:9092", None)
    assert consumer["auto_offset_reset"] == "earliest"  # a new group takes the jobs that wait already
    assert consumer["isolation_level"] == "read_committed"
    assert (membership.group, membership.client_id, membership.static) == ("g", "r", False)


@pytest.mark.parametrize(("session_ms", "heartbeat_ms"), [(45_000, 300), (10_000, 300), (600, 200)])
def test_three_heartbeats_fit_into_a_session(
    monkeypatch: pytest.MonkeyPatch, session_ms: int, heartbeat_ms: int
) -> None:
    _, membership = made(monkeypatch, session_timeout_ms=session_ms, static_membership=True)
    assert (membership.session_timeout_ms, membership.heartbeat_ms) == (session_ms, heartbeat_ms)
    assert membership.static


def methods(*protocols: type) -> list[tuple[type, str]]:
    return [
        (protocol, name)
        for protocol in protocols
        for name in sorted(vars(protocol))
        if not name.startswith("_")
    ]


@pytest.mark.parametrize(
    ("protocol", "method", "client"),
    [
        (protocol, method, client)
        for clients, protocols in (
            ((BoundedConsumer, ScriptedConsumer), (JobsConsumer,)),
            ((GroupMember, ScriptedMember), (Member, OffsetStore)),
        )
        for client in clients
        for protocol, method in methods(*protocols)
    ],
)
def test_the_real_clients_and_the_scripted_ones_take_the_calls_of_the_protocols(
    protocol: type, method: str, client: type
) -> None:
    asked = inspect.signature(getattr(protocol, method))
    has = inspect.signature(getattr(client, method))
    positional: list[Any] = [None]
    named: dict[str, Any] = {}
    for name, parameter in [*asked.parameters.items()][1:]:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named[name] = None
        else:
            positional.append(None)
    has.bind(*positional, **named)
    real = getattr(client, method)
    assert inspect.iscoroutinefunction(real) is inspect.iscoroutinefunction(getattr(protocol, method))


async def test_the_real_clients_accept_these_settings() -> None:
    """Made and not started: an unknown setting, or one that is out of range, raises."""
    clients = make_jobs_clients({"bootstrap_servers": "localhost:1"}, options())
    assert isinstance(clients.consumer, BoundedConsumer)
    assert isinstance(clients.member, GroupMember)
    await clients.consumer.stop()
    assert await clients.member.close(1.0) is None
