"""The service's life with everything outside of it replaced: starts in order, drains, and says how it is meanwhile."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from embedq_consumer import opening, service
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.engine import Encoder
from embedq_consumer.opening import MissingTopics
from embedq_consumer.rollout.status_topic import Said
from embedq_consumer.service import serve
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.telemetry.health import Health
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import decode_status
from embedq_shared.kafka import BrokerUnreachable, KafkaConnectionError, KafkaRefused, reason
from embedq_shared.messages import Control, Rollout, Status
from tests.helpers.fake_models import INSPECTION, FakeModel, command
from tests.helpers.metric_values import sample_value
from tests.helpers.support import wait_until


class World:
    """What the service meets: which topics and commands there are, what fails; and what it did, in order."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.statuses: list[tuple[str, str]] = []
        self.partitions: dict[str, int] = {}
        self.desired: Control | None = None
        self.said: list[Said] = []
        self.drains = True
        self.away: type[Exception] | None = None
        self.failure: Exception | None = None
        self.joined = asyncio.Event()
        self.fail = asyncio.Event()
        self.load: Callable[[Path], Encoder] = lambda path: FakeModel()
        self.metrics: Metrics | None = None
        self.health: Health | None = None

    def value(self, name: str) -> float | None:
        """A metric of the service."""
        assert self.metrics is not None
        registry: CollectorRegistry = self.metrics.registry
        return sample_value(registry, f"embedq_{name}")

    def readiness(self) -> object:
        """What `/readyz` says."""
        assert self.health is not None
        return self.health.ready(0.0).facts


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Fakes in place of Kafka's clients and the engine; cache, pipeline and health pages are the real ones."""
    world = World()
    # A test ends once the thread of its pages has.
    monkeypatch.setattr("embedq_consumer.telemetry.health._POLL_S", 0.01)

    class FakeTopics:
        def partitions(self, topic: str) -> int | None:
            return world.partitions.get(topic, 1) or None

    class FakePublisher:
        topics = FakeTopics()

        def __init__(self, *_: Any, **__: Any) -> None: ...

        async def open(self) -> None:
            if world.away is not None:
                world.did.append("nobody there")
                raise world.away("no answer")
            world.did.append("publisher open")

        async def announce(self, records: Sequence[Outgoing], *, within: float) -> None:
            for record in records:
                status = decode_status(record.value or b"")
                world.statuses.append((status.step, status.state))

        async def watch(self) -> None:
            await asyncio.Event().wait()

        async def close(self) -> None:
            world.did.append("publisher closed")

    class FakeControl:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        async def open(self) -> Control | None:
            world.did.append("commands read")
            return world.desired

        async def next(self) -> list[Control]:
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None:
            world.did.append("control closed")

    class FakeStatusTopic:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        async def open(self) -> list[Said]:
            world.did.append("statuses read")
            return world.said

        async def next(self) -> list[Said]:
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None: ...

    class FakeIntake:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.joined = world.joined
            self.commits = None

        async def open(self) -> None:
            world.did.append("group joined")

        async def run(self, *_: Any) -> None:
            await world.fail.wait()
            assert world.failure is not None
            raise world.failure

        async def commit_forever(self) -> None:
            await asyncio.Event().wait()

        async def watch(self, *_: Any) -> None:
            await asyncio.Event().wait()

        async def stop(self, within: float) -> bool:
            world.did.append(f"drained within {within:g} s" if world.drains else "not drained")
            return world.drains

        @asynccontextmanager
        async def held(self, within: float) -> AsyncIterator[None]:
            yield

        def finish(self, record: object) -> None: ...

        def weigh(self, record: object, cost: object) -> None: ...

        def set_aside(self, records: object, *, waits: bool) -> None: ...

        class deletions:
            @staticmethod
            async def run() -> None: ...

        def when_first(self, record: object, go: Callable[[bool], None]) -> None:
            go(True)

        def holds_back(self, record: object) -> bool:
            return False

        async def running(self) -> None: ...

        def start_more(self) -> None: ...

        waits = False

        async def close(self) -> None:
            world.did.append("group left")

    def load(path: Path, *_: Any, **__: Any) -> Encoder:
        world.did.append(f"loaded {path.name}")
        return world.load(path)

    def metrics() -> Metrics:
        world.metrics = Metrics()
        return world.metrics

    def health() -> Health:
        world.health = Health()
        return world.health

    parts = {
        "Publisher": FakePublisher,
        "ControlTopic": FakeControl,
        "StatusTopic": FakeStatusTopic,
        "Intake": FakeIntake,
        "make_jobs_clients": lambda *_: None,
        "load_encoder": load,
        "inspect_model": lambda *_: INSPECTION,
    }
    own = {
        "Metrics": metrics,
        "Health": health,
        "_HEARTBEAT_S": 0.0,
        # Here it would look through what all tests have imported, each time.
        "gc": SimpleNamespace(
            collect=int,
            freeze=int,
            unfreeze=int,
            get_threshold=gc.get_threshold,
            set_threshold=lambda *_: None,
        ),
    }
    for room, fakes in ((opening, parts), (service, own)):
        for name, fake in fakes.items():
            monkeypatch.setattr(room, name, fake)
    return world


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    return Settings(
        kafka_servers="kafka:9092",
        model=str(tmp_path / "old"),
        device="cpu",
        http_host="127.0.0.1",
        http_port=0,
        drain_timeout_s=9,
    )


