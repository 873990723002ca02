"""Several replicas under one command: what each is given, and what their ends mean."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from embedq_consumer import supervisor
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.supervisor import Child, ExitPolicy, children, supervise
from tests.helpers.support import wait_until

NEEDED = {"EMBEDQ_KAFKA_SERVERS": "localhost:9092", "EMBEDQ_MODEL": "/models/one", "EMBEDQ_REPLICA": "host"}


def given(devices: str, *, cores: int = 8, **environ: str) -> list[dict[str, str]]:
    """The environments of the replicas of one command."""
    own = NEEDED | {"EMBEDQ_DEVICES": devices} | environ
    wanted = children(Settings.from_env(own), own, devices.split(","), cores)
    assert [child.environ["EMBEDQ_DEVICE"] for child in wanted] == [child.device for child in wanted]
    assert [child.environ["EMBEDQ_REPLICA"] for child in wanted] == [child.name for child in wanted]
    return [child.environ for child in wanted]


def test_each_replica_has_a_device_a_name_and_a_health_port_of_its_own() -> None:
    replicas = given("cuda:0,cuda:1,cuda:1", EMBEDQ_HTTP_PORT="9000", EMBEDQ_GROUP="team", PATH="/bin")
    assert [replica["EMBEDQ_DEVICE"] for replica in replicas] == ["cuda:0", "cuda:1", "cuda:1"]
    assert [replica["EMBEDQ_REPLICA"] for replica in replicas] == ["host-0", "host-1", "host-2"]
    assert [replica["EMBEDQ_HTTP_PORT"] for replica in replicas] == ["9000", "9001", "9002"]
    assert all(replica["EMBEDQ_GROUP"] == "team" and replica["PATH"] == "/bin" for replica in replicas)


def test_a_replica_is_an_ordinary_one_that_starts_no_others() -> None:
    assert all(not Settings.from_env(environ).devices for environ in given("cpu,cpu"))


def test_a_port_of_any_kind_stays_one_for_each() -> None:
    assert [replica["EMBEDQ_HTTP_PORT"] for replica in given("cpu,cpu", EMBEDQ_HTTP_PORT="0")] == ["0", "0"]


def test_replicas_on_the_cpu_share_its_cores() -> None:
    assert [replica["EMBEDQ_THREADS"] for replica in given("cpu,cpu,cpu", cores=8)] == ["2", "2", "2"]
    assert [replica["EMBEDQ_THREADS"] for replica in given("cpu,cpu,cpu", cores=2)] == ["1", "1", "1"]
    assert [replica["RAYON_NUM_THREADS"] for replica in given("cpu,cpu", cores=8)] == ["4", "4"]


def test_threads_that_were_set_stay() -> None:
    replicas = given("cpu,cpu", EMBEDQ_THREADS="3", RAYON_NUM_THREADS="1")
    assert [(replica["EMBEDQ_THREADS"], replica["RAYON_NUM_THREADS"]) for replica in replicas] == [
        ("3", "1")
    ] * 2


def test_replicas_on_gpus_leave_the_threads_of_the_cpu_to_pytorch() -> None:
    assert all("EMBEDQ_THREADS" not in replica for replica in given("cuda:0,cuda:1"))


def test_a_health_port_beyond_the_last_is_refused_before_anything_starts() -> None:
    with pytest.raises(
        SettingsError, match="EMBEDQ_HTTP_PORT: expected an integer, at least 0, at most 65,535"
    ):
        given("cpu,cpu", EMBEDQ_HTTP_PORT="65535")


@pytest.mark.parametrize("devices", ["gpu", "cpu,", "cuda:x", "all,cpu", "cpu cpu", "auto"])
def test_what_does_not_name_devices_is_refused(devices: str) -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_DEVICES"):
        Settings.from_env(NEEDED | {"EMBEDQ_DEVICES": devices})


@pytest.mark.parametrize("devices", ["", "all", "cpu", "cuda", "cuda:0,cuda:0,cuda:0", "cpu,cuda:1"])
def test_devices_are_all_or_a_list(devices: str) -> None:
    assert Settings.from_env(NEEDED | {"EMBEDQ_DEVICES": devices}).devices == devices


def test_one_device_and_several_are_not_set_together() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_DEVICE: cannot be set together with EMBEDQ_DEVICES"):
        Settings.from_env(NEEDED | {"EMBEDQ_DEVICE": "cuda:1", "EMBEDQ_DEVICES": "all"})


def test_replicas_that_end_well_after_they_were_asked_to_are_a_success() -> None:
    policy = ExitPolicy()
    assert not policy.request_stop()
    policy.child_exited(0)
    policy.child_exited(0)
    assert policy.code == 0


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (1, 1), (2, 2), (-9, 1)])
def test_a_replica_that_ends_unasked_is_a_failure_and_stops_the_others(code: int, expected: int) -> None:
    policy = ExitPolicy()
    policy.child_exited(code)
    assert policy.stopping
    policy.child_exited(0)
    assert policy.code == expected


def test_a_replica_that_fails_while_it_stops_is_a_failure() -> None:
    policy = ExitPolicy()
    policy.request_stop()
    policy.child_exited(0)
    policy.child_exited(-9)
    policy.child_exited(0)
    assert policy.code == 1


def test_a_replica_that_was_asked_to_stop_before_it_could_listen_is_no_failure() -> None:
    policy = ExitPolicy()
    policy.request_stop()
    policy.child_exited(-signal.SIGTERM)
    assert policy.code == 0


def test_a_replica_that_somebody_else_terminates_is_a_failure() -> None:
    policy = ExitPolicy()
    policy.child_exited(-signal.SIGTERM)
    assert policy.code == 1


def test_only_a_second_request_does_not_wait_for_the_drain() -> None:
    policy = ExitPolicy()
    policy.child_exited(1)  # stopping already, but without a request
    assert not policy.request_stop()
    assert policy.request_stop()


async def stuck() -> Process:
    """A process that hears no SIGTERM, once it says so."""
    program = "trap '' TERM; echo deaf; exec sleep 60"
    process = await asyncio.create_subprocess_exec("sh", "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"deaf\n"
    return process


Start = Callable[[Child], Awaitable[Process]]


def supervised(monkeypatch: pytest.MonkeyPatch, start: Start, *, drain_s: float = 0.2) -> int:
    """The exit code of a command with two replicas, `host-0` and `host-1`, which `start` starts."""
    monkeypatch.setattr(supervisor, "_start", start)
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.0)
    environ = NEEDED | {
        "EMBEDQ_DEVICES": "cpu,cpu",
        "EMBEDQ_DRAIN_TIMEOUT_S": str(drain_s),
        "EMBEDQ_LEAVE_TIMEOUT_S": "0.1",
    }
    return supervise(Settings.from_env(environ), environ)


def test_a_replica_that_does_not_stop_is_killed_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Process] = []

    async def start(child: Child) -> Process:
        if child.name == "host-0":
            return await asyncio.create_subprocess_exec("true")
        started.append(await stuck())
        return started[-1]

    with capture_logs() as logs:
        assert supervised(monkeypatch, start) == 1
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert [event["event"] for event in logs].count("replicas_killed") == 1
    ends = {event["child"]: event["exit_code"] for event in logs if event["event"] == "replica_ended"}
    assert ends == {"host-0": 0, "host-1": -signal.SIGKILL}


def test_a_killed_replica_that_the_kernel_keeps_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept:
        """As a process in an uninterruptible call."""

        pid = 2**22 + 1  # above Linux's largest: nobody
        returncode = None

        async def wait(self) -> int:
            await asyncio.Event().wait()
            raise AssertionError

    async def start(child: Child) -> Any:
        return await asyncio.create_subprocess_exec("true") if child.name == "host-0" else Kept()

    monkeypatch.setattr(supervisor, "_KILLED_S", 0.05)
    with capture_logs() as logs:
        assert supervised(monkeypatch, start) == 1
    assert [event["children"] for event in logs if event["event"] == "replicas_left_behind"] == [["host-1"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_stops_every_replica_even_one_that_is_just_being_started(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    started: list[Process] = []

    async def start(child: Child) -> Process:
        if child.name == "host-1":
            await wait_until(lambda: bool(started), what="the other replica")
            os.kill(os.getpid(), number)
            await wait_until(lambda: started[0].returncode is not None, what="its end")
        started.append(await asyncio.create_subprocess_exec("sleep", "60"))
        return started[-1]

    with capture_logs() as logs:
        assert supervised(monkeypatch, start) == 0
    ends = {event["child"]: event["exit_code"] for event in logs if event["event"] == "replica_ended"}
    assert ends == {"host-0": -signal.SIGTERM, "host-1": -signal.SIGTERM}
    assert signal.getsignal(number) == before


def test_a_replica_that_drains_is_not_signaled_again_for_one_that_starts_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second SIGTERM would end it at once."""
    program = (
        "trap 'trap - TERM; echo draining; read line; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    )
    draining: list[Process] = []
    tasks: list[asyncio.Task[None]] = []

    async def release(late: Process) -> None:
        await late.wait()
        assert draining[0].stdin is not None
        draining[0].stdin.write(b"drained\n")

    async def start(child: Child) -> Process:
        if child.name == "host-0":
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec("sh", "-c", program, stdin=pipe, stdout=pipe)
            assert process.stdout is not None
            assert await process.stdout.readline() == b"up\n"
            draining.append(process)
            return process
        await wait_until(lambda: bool(draining), what="the other replica")
        os.kill(os.getpid(), signal.SIGTERM)
        assert draining[0].stdout is not None
        assert await draining[0].stdout.readline() == b"draining\n"
        late = await asyncio.create_subprocess_exec("sleep", "60")
        tasks.append(asyncio.create_task(release(late)))
        return late

    assert supervised(monkeypatch, start, drain_s=60) == 0
    assert draining[0].returncode == 0


def test_a_replica_that_cannot_be_started_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Process] = []

    async def start(child: Child) -> Process:
        if child.name == "host-1":
            await wait_until(lambda: bool(started), what="the other replica")
            raise FileNotFoundError("no interpreter")
        started.append(await asyncio.create_subprocess_exec("sleep", "60"))
        return started[-1]

    with pytest.RaisesGroup(FileNotFoundError):
        supervised(monkeypatch, start)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_all_devices_of_a_machine_without_any_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "count_gpus", lambda: 0)
    environ = NEEDED | {"EMBEDQ_DEVICES": "all"}
    with pytest.raises(SettingsError, match="EMBEDQ_DEVICES: all: this machine has no CUDA device"):
        supervise(Settings.from_env(environ), environ)
