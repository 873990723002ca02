"""A real Apache Kafka: the nodes of one KRaft cluster, each of them a broker and a controller."""

from __future__ import annotations

import base64
import shutil
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedq_sdk.dev.jars import KafkaFiles
from embedq_sdk.dev.kafka_probe import cluster_nodes, group_coordinator
from embedq_sdk.dev.ports import HOST, free_ports
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.starting import START_DEADLINE_S, wait_until_ready


def random_id() -> str:
    """A random UUID as Kafka writes it: URL-safe base64 without padding."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):  # it would look like an option, so Kafka's own tools avoid it too
            return text


class KafkaServer:
    """The nodes of one cluster, numbered from 1. Ports and data stay the same when a node is stopped and started."""

    def __init__(
        self,
        processes: Processes,
        files: KafkaFiles,
        brokers: int,
        properties: Mapping[str, str],
        java_options: Sequence[str],
        first_ports: Sequence[int] = (),
    ) -> None:
        """Clients' ports are those of `first_ports`, as far as they are free."""
        self._processes = processes
        self._files = files
        self._java_options = java_options
        self._cluster = random_id()
        ports = free_ports(brokers, first_ports)
        ports += [port for port in free_ports(3 * brokers) if port not in ports][:brokers]
        self._ports = dict(enumerate(ports[:brokers], start=1))
        self._controllers = dict(enumerate(ports[brokers:], start=1))
        self.pids: dict[int, int] = {}
        for node in self._ports:
            self._prepare(node, properties)

    @property
    def nodes(self) -> list[int]:
        """The nodes' numbers."""
        return list(self._ports)

    @property
    def names(self) -> list[str]:
        """The names of the nodes' processes."""
        return [_name(node) for node in self._ports]

    @property
    def servers(self) -> str:
        """Bootstrap servers, host:port, separated by commas."""
        return ",".join(f"{HOST}:{port}" for port in self._ports.values())

    @property
    def description(self) -> str:
        """What runs, for the user."""
        many = "embedded process" if len(self._ports) == 1 else f"{len(self._ports)} embedded processes"
        return f"Apache Kafka {self._files.version} ({many})"

    def start(self, nodes: Sequence[int]) -> None:
        """Start `nodes`, and wait until each of them answers and knows the others.

        Raises:
            StartError: a node ended, or did not answer in time.
        """
        for node in nodes:
            self.pids[node] = self._processes.start(
                _name(node), self._files.command(self._java_options, self._home(node))
            )
        deadline = time.monotonic() + START_DEADLINE_S
        wanted = set(nodes)
        for node in nodes:
            wait_until_ready(
                self._processes,
                _name(node),
                f"Apache Kafka {self._files.version} (node {node})",
                lambda port=self._ports[node]: wanted <= self._known_nodes(port),  # type: ignore[misc]
                deadline,
                needs=[_name(each) for each in nodes if each != node],
            )

    def open_groups(self) -> None:
        """Have Kafka create the topic for consumer groups' offsets now, so that the first group need not wait for it.

        Raises:
            StartError: the node ended, or has no coordinator in time.
        """
        node, port = next(iter(self._ports.items()))
        wait_until_ready(
            self._processes,
            _name(node),
            "Apache Kafka's group coordinator",
            lambda: self._coordinator(port) in self._ports,
            time.monotonic() + START_DEADLINE_S,
        )

    def stop(self, nodes: Sequence[int], *, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for nodes that are still running after `grace_s` seconds; at once with 0."""
        self._processes.stop(*map(_name, nodes), grace_s=grace_s)

    def send(self, nodes: Sequence[int], number: signal.Signals) -> None:
        """Send a signal to nodes."""
        self._processes.send(number, *map(_name, nodes))

    def _known_nodes(self, port: int) -> set[int]:
        try:
            cluster, nodes = cluster_nodes(HOST, port)
        except (OSError, EOFError):
            return set()
        return nodes if cluster == self._cluster else set()

    def _coordinator(self, port: int) -> int:
        try:
            return group_coordinator(HOST, port)
        except (OSError, EOFError):
            return -1

    def _home(self, node: int) -> Path:
        return self._processes.directory / _name(node)

    def _prepare(self, node: int, properties: Mapping[str, str]) -> None:
        home = self._home(node)
        shutil.rmtree(home, ignore_errors=True)  # of an earlier attempt, whose process has stopped
        (home / "tmp").mkdir(parents=True)
        # What `kafka-storage format` writes, without the cost of another Java process at every start.
        shutil.copytree(self._files.formatted, home / "data")
        (home / "data" / "meta.properties").write_text(
            _lines(
                {
                    "version": "1",
                    "cluster.id": self._cluster,
                    "node.id": str(node),
                    "directory.id": random_id(),
                }
            )
        )
        (home / "server.properties").write_text(_lines(self._properties(node) | dict(properties)))

    def _properties(self, node: int) -> dict[str, str]:
        replicas = str(min(3, len(self._ports)))
        client = f"{HOST}:{self._ports[node]}"
        voters = ",".join(f"{n}@{HOST}:{port}" for n, port in self._controllers.items())
        return {
            "process.roles": "broker,controller",
            "node.id": str(node),
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{client},CONTROLLER://{HOST}:{self._controllers[node]}",
            "advertised.listeners": f"PLAINTEXT://{client}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self._home(node) / "data"),
            "auto.create.topics.enable": "true",  # which is Kafka's default
            "default.replication.factor": replicas,
            "min.insync.replicas": "1",
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            # One thread and little memory for compaction; it runs often, so that tests see it.
            "log.cleaner.threads": "1",
            "log.cleaner.dedupe.buffer.size": str(4 << 20),
            "log.cleaner.backoff.ms": "1000",
            "log.segment.delete.delay.ms": "1000",
            # The defaults are for dozens of cores.
            "num.network.threads": "2",
            "num.io.threads": "4",
            "background.threads": "2",
            # A record twice a second that says nothing, for whoever watches a cluster: a third of what a broker costs that nobody uses.
            "metadata.max.idle.interval.ms": "0",
            # A killed broker can come back only once the controller has given up on its predecessor.
            "broker.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": "3000",
        }


def _name(node: int) -> str:
    return f"kafka-{node}"


def _lines(properties: Mapping[str, str]) -> str:
    return "".join(f"{key}={value}\n" for key, value in properties.items())