async def serve_and_stop(world: World, settings: Settings) -> None:
    """Start, join the group, and be stopped."""
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    await wait_until(lambda: "group joined" in world.did, what="the group")
    stop.set()
    await running


async def test_it_loads_before_it_joins_and_leaves_in_reverse(world: World, settings: Settings) -> None:
    await serve_and_stop(world, settings)
    assert world.did == [
        "publisher open",
        "commands read",
        "statuses read",
        "loaded old",
        "group joined",
        "drained within 9 s",
        "group left",
        "control closed",
        "publisher closed",
    ]
    assert world.statuses[0] == ("load", "LOADING")
    assert world.statuses[-2:] == [("serving", "READY"), ("stopped", "STOPPED")]


async def test_the_desired_model_is_there_before_the_first_job(world: World, settings: Settings) -> None:
    world.desired = command(1, "new")
    await serve_and_stop(world, settings)
    assert "loaded new" in world.did
    assert "loaded old" not in world.did


async def test_every_alias_has_its_model_before_the_first_job_and_says_goodbye(
    world: World, settings: Settings, tmp_path: Path
) -> None:
    more = msgspec.structs.replace(settings, aliases=f"second={tmp_path / 'new'},third")
    await serve_and_stop(world, more)
    read = ["commands read", "statuses read"]
    assert world.did[:10] == [
        "publisher open",
        *read,
        "loaded old",
        *read,
        "loaded new",
        *read,  # the third begins with the first one's model, which is there
        "group joined",
    ]
    assert world.did[-4:] == ["control closed"] * 3 + ["publisher closed"]
    assert world.statuses[-3:] == [("stopped", "STOPPED")] * 3


async def test_an_alias_that_begins_with_no_directory_is_named(
    world: World, settings: Settings, tmp_path: Path
) -> None:
    wrong = msgspec.structs.replace(settings, aliases=f"second={tmp_path / 'nowhere'}")
    with pytest.raises(SettingsError, match=r"^EMBEDQ_ALIASES: expected a directory, .*nowhere is not one$"):
        await serve(wrong, asyncio.Event())


async def test_in_the_middle_of_a_rollout_it_begins_with_what_the_others_serve(
    world: World, settings: Settings
) -> None:
    world.desired = command(2, "new", fallback="old", rollout=Rollout(max_unavailable=1))
    world.desired = msgspec.structs.replace(world.desired, alias="default")
    other = Status(
        replica="another",
        alias="default",
        version=1,
        step="serving",
        state="READY",
        model_version="sha256:old",
        error=None,
        at=int(time.time() * 1000),
        serving=True,
    )
    world.said = [Said("another", other)]
    await serve_and_stop(world, settings)
    assert [did for did in world.did if did.startswith("loaded")] == ["loaded old"]


