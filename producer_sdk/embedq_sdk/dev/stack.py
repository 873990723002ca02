"""A real Kafka and a real Redis for as long as a `with` block lasts."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from embedq_sdk.dev import jars, redis_server
from embedq_sdk.dev.errors import DevStackError, PortTakenError
from embedq_sdk.dev.jars import KafkaFiles
from embedq_sdk.dev.kafka_server import KafkaServer
from embedq_sdk.dev.ports import USUAL_KAFKA, USUAL_REDIS, free_ports
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.redis_server import RedisServer

log = logging.getLogger(__name__)
logging.getLogger("embedq_sdk").addHandler(logging.NullHandler())

_PORT_ATTEMPTS: Final = 3
_STOP_GRACE_S: Final = 10.0
_STOP_TOGETHER_GRACE_S: Final = 3.0
"""The last nodes of a cluster would wait long for a quorum that is gone."""
_TRAINING_GRACE_S: Final = 30.0
"""The JVM writes the archive as it ends."""
_JAVA_OPTIONS: Final = (
    "-Xmx512m",
    # Measured on 2 cores: the serial collector and only the first compiler start fastest.
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",  # its file in /tmp would stay after a SIGKILL
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
)


class DevStack:
    """Kafka and Redis on free ports of 127.0.0.1, ready when the `with` block begins, gone when it ends.

    If EMBEDQ_KAFKA_SERVERS or EMBEDQ_REDIS_URL is set, that server is used and none is started; asking this object to
    stop or start it is an error. The servers and their files are removed with this process, however it ends. Every
    method blocks; in a coroutine, use `asyncio.to_thread`.

    Args:
        brokers: nodes of the Kafka cluster, each of them a broker and a controller.
        kafka_properties: added to every broker's configuration, e.g. {"message.max.bytes": "10485760"}.
        environ: where the EMBEDQ_* variables are looked up; None: the environment of this process.
        report: called with a line for the user when something takes long, such as the first download.
        usual_ports: take the ports that Kafka and Redis usually have, if they are free, so that they are the same after the
            next start; else any free ones, so that many stacks get along.

    Raises:
        MissingPackagesError: the extra `embedq[dev]` is not installed.
        StartError: a server did not start within 60 s.
        DevStackError: any other failure; the tree is in `dev/errors.py`.
    """

    def __init__(
        self,
        *,
        brokers: int = 1,
        kafka_properties: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        report: Callable[[str], None] = log.info,
        usual_ports: bool = False,
    ) -> None:
        self._usual_ports = usual_ports
        self._brokers = brokers
        self._kafka_properties = dict(kafka_properties or {})
        self._environ = os.environ if environ is None else environ
        self._report = report
        self._processes: Processes | None = None
        self._kafka: KafkaServer | None = None
        self._redis: RedisServer | None = None
        self._given_kafka = self._environ.get("EMBEDQ_KAFKA_SERVERS", "")
        self._given_redis = self._environ.get("EMBEDQ_REDIS_URL", "")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start each server that the environment does not name, and wait until it answers."""
        if self._given_kafka and self._given_redis:
            return
        try:
            # The download comes first: it may take long, and there is nothing to guard yet.
            files = None if self._given_kafka else jars.find_kafka(self._environ)
            if files is not None:
                jars.fetch(files, self._report)
            self._processes = Processes()
            if not self._given_redis:
                self._redis = self._started_redis(self._processes)
            if files is not None:
                if not files.startup_archive.exists():
                    self._train(self._processes, files)
                self._kafka = self._started_kafka(self._processes, files)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the servers and remove their files. Closing twice does nothing."""
        if self._processes is not None:
            self._processes.close()
            self._processes = self._kafka = self._redis = None

    @property
    def kafka_servers(self) -> str:
        """Bootstrap servers, "127.0.0.1:PORT", separated by commas."""
        return self._given_kafka or self._own_kafka().servers

    @property
    def redis_url(self) -> str:
        """Redis's address, as EMBEDQ_REDIS_URL takes it."""
        return self._given_redis or self._own_redis().url

    @property
    def kafka_description(self) -> str:
        """Which Kafka this is, for the user."""
        if self._given_kafka:
            return f"Kafka at {self._given_kafka} (EMBEDQ_KAFKA_SERVERS)"
        return self._own_kafka().description

    @property
    def redis_description(self) -> str:
        """Which Redis this is, for the user, without its password."""
        if self._given_redis:
            address = urlsplit(self._given_redis)  # it may hold a password
            return f"Redis at {address.hostname}:{address.port or 6379} (EMBEDQ_REDIS_URL)"
        return self._own_redis().description

    @property
    def directory(self) -> Path:
        """Logs and data of the servers: `redis.log`, `kafka-1.log`, …"""
        return self._own_processes().directory

    @property
    def guardian_pid(self) -> int:
        """Process id of the guardian."""
        return self._own_processes().guardian_pid

    @property
    def redis_pid(self) -> int:
        """Process id of Redis."""
        return self._own_redis().pid

    @property
    def kafka_pids(self) -> dict[int, int]:
        """Process id of each node, by node number (from 1)."""
        return dict(self._own_kafka().pids)

    def stop_redis(self, *, kill: bool = False) -> None:
        """Stop Redis, with SIGKILL if `kill`. It loses all its data."""
        self._own_redis().stop(grace_s=0 if kill else _STOP_GRACE_S)

    def start_redis(self) -> None:
        """Start Redis again on the same port, empty, and wait until it answers."""
        self._own_redis().start()

    def pause_redis(self) -> None:
        """Freeze Redis (SIGSTOP): connections stay open, and there are no answers."""
        self._own_redis().send(signal.SIGSTOP)

    def resume_redis(self) -> None:
        """Let Redis go on (SIGCONT)."""
        self._own_redis().send(signal.SIGCONT)

    def check(self) -> None:
        """Look whether the servers started here still run.

        Raises:
            DevStackError: one has ended by itself.
        """
        if self._processes is None:
            return
        names = [*(self._kafka.names if self._kafka else ()), *((redis_server.NAME,) if self._redis else ())]
        for name in names:
            code = self._processes.exit_code(name)
            if code is not None:
                raise DevStackError(f"{name} ended with exit code {code}:\n{self._processes.log_tail(name)}")

    def stop_kafka(self, node: int | None = None, *, kill: bool = False) -> None:
        """Stop one node, or all of them, with SIGKILL if `kill`. The data stays."""
        nodes = self._nodes(node)
        grace_s = _STOP_GRACE_S if len(nodes) == 1 else _STOP_TOGETHER_GRACE_S
        self._own_kafka().stop(nodes, grace_s=0 if kill else grace_s)

    def start_kafka(self, node: int | None = None) -> None:
        """Start one node, or all of them, again with the same ports and data, and wait until they answer."""
        self._own_kafka().start(self._nodes(node))

    def pause_kafka(self, node: int | None = None) -> None:
        """Freeze one node, or all of them (SIGSTOP): connections stay open, and there are no answers."""
        self._own_kafka().send(self._nodes(node), signal.SIGSTOP)

    def resume_kafka(self, node: int | None = None) -> None:
        """Let one node, or all of them, go on (SIGCONT)."""
        self._own_kafka().send(self._nodes(node), signal.SIGCONT)

    def _started_redis(self, processes: Processes) -> RedisServer:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            (port,) = free_ports(1, USUAL_REDIS if self._usual_ports and attempt == 1 else ())
            redis = RedisServer(processes, port)
            try:
                redis.start()
            except PortTakenError:
                if attempt == _PORT_ATTEMPTS:
                    raise
            else:
                break
        return redis

    def _started_kafka(self, processes: Processes, files: KafkaFiles) -> KafkaServer:
        options = list(_JAVA_OPTIONS)
        if files.startup_archive.stat().st_size:
            # If it does not fit, as with another build of Java, the JVM starts without it; it need not warn.
            options += [f"-XX:AOTCache={files.startup_archive}", "-Xlog:aot=off", "-Xlog:cds=off"]
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            usual = USUAL_KAFKA if self._usual_ports and attempt == 1 else ()
            kafka = KafkaServer(
                processes, files, self._brokers, self._kafka_properties, options, first_ports=usual
            )
            try:
                kafka.start(kafka.nodes)
                kafka.open_groups()
            except PortTakenError:
                kafka.stop(kafka.nodes, grace_s=0)
                if attempt == _PORT_ATTEMPTS:
                    raise
            else:
                break
        return kafka

    def _train(self, processes: Processes, files: KafkaFiles) -> None:
        """Start a broker once and have the JVM save what it loaded and linked, for all later starts."""
        with jars.locked(files):
            if files.startup_archive.exists():  # another process was faster
                return
            self._report("preparing fast starts, only this once ...")
            started = time.monotonic()
            written = processes.directory / "startup.aot"
            kafka = KafkaServer(processes, files, 1, {}, [*_JAVA_OPTIONS, f"-XX:AOTCacheOutput={written}"])
            kafka.start(kafka.nodes)
            kafka.stop(kafka.nodes, grace_s=_TRAINING_GRACE_S)
            jars.keep_archive(files, written)
            log.debug("startup archive made in %.1f s", time.monotonic() - started)

    def _nodes(self, node: int | None) -> list[int]:
        return self._own_kafka().nodes if node is None else [node]

    def _own_processes(self) -> Processes:
        if self._processes is None:
            raise DevStackError("the local stack is not running")
        return self._processes

    def _own_kafka(self) -> KafkaServer:
        if self._kafka is None:
            raise DevStackError(_not_ours("Kafka", "EMBEDQ_KAFKA_SERVERS", self._given_kafka))
        return self._kafka

    def _own_redis(self) -> RedisServer:
        if self._redis is None:
            raise DevStackError(_not_ours("Redis", "EMBEDQ_REDIS_URL", self._given_redis))
        return self._redis


def _not_ours(what: str, variable: str, given: str) -> str:
    if given:
        return f"this {what} is the one that {variable} names: it was not started here, so it cannot be stopped or started here"
    return "the local stack is not running"
