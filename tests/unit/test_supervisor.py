"""Several replicas under one command: what each is given, and what their ends mean."""

from __future__ import annotations

import signal
import subprocess

import pytest
from structlog.testing import capture_logs

from embedq_consumer import supervisor
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.supervisor import Child, ExitPolicy, children, supervise

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


def test_a_health_port_beyond_the_last_is_told_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_HTTP_PORT: expected `int` <= 65535"):
        given("cpu,cpu", EMBEDQ_HTTP_PORT="65535")


@pytest.mark.parametrize("devices", ["gpu", "cpu,", "cuda:x", "all,cpu", "cpu cpu", "auto"])
def test_devices_that_are_none_are_refused(devices: str) -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_DEVICES"):
        Settings.from_env(NEEDED | {"EMBEDQ_DEVICES": devices})


@pytest.mark.parametrize("devices", ["", "all", "cpu", "cuda", "cuda:0,cuda:0,cuda:0", "cpu,cuda:1"])
def test_devices_are_all_or_a_list(devices: str) -> None:
    assert Settings.from_env(NEEDED | {"EMBEDQ_DEVICES": devices}).devices == devices


def test_one_device_and_several_are_not_set_together() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_DEVICE: cannot be set together with EMBEDQ_DEVICES"):
        Settings.from_env(NEEDED | {"EMBEDQ_DEVICE": "cuda:1", "EMBEDQ_DEVICES": "all"})


def test_replicas_that_end_well_after_they_were_told_to_are_a_success() -> None:
    verdict = ExitPolicy()
    assert not verdict.told()
    verdict.ended(0)
    verdict.ended(0)
    assert verdict.code == 0


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (1, 1), (2, 2), (-9, 1)])
def test_a_replica_that_ends_unasked_is_a_failure_and_stops_the_others(code: int, expected: int) -> None:
    verdict = ExitPolicy()
    verdict.ended(code)
    assert verdict.stopping
    verdict.ended(0)
    assert verdict.code == expected


def test_a_replica_that_fails_while_it_stops_is_a_failure() -> None:
    verdict = ExitPolicy()
    verdict.told()
    verdict.ended(0)
    verdict.ended(-9)
    verdict.ended(0)
    assert verdict.code == 1


def test_a_replica_that_was_told_to_stop_before_it_could_listen_is_no_failure() -> None:
    verdict = ExitPolicy()
    verdict.told()
    verdict.ended(-signal.SIGTERM)
    assert verdict.code == 0


def test_a_replica_that_somebody_else_terminates_is_a_failure() -> None:
    verdict = ExitPolicy()
    verdict.ended(-signal.SIGTERM)
    assert verdict.code == 1


def test_only_who_tells_it_twice_does_not_want_to_wait() -> None:
    verdict = ExitPolicy()
    verdict.ended(1)  # stopping already, but nobody has told it
    assert not verdict.told()
    assert verdict.told()


class Stuck(subprocess.Popen[bytes]):
    """A process that hears no SIGTERM, and of whose end nobody knows before it was waited for."""

    def __init__(self) -> None:
        super().__init__(["sleep", "60"], preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))

    def poll(self) -> int | None:
        return self.returncode


def test_a_replica_that_does_not_stop_is_killed_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(child: Child) -> subprocess.Popen[bytes]:
        # Not before: an end that nobody listens to yet would be missed.
        started.append(Stuck() if started else subprocess.Popen(["true"]))
        return started[-1]

    monkeypatch.setattr(supervisor, "_start", start)
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.0)
    environ = NEEDED | {"EMBEDQ_DEVICES": "cpu,cpu", "EMBEDQ_DRAIN_TIMEOUT_S": "0.2"}
    with capture_logs() as logs:
        assert supervise(Settings.from_env(environ), environ) == 1
    assert started[1].returncode == -signal.SIGKILL
    assert [event["event"] for event in logs].count("replicas_killed") == 1