@pytest.mark.parametrize("away", [BrokerUnreachable, KafkaConnectionError, TimeoutError])
async def test_while_kafka_is_away_at_the_start_it_asks_again_is_not_ready_and_says_why(
    world: World, settings: Settings, away: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_LONGEST_PAUSE_S", 0.0)
    world.away = away
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    await wait_until(lambda: world.did.count("nobody there") >= 3 or running.done(), what="three tries")
    assert not running.done(), running.exception()
    told = f"waiting for Kafka: {reason(away('no answer'))}"
    assert world.readiness() == {"status": "not ready", "reason": told}
    world.away = None
    await wait_until(lambda: "group joined" in world.did, what="the group")
    world.joined.set()
    await wait_until(lambda: world.value("ready") == 1.0, what="readiness")
    stop.set()
    await running


async def test_a_stop_while_kafka_is_away_at_the_start_is_a_clean_stop(
    world: World, settings: Settings
) -> None:
    world.away = BrokerUnreachable
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    await wait_until(lambda: "nobody there" in world.did, what="the first try")
    stop.set()
    await running
    assert set(world.did) == {"nobody there", "publisher closed"}


async def test_a_broker_that_refuses_at_the_start_ends_it_at_once(world: World, settings: Settings) -> None:
    """It is there: asking again would not help."""
    world.away = KafkaRefused
    with pytest.raises(KafkaRefused):
        await serve(settings, asyncio.Event())
    assert world.did == ["nobody there", "publisher closed"]


async def test_it_is_ready_once_the_group_has_given_it_partitions(world: World, settings: Settings) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(serve(msgspec.structs.replace(settings, threads=8), stop))
    await wait_until(lambda: "group joined" in world.did)
    assert world.readiness() == {"status": "not ready", "reason": "loading the model"}
    world.joined.set()
    await wait_until(lambda: world.value("ready") == 1.0, what="readiness")
    assert world.readiness() == {"status": "ok", "max_batch_tokens": 2048, "max_text_tokens": 64}
    assert (world.value("loop_heartbeat_age_seconds") or 0.0) < 60
    stop.set()
    await running
    assert world.readiness() == {"status": "not ready", "reason": "draining"}


async def test_a_drain_that_takes_too_long_ends_it_without_a_failure(
    world: World, settings: Settings
) -> None:
    world.drains = False
    await serve_and_stop(world, settings)
    assert world.did[-4:] == ["not drained", "group left", "control closed", "publisher closed"]
    assert world.statuses[-1] == ("stopped", "STOPPED")


async def test_a_stop_while_the_model_loads_joins_no_group(world: World, settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def load(path: Path) -> Encoder:
        loop.call_soon_threadsafe(stop.set)
        return FakeModel()

    world.load = load
    await serve(settings, stop)
    assert "group joined" not in world.did
    assert world.did[-2:] == ["control closed", "publisher closed"]


async def test_a_loop_that_fails_ends_the_others_and_the_service(world: World, settings: Settings) -> None:
    world.failure = OSError("the disk is gone")
    world.fail.set()
    with pytest.raises(ExceptionGroup) as caught:
        await serve(settings, asyncio.Event())
    assert caught.group_contains(OSError, match="the disk is gone")
    assert world.did[-3:] == ["group left", "control closed", "publisher closed"]


async def test_topics_that_are_missing_are_named(world: World, settings: Settings) -> None:
    world.partitions = {"embed.status": 0, "embed.jobs": 0}
    with pytest.raises(
        MissingTopics,
        match=r"^no topic .*embed\.status.* on the broker, or none that this user may see; `embedq topics create` makes them$",
    ):
        await serve(settings, asyncio.Event())
    assert world.did == ["publisher open", "publisher closed"]


async def test_what_lives_long_is_kept_from_the_collector_and_given_back(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "gc", gc)
    gc.unfreeze()
    before = gc.get_threshold()
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    await wait_until(lambda: "group joined" in world.did)
    assert gc.get_freeze_count() > 0
    assert gc.get_threshold()[0] == 20_000
    stop.set()
    await running
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)
    gc.freeze()  # as it was


async def test_told_to_stop_while_a_load_hangs_it_leaves_without_it(world: World, settings: Settings) -> None:
    gate = threading.Event()

    def hangs(path: Path) -> Encoder:
        assert gate.wait(60)
        return FakeModel()

    world.load = hangs
    stop, left = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(serve(settings, stop, left.set))
    try:
        await wait_until(lambda: any(did.startswith("loaded") for did in world.did), what="a load")
        stop.set()
        await running
    finally:
        gate.set()
    assert left.is_set()
    assert "group joined" not in world.did
    assert world.did[-1] == "publisher closed"


@pytest.mark.parametrize("loop", ["compute", "tokenize"])
async def test_native_code_that_does_not_come_back_ends_the_service(loop: str) -> None:
    class Stuck:
        busy_since = {"compute": None, "tokenize": None} | {loop: 10.0}

    health, now = Health(), [10.0]
    for name in ("compute", "tokenize"):
        health.register(name, 5.0, 10.0)
    beating = asyncio.create_task(service._beat_forever(health, Stuck(), Metrics(), lambda: now[0]))
    await asyncio.sleep(0)
    assert not beating.done()
    beating.cancel()
    now[0] = 15.1
    with pytest.raises(service.Stalled, match=f"{loop}: stuck for longer than EMBEDQ_STALL_TIMEOUT_S"):
        await service._beat_forever(health, Stuck(), Metrics(), lambda: now[0])


async def test_it_says_that_it_leaves_when_a_loop_fails_and_not_when_one_has_done_its_work(
    world: World, settings: Settings
) -> None:
    left = asyncio.Event()
    running = asyncio.create_task(serve(settings, asyncio.Event(), left.set))
    world.joined.set()
    await wait_until(
        lambda: world.metrics is not None and world.value("ready") == 1.0, what="a ready service"
    )
    assert not left.is_set()
    world.failure = RuntimeError("broken")
    world.fail.set()
    with pytest.raises(BaseExceptionGroup):
        await running
    assert left.is_set()
