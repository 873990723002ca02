"""Programs that use the local stack and are then killed, and what remains of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from embedq_sdk.dev.jars import DEFAULT_VERSION

OWNER = """
import json, os, signal, sys, time
from embedq_sdk.dev import DevStack
# A test run under nohup, as CI may be, hands its deafness to SIGHUP down to its children.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with DevStack() as stack:
    {then}
    facts = dict(
        pids=[stack.redis_pid, *({{}} if "EMBEDQ_KAFKA_SERVERS" in os.environ else stack.kafka_pids).values()],
        guardian=stack.guardian_pid,
        directory=str(stack.directory),
        kafka=stack.kafka_description,
        redis=stack.redis_description,
    )
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
"""


@dataclass
class Owner:
    """A running program that owns a stack."""

    process: subprocess.Popen[str]
    pids: list[int]
    guardian: int
    directory: Path
    kafka: str
    redis: str

    def gone(self) -> bool:
        """Whether neither a server, nor the guardian, nor a file is left."""
        return self.servers_gone() and not alive(self.guardian) and not self.directory.exists()

    def servers_gone(self) -> bool:
        return not any(map(alive, self.pids))


@contextlib.contextmanager
def owner(then: str = "pass", environ: dict[str, str] | None = None) -> Iterator[Owner]:
    """Start a program that owns a stack, runs `then`, and waits for its stdin to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(then=then)],
        env=own_environ() if environ is None else environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        directory = Path(facts.pop("directory"))
        try:
            yield Owner(process, directory=directory, **facts)
        finally:
            process.kill()


def kafka_version() -> str:
    """Of the brokers that the suite starts: the matrix names another one."""
    return os.environ.get("EMBEDQ_KAFKA_VERSION", DEFAULT_VERSION)


def own_environ() -> dict[str, str]:
    """This process's environment without the addresses that would keep the stack from starting anything."""
    named = {"EMBEDQ_KAFKA_SERVERS", "EMBEDQ_REDIS_URL"}
    return {name: value for name, value in os.environ.items() if name not in named}


def without_kafka() -> dict[str, str]:
    """The same with a Kafka that is said to be elsewhere: then Redis is the one server that a stack starts, in a tenth of the time."""
    return own_environ() | {"EMBEDQ_KAFKA_SERVERS": "kafka.example:9092"}


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie: one whose parent was killed waits for init to reap it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
