"""Apache Kafka from a directory with a Java runtime (`jre`) and Kafka's jars (`jars`), for machines without a network."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "num.network.threads": "4",
    "num.io.threads": "8",
    # Replicas that start together join the group together, and none works alone first.
    "group.initial.rebalance.delay.ms": "10000",
}


@contextmanager
def unpacked_kafka(directory: Path) -> Iterator[str]:
    """Run one node; its address. Its data goes when the block ends."""
    java = [str(directory / "jre" / "bin" / "java"), "-cp", f"{directory}/jars/*"]
    with tempfile.TemporaryDirectory(prefix="embedq-kafka-") as scratch:
        home = Path(scratch)
        client, controller = _free_ports(2)
        properties = PROPERTIES | {
            "listeners": f"PLAINTEXT://127.0.0.1:{client},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{client}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "log.dirs": str(home / "data"),
        }
        file = home / "server.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        identity = "k" + uuid.uuid4().hex[:21]
        with (home / "log").open("wb") as log:
            subprocess.run(
                [*java, "kafka.tools.StorageTool", "format", "-t", identity, "-c", str(file)],
                stdout=log,
                stderr=log,
                check=True,
            )
            broker = subprocess.Popen(
                [*java, "-Xms2g", "-Xmx2g", "kafka.Kafka", str(file)], stdout=log, stderr=log
            )
        try:
            _until_open(broker, client, home / "log")
            yield f"127.0.0.1:{client}"
        finally:
            broker.kill()
            broker.wait()


def _until_open(broker: subprocess.Popen[bytes], port: int, log: Path, within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if broker.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Kafka did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.1)
        else:
            return


def _free_ports(count: int) -> list[int]:
    open_ = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [server.getsockname()[1] for server in open_]
    finally:
        for server in open_:
            server.close()
