"""What a process makes of its environment, of what `serve` raises and of signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from embedq_consumer import process
from embedq_consumer.engine import DeviceLost
from embedq_consumer.engine.loading import compile_cache
from embedq_consumer.lifecycle import NoModel
from embedq_consumer.process import main
from embedq_consumer.settings import Settings, SettingsError
from tests.helpers.support import patient

Serve = Callable[[Settings, asyncio.Event, Callable[[], object]], Awaitable[None]]


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least that a replica needs. Neither the logs nor the environment of the tests change."""
    for name in [name for name in os.environ if name.startswith("EMBEDQ_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EMBEDQ_KAFKA_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("EMBEDQ_MODEL", str(tmp_path))
    monkeypatch.setattr("embedq_consumer.telemetry.logs.configure", lambda level, *, replica: None)
    monkeypatch.setattr(compile_cache, "enable", lambda directory, environ: None)


def failing(*failures: BaseException) -> Serve:
    async def serve(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for failure in failures:
                tasks.create_task(fail(failure))

    async def fail(failure: BaseException) -> None:
        raise failure

    return serve


async def until_stopped(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.wait()
    # The next one would end the process.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("name", "module"), [("asyncio", "asyncio"), ("uvloop", "uvloop")])
def test_the_event_loop_is_the_one_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    pytest.importorskip("uvloop")
    running: list[str] = []

    async def serve(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
        running.append(type(asyncio.get_running_loop()).__module__.partition(".")[0])

    monkeypatch.setattr(process, "serve", serve)
    monkeypatch.setenv("EMBEDQ_EVENT_LOOP", name)
    assert main() == 0
    assert running == [module]


def test_an_event_loop_that_is_not_installed_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setattr(process, "serve", until_stopped)
    monkeypatch.setenv("EMBEDQ_EVENT_LOOP", "uvloop")
    with capture_logs() as logs:
        assert main() == 2
    assert "EMBEDQ_EVENT_LOOP" in logs[-1]["detail"]


def test_a_wrong_setting_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDQ_HTTP_PORT", "none")
    assert main() == 2
    written = capsys.readouterr()
    assert written.err.startswith("embedq: EMBEDQ_HTTP_PORT: ")
    assert written.err.count("\n") == 1


def test_sigterm_asks_the_service_to_stop_and_a_clean_stop_is_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", until_stopped)
    monkeypatch.setenv("EMBEDQ_DRAIN_TIMEOUT_S", "20")
    monkeypatch.setenv("EMBEDQ_LEAVE_TIMEOUT_S", "3")
    limits: list[float] = []
    assert main(limits.append) == 0
    assert limits == [23.0]


def test_a_service_that_begins_to_leave_by_itself_has_no_time_to_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def leaves(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
        leaving()

    monkeypatch.setattr(process, "serve", leaves)
    monkeypatch.setenv("EMBEDQ_LEAVE_TIMEOUT_S", "3")
    limits: list[float] = []
    assert main(limits.append) == 0
    assert limits == [3.0]


def test_each_failure_that_an_operator_can_fix_is_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nested = BaseExceptionGroup("", [KafkaConnectionError("gone"), NoModel("none")])
    monkeypatch.setattr(process, "serve", failing(DeviceLost("CUDA error"), nested))
    with capture_logs() as logs:
        assert main() == 1
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("failed", "DeviceLost"),
        ("failed", "KafkaConnectionError"),
        ("failed", "NoModel"),
    ]


def test_a_setting_that_is_found_wrong_later_is_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", failing(SettingsError("EMBEDQ_MODEL: expected a directory")))
    with capture_logs() as logs:
        assert main() == 2
    assert logs[0]["detail"] == "EMBEDQ_MODEL: expected a directory"


def test_a_failure_of_the_program_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", failing(RuntimeError("This is a bug.")))
    with pytest.RaisesGroup(RuntimeError):
        main()


def test_several_devices_are_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_DEVICES", "cpu,cpu")
    devices: list[str] = []

    def supervise(settings: Settings, environ: Mapping[str, str]) -> int:
        devices.append(settings.devices)
        return 3

    monkeypatch.setattr(process, "supervise", supervise)
    assert main() == 3
    assert devices == ["cpu,cpu"]


def test_a_compile_cache_that_was_asked_for_must_be_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(directory: Path, environ: Mapping[str, str]) -> None:
        raise PermissionError

    monkeypatch.setattr(compile_cache, "enable", refuse)
    monkeypatch.setenv("EMBEDQ_COMPILE_CACHE", "/nowhere")
    assert main() == 2
    assert capsys.readouterr().err == "embedq: EMBEDQ_COMPILE_CACHE: cannot make /nowhere (PermissionError)\n"


def test_the_default_compile_cache_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path, environ: Mapping[str, str]) -> None:
        raise PermissionError

    async def serve(settings: Settings, stop: asyncio.Event, leaving: Callable[[], object]) -> None:
        assert settings.compile_cache == ""

    monkeypatch.setattr(compile_cache, "enable", refuse)
    monkeypatch.setattr(process, "serve", serve)
    assert main() == 0


@pytest.mark.parametrize("imported", ["structlog", "embedq_consumer.process"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_process_still_imports_is_a_clean_stop(
    imported: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Whenever the signal comes: Kafka is away, so that the process is not ready either when it comes late."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "embedq_consumer"],
        env=os.environ | {"EMBEDQ_HTTP_PORT": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    with process.stderr as said:
        for line in said:
            if line.rstrip().endswith(f" {imported}".encode()):
                process.send_signal(number)
                break
        for _ in said:  # a full pipe would stop it
            pass
    assert process.wait(timeout=patient(60)) == 0
