"""The broker and the cache that a test session runs on, and a line that says which they are.

Taken in this order: EMBEDQ_KAFKA_SERVERS and EMBEDQ_REDIS_URL; the processes of `embedq dev`; containers, where
the packages of `embedq[dev]` are missing and a Docker engine runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from embedq_sdk.dev import DevStack, MissingPackagesError

used: Final[list[str]] = []
"""What the stack of this process says of itself, and what those of its workers said."""


def stack_header() -> str:
    """Say what the session's tests will run on, or did: for `pytest_report_header` and the summary."""
    if used:
        return "; ".join(used)
    named = [name for name in ("EMBEDQ_KAFKA_SERVERS", "EMBEDQ_REDIS_URL") if os.environ.get(name)]
    return (
        f"Kafka and Redis: from {' and '.join(named)}" if named else "Kafka and Redis: processes of the suite"
    )


@pytest.fixture(scope="session")
def stack() -> Iterator[DevStack]:
    """One Kafka broker and one Redis for the whole session."""
    with _stack() as running:
        used.append(f"ran on {running.kafka_description} and {running.redis_description}")
        yield running


@contextmanager
def _stack() -> Iterator[DevStack]:
    own = DevStack(report=_say)
    try:
        own.start()
    except MissingPackagesError as missing:
        with _containers(missing) as environ, DevStack(environ=environ) as named:
            yield named
        return
    try:
        yield own
    finally:
        own.close()


@contextmanager
def _containers(missing: MissingPackagesError) -> Iterator[dict[str, str]]:
    import docker
    from docker.errors import DockerException
    from testcontainers.community.kafka import KafkaContainer
    from testcontainers.community.redis import RedisContainer

    try:
        docker.from_env().close()
    except DockerException as error:
        raise RuntimeError(f"{missing}; and no Docker engine runs: {error}") from error
    with KafkaContainer().with_kraft() as kafka, RedisContainer() as redis:
        address = f"{redis.get_container_host_ip()}:{redis.get_exposed_port(redis.port)}"
        yield {
            "EMBEDQ_KAFKA_SERVERS": kafka.get_bootstrap_server(),
            "EMBEDQ_REDIS_URL": f"redis://{address}/0",
        }


def _say(line: str) -> None:
    used.append(line)
