"""The replica's status: what changes, what stays, what is only said once."""

from __future__ import annotations

import asyncio
import time

import pytest

from embedq_consumer.lifecycle import status_reporter
from embedq_shared.messages import State, Step
from tests.helpers.fake_models import MakeBench, command
from tests.helpers.support import wait_until


async def test_it_begins_as_loading_and_says_nothing_by_itself(bench: MakeBench) -> None:
    b = bench()
    status = b.model.reporter.status
    assert (status.replica, status.alias, status.step, status.state) == ("r", "a", "starting", "LOADING")
    assert b.sent == []


async def test_what_an_update_does_not_name_stays_but_for_the_error(bench: MakeBench) -> None:
    b = bench()
    reporter = b.model.reporter
    await reporter.update("check", "FAILED", command=command(3, "x"), model_version="sha256:v", error="why")
    await reporter.update("serving", "READY")
    first, second = b.sent
    assert (first.version, first.command_id, first.model_version, first.error) == (3, "c3", "sha256:v", "why")
    assert (second.version, second.command_id, second.model_version) == (3, "c3", "sha256:v")
    assert second.error is None


async def test_each_record_has_the_replica_as_its_key_and_the_time_of_sending(bench: MakeBench) -> None:
    b = bench()
    before = int(time.time() * 1000)
    await b.model.reporter.resend()
    [record], [status] = b.records, b.sent
    assert (record.key, record.topic, record.partition) == (b"r", b.topics.status, None)
    assert before <= status.at <= time.time() * 1000


async def test_a_rejection_is_sent_once_and_leaves_the_status_alone(bench: MakeBench) -> None:
    b = bench()
    reporter = b.model.reporter
    await reporter.update("serving", "READY", command=command(3, "x"), model_version="sha256:v")
    await reporter.reject(command(2, "y"), "expected a version above 3")
    await reporter.resend()
    _, rejected, again = b.sent
    assert (rejected.version, rejected.command_id, rejected.step) == (2, "c2", "validate")
    assert (rejected.state, rejected.error) == ("FAILED", "expected a version above 3")
    assert rejected.model_version == "sha256:v"
    assert (again.version, again.state, again.error) == (3, "READY", None)


async def test_each_step_is_timed_when_the_next_one_begins(bench: MakeBench) -> None:
    b = bench()
    steps: list[tuple[Step, State]] = [("load", "LOADING"), ("load", "FAILED"), ("serving", "READY")]
    for step, state in steps:
        await b.model.reporter.update(step, state)
    assert b.sample("reload_step_seconds_count", step="starting") == 1
    assert b.sample("reload_step_seconds_count", step="load") == 1  # another state is not another step
    assert b.sample("reload_step_seconds_count", step="serving") is None  # it is not over


async def test_the_status_is_sent_again_and_again(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_reporter, "STATUS_INTERVAL_S", 0.0)
    b = bench()
    task = asyncio.create_task(b.model.reporter.resend_forever())
    await wait_until(lambda: len(b.sent) >= 3, what="a third status")
    task.cancel()
