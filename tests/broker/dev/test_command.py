"""`embedq dev` as its user meets it: in a terminal, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from embedq_sdk.dev.ports import USUAL_GATEWAY, USUAL_KAFKA, USUAL_REDIS, is_free
from tests.helpers.programs import alive, kafka_version, own_environ
from tests.helpers.support import patient, wait_for
from tests.helpers.tiny_models import make_tiny_bert

pytestmark = pytest.mark.kafka

IN_A_TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A program with a terminal of its own, what it showed, and the keys pressed."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        program = f"import sys; from embedq_sdk.dev.command import run; sys.exit(run({', '.join(arguments)}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, "-c", program],
            env=own_environ(),
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self._shown = b""

    def shown(self) -> str:
        while select.select([self._master], [], [], 0)[0]:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # how Linux says that the program closed its side
                break
            if not data:
                break
            self._shown += data
        return self._shown.decode().replace("\r\n", "\n")

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def exported(self, name: str) -> str:
        (value,) = re.findall(rf"^  export {name}=(\S+)$", self.shown(), re.MULTILINE)
        return str(value)

    def descendants(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


async def topics_of(servers: str) -> set[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        return set(await admin.list_topics())
    finally:
        await admin.close()


def end_of(screen: Terminal, within: float = 60.0) -> int:
    def ended() -> bool:
        screen.shown()  # a terminal that nobody reads from is full in the end, and who writes to it waits
        return screen.process.poll() is not None

    wait_for(ended, within=within, what="the program's end")
    return int(screen.process.returncode)


def started(screen: Terminal) -> None:
    wait_for(
        lambda: "Press Ctrl-C" in screen.shown() or screen.process.poll() is not None,
        within=90,
        what="the start",
    )
    assert screen.process.poll() is None, screen.shown()


def is_usual(address: str, ports: Sequence[int]) -> bool:
    """Whether the next start will have this address, too: a usual port, or none of those was free."""
    found = re.search(r":(\d+)(?:/|$)", address)
    assert found is not None, address
    return int(found[1]) in ports or not any(map(is_free, ports))


def test_the_lines_to_copy_lead_to_embedqs_topics_and_ctrl_c_ends_everything_quietly_with_exit_code_0() -> (
    None
):
    with terminal() as screen:
        started(screen)
        assert f"Apache Kafka {kafka_version()} (embedded process)\n" in screen.shown()
        assert screen.exported("EMBEDQ_REDIS_URL").startswith("redis://127.0.0.1:")
        for name, ports in (
            ("EMBEDQ_KAFKA_SERVERS", USUAL_KAFKA),
            ("EMBEDQ_REDIS_URL", USUAL_REDIS),
            ("OPENAI_BASE_URL", USUAL_GATEWAY),
        ):
            assert is_usual(screen.exported(name), ports), name
        topics = asyncio.run(topics_of(screen.exported("EMBEDQ_KAFKA_SERVERS")))
        assert {"embed.jobs", "embed.jobs.bulk", "embed.replies", "embed.control"} <= topics
        children = screen.descendants()
        assert len(children) >= 4  # two guardians, Redis, Kafka
        screen.press_ctrl_c()
        assert end_of(screen) == 0
        assert not any(map(alive, children))
        assert screen.shown().endswith("Press Ctrl-C to stop.\n^CStopped.\n")


def test_sigterm_ends_it_with_exit_code_0() -> None:
    with terminal("None", "False") as screen:
        started(screen)
        children = screen.descendants()
        screen.process.send_signal(signal.SIGTERM)
        assert end_of(screen) == 0
        assert not any(map(alive, children))
        assert "Traceback" not in screen.shown()


def test_ctrl_c_during_the_start_ends_it_too() -> None:
    with terminal("None", "False") as screen:
        # Its child's child is Redis: the start has begun and Kafka is not there yet.
        wait_for(lambda: len(screen.descendants()) >= 2, within=60)
        children = screen.descendants()
        screen.press_ctrl_c()
        assert end_of(screen) == 0
        wait_for(lambda: not any(map(alive, children)))
        assert "Traceback" not in screen.shown()
        assert "Press Ctrl-C" not in screen.shown()


def test_the_gateways_address_answers_openais_clients(tmp_path: Path) -> None:
    model = make_tiny_bert(tmp_path / "model")
    with terminal(repr(str(model)), "True", "http_port=0") as screen:
        started(screen)
        url = screen.exported("OPENAI_BASE_URL")
        assert re.search(
            rf"^A gateway answers at {re.escape(url.removesuffix('/v1'))};", screen.shown(), re.MULTILINE
        )

        with httpx.Client(base_url=url, verify=False) as http:

            def answers() -> bool:
                screen.shown()
                with contextlib.suppress(httpx.TransportError):
                    return http.post("/embeddings", json={"input": "a"}, timeout=5).status_code == 200
                return False

            wait_for(answers, within=120, what="a vector over HTTP")
            upload = http.post("/files", data={"purpose": "batch"}, files={"file": b"{}"}, timeout=patient(5))
        assert upload.status_code == 200
        screen.press_ctrl_c()
        assert end_of(screen) == 0


def test_a_gateway_that_fails_is_told_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_GATEWAY_FILES", "ftp://nowhere")
    with terminal() as screen:
        assert end_of(screen) == 1
        assert "the gateway ended with exit code" in screen.shown()
        assert "EMBEDQ_GATEWAY_FILES: expected a directory, or s3://BUCKET" in screen.shown()


def test_a_server_that_dies_ends_the_command_with_exit_code_1() -> None:
    with terminal("None", "False") as screen:
        started(screen)
        for pid in screen.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "redis-server" in psutil.Process(pid).name():
                    os.kill(pid, signal.SIGKILL)
        assert end_of(screen) == 1
        assert "redis ended with exit code -9" in screen.shown()
        assert "Traceback" not in screen.shown()


def test_a_broker_that_dies_is_told_at_once_and_not_after_the_drain_of_a_replica(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_tiny_bert(model)
    with terminal(repr(str(model)), "True", "http_port=0") as screen:
        started(screen)
        wait_for(lambda: '"event": "ready"' in screen.shown(), within=120, what="a ready replica")
        [broker] = [pid for pid in screen.descendants() if "java" in psutil.Process(pid).name()]
        killed = time.monotonic()
        os.kill(broker, signal.SIGKILL)
        wait_for(lambda: "kafka-1 ended with exit code -9" in screen.shown(), within=10, what="the line")
        assert end_of(screen, within=30) == 1
        # The drain's own limits are 30 s and 15 s more.
        assert time.monotonic() - killed < patient(25)


def test_a_model_that_is_no_directory_is_told_before_anything_starts(tmp_path: Path) -> None:
    with terminal(repr(str(tmp_path / "none")), "False") as screen:
        assert end_of(screen) == 1
        assert screen.shown() == f"{tmp_path / 'none'} is not a directory\n"


def test_a_consumer_that_fails_is_told_with_its_own_words(tmp_path: Path) -> None:
    """An empty directory is no model: the consumer says so, and the command ends."""
    with terminal(repr(str(tmp_path)), "True", "http_port=0") as screen:
        assert end_of(screen, within=100) == 1
        assert "the replica ended with exit code" in screen.shown()
        assert str(tmp_path) in screen.shown()
