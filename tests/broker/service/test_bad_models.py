"""Model directories that used to stop the service: each is refused with a reason, and others' jobs are answered meanwhile."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from embedq_sdk.dev import DevStack
from tests.broker.service.test_reload import command, outcomes
from tests.helpers.bad_models import HARMS, copied, panicking_tokenizer, pipe
from tests.helpers.delivery import until_it_logged
from tests.helpers.neighbors import assert_served, neighbors
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(400)]

BAD_LOADS: Final[dict[str, Any]] = {"python": ["-m", "tests.helpers.bad_loads"], "redis": False}
"""A service whose loads hang or crash where a directory says so."""


def marked(models: Path, to: Path, mark: str) -> Path:
    """A directory whose load does what the mark says."""
    (copied(models / "a", to) / mark).touch()
    return to


def begun(model: Path) -> int:
    """How many loads of this directory have begun to hang."""
    file = model.with_suffix(".begun")
    return file.stat().st_size if file.exists() else 0


async def test_every_directory_that_would_harm_is_refused_with_its_reason_while_jobs_are_answered(
    stack: DevStack, models: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    root = tmp_path / "models"
    copied(models / "a", root / "a")
    for name, harm in HARMS.items():
        harm.do(copied(models / "a", root / name))
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, root / "a", tmp_path / "log")
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.status) as status,
        neighbors(stack, topics) as others,
    ):
        since = time.monotonic()
        for version, (name, harm) in enumerate(HARMS.items(), 1):
            sent = await command(client, topics, version, name)
            [outcome] = await outcomes(status, sent, 1)
            assert outcome["state"] == "FAILED", name
            assert harm.told in outcome["error"], (name, outcome["error"])
            await others.progress(10)
        assert replica.returncode is None
    assert_served(others, since, record_property)
    assert others.repeats == 0


@pytest.mark.parametrize("name", ["panic", "pipe-as-weights", "endless-link"])
async def test_a_replica_that_starts_with_such_a_directory_desired_serves_the_fallback_and_ends_when_told(
    stack: DevStack, models: Path, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "models"
    for good in ("a", "b"):
        copied(models / good, root / good)
    HARMS[name].do(copied(models / "a", root / name))
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, root / "a", tmp_path / "log")
    async with producer(stack) as client, reader(stack, topics.status) as status:
        sent = await command(client, topics, 1, name, fallback="b")
        async with replicas(replica):
            [outcome] = await outcomes(status, sent, 1)
            assert outcome["state"] == "FAILED"
            assert HARMS[name].told in outcome["error"]
            [loaded] = [event for event in replica.events() if event["event"] == "model_loaded"]
            assert loaded["model_version"] == outcome["model_version"]
            assert await replica.stop() == 0


async def test_a_configured_directory_that_would_harm_ends_the_start_with_one_line(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    for number, harm in enumerate((pipe("config.json"), panicking_tokenizer)):
        model = copied(models / "a", tmp_path / f"{number}")
        harm(model)
        replica = Replica(stack, topics, model, tmp_path / f"log-{number}")
        await replica.start(ready=False)
        assert await replica.ended() == 1
        [failure] = [event for event in replica.events() if event["event"] == "failed"]
        assert failure["reason"] == "ModelError"
        assert str(model) in failure["detail"]


async def test_a_load_that_hangs_is_given_up_the_old_model_serves_and_sigterm_ends_the_process(
    stack: DevStack, models: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    root = tmp_path / "models"
    copied(models / "a", root / "a")
    marked(models, root / "stuck", "hangs")
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(
        stack,
        topics,
        root / "a",
        tmp_path / "log",
        load_timeout_s=patient(20),
        drain_timeout_s=5,
        **BAD_LOADS,
    )

    def second_load() -> bool:
        refused = [event["reason"] for event in replica.events() if event["event"] == "reload_failed"]
        assert len(refused) == 1, refused
        return begun(root / "stuck") == 2

    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.status) as status,
    ):
        async with neighbors(stack, topics, rate=20) as others:
            since = time.monotonic()
            sent = await command(client, topics, 1, "stuck")
            await until_it_logged(replica, "load_left_behind")
            [outcome] = await outcomes(status, sent, 1)
            assert outcome["state"] == "FAILED"
            assert "load: it did not end within" in outcome["error"]
            await command(client, topics, 2, "stuck")
            await wait_until(second_load, what="a second load")
            await others.progress(20)
        replica.kill(signal.SIGTERM)
        assert await replica.ended(within=5 + 15) == 0
        [left] = [event for event in replica.events() if event["event"] == "threads_left_behind"]
        assert left["threads"] == ["load_0", "load_0"]
    assert_served(others, since, record_property)
    assert others.repeats == 0


async def test_told_to_stop_while_its_first_load_hangs_it_leaves(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    model = marked(models, tmp_path / "stuck", "hangs")
    replica = Replica(stack, topics, model, tmp_path / "log", drain_timeout_s=1, **BAD_LOADS)
    await replica.start(ready=False)
    try:
        await wait_until(lambda: begun(model) == 1, what="a load")
        assert await replica.stop(within=1 + 15) == 0
    finally:
        if replica.returncode is None:
            replica.kill()


@pytest.mark.parametrize(("mark", "code"), [("crashes", -signal.SIGABRT), ("breaks", 1)])
async def test_a_model_that_ends_its_process_is_not_tried_a_third_time(
    stack: DevStack, models: Path, tmp_path: Path, mark: str, code: int
) -> None:
    root = tmp_path / "models"
    for good in ("a", "b"):
        copied(models / good, root / good)
    marked(models, root / "deadly", mark)
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(
        stack, topics, root / "a", tmp_path / "log", compile_cache=tmp_path / "cache", **BAD_LOADS
    )
    async with producer(stack) as client, reader(stack, topics.status) as status:
        async with replicas(replica):
            sent = await command(client, topics, 1, "deadly", fallback="b")
            assert await replica.ended() == code
        await replica.start(ready=False)
        assert await replica.ended() == code
        async with replicas(replica):
            [outcome] = await outcomes(status, sent, 1)
            assert outcome["state"] == "FAILED"
            assert "it ended the process that loaded it 2 times" in outcome["error"]
            assert await replica.get("/readyz") == 200
