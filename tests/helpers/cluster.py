"""Three real brokers and a Redis, each behind a proxy of ours: what tests of faults run on.

    with Cluster() as cluster:                      # a DevStack: every helper that takes one takes this
        topics = await make_topics(cluster, prefix, copies=3)
        cluster.stop_kafka(2, kill=True)            # SIGKILL; start_kafka(2): again, on its old data
        cluster.pause_kafka(2)                      # SIGSTOP; resume_kafka(2): SIGCONT
        cluster.proxies[2].cut()                    # the network between clients and broker 2, until heal()
        cluster.redis_proxy.half_open()
        cluster.heal()                              # no proxy has a fault any more

Every method blocks: in a coroutine, use `asyncio.to_thread`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from embedq_sdk.dev import DevStack
from embedq_sdk.dev.jars import KafkaFiles
from embedq_sdk.dev.kafka_server import KafkaServer
from embedq_sdk.dev.ports import HOST, free_ports
from embedq_sdk.dev.processes import Processes
from tests.helpers.programs import own_environ
from tests.helpers.small_disk import SmallDisk
from tests.helpers.tcp_proxy import TcpProxy

BROKERS: Final = 3
_HEAP_MB: Final = 320
"""Of each broker: three share a machine with workers."""
_BROKER_SESSION_MS: Final = 6000
"""How long a broker may be silent before others take over what it leads: so long does a leader change take."""
_CLIENTS: Final = "CLIENTS"
"""The listener behind the proxies; brokers talk to each other, and onlookers to them, on the ordinary one."""


class Cluster(DevStack):
    """A Kafka cluster with replicated internal topics, and a Redis. Started by `with`, gone at the end.

    `kafka_servers` and `redis_url` lead through the proxies, `direct_servers` past them, for whoever only looks on. A
    proxy's faults are between clients and a broker alone, never between brokers. Kafka's version is the one that
    EMBEDQ_KAFKA_VERSION names. Topics come into being by being asked for, which is Kafka's default.

    Args:
        brokers: how many; each is a controller as well.
        min_insync: copies that must have a record before it counts as acknowledged; of `__consumer_offsets` and the
            transactions' log, too.
        heap_mb: of each broker.
        properties: added to each broker's configuration.
        disks: where brokers keep their data, by number; the others beside the rest.
        environ: where the EMBEDQ_* variables are looked up; None: this process's, without addresses. A Redis that it
            names is used, and behind a proxy as well.
    """

    def __init__(
        self,
        *,
        brokers: int = BROKERS,
        min_insync: int = 1,
        heap_mb: int = _HEAP_MB,
        properties: Mapping[str, str] | None = None,
        disks: Mapping[int, SmallDisk] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        wanted = {
            "auto.create.topics.enable": "true",
            "min.insync.replicas": str(min_insync),
            "transaction.state.log.min.isr": str(min_insync),
            # A broker that the machine starves must not lose what it leads for it.
            "broker.session.timeout.ms": str(_BROKER_SESSION_MS),
        }
        super().__init__(
            brokers=brokers,
            kafka_properties=wanted | dict(properties or {}),
            environ=own_environ() if environ is None else environ,
        )
        self._heap_mb = heap_mb
        self.disks = dict(disks or {})
        """The small disks of brokers, by number."""
        self._proxied: _ProxiedKafka | None = None
        self._redis_proxy: TcpProxy | None = None

    def start(self) -> None:
        """Start everything, and wait until it answers."""
        super().start()
        host, port = super().redis_url.removeprefix("redis://").partition("/")[0].split(":")
        self._redis_proxy = TcpProxy(host, int(port))
        self._redis_proxy.start()

    def close(self) -> None:
        """Stop everything. Closing twice does nothing."""
        super().close()
        if self._proxied is not None:
            self._proxied.close_proxies()
        if self._redis_proxy is not None:
            self._redis_proxy.close()
        self._proxied = self._redis_proxy = None

    @property
    def nodes(self) -> list[int]:
        """The brokers' numbers."""
        return self._own_kafka().nodes

    @property
    def proxies(self) -> Mapping[int, TcpProxy]:
        """What stands before each broker, by its number (from 1)."""
        return self._own_proxied().proxies

    @property
    def redis_proxy(self) -> TcpProxy:
        """What stands before Redis."""
        if self._redis_proxy is None:
            raise RuntimeError("the cluster is not running")
        return self._redis_proxy

    @property
    def kafka_servers(self) -> str:
        """Bootstrap servers, through the proxies."""
        return ",".join(proxy.address for proxy in self.proxies.values())

    @property
    def direct_servers(self) -> str:
        """Bootstrap servers, past the proxies."""
        return self._own_kafka().servers

    @property
    def redis_url(self) -> str:
        """Redis, through its proxy."""
        return f"redis://{self.redis_proxy.address}/0"

    @property
    def direct_redis_url(self) -> str:
        """Redis, past its proxy."""
        return super().redis_url

    def ended(self, node: int) -> bool:
        """Whether a broker's process is gone."""
        return self._own_processes().exit_code(f"kafka-{node}") is not None

    def heal(self) -> None:
        """Take the faults off all proxies."""
        self.heal_brokers()
        self.redis_proxy.heal()

    def heal_brokers(self) -> None:
        """Take the faults off the brokers' proxies."""
        for proxy in self.proxies.values():
            proxy.heal()

    def _make_kafka(
        self,
        processes: Processes,
        files: KafkaFiles,
        java_options: Sequence[str],
        first_ports: Sequence[int],
    ) -> KafkaServer:
        if self._proxied is not None:  # of an attempt that found a port taken
            self._proxied.close_proxies()
        options = [*java_options, f"-Xmx{self._heap_mb}m"]  # the last one counts
        self._proxied = _ProxiedKafka(
            processes,
            files,
            self._brokers,
            self._kafka_properties,
            options,
            {node: disk.path / "data" for node, disk in self.disks.items()},
        )
        return self._proxied

    def _own_proxied(self) -> _ProxiedKafka:
        if self._proxied is None:
            raise RuntimeError("the cluster is not running")
        return self._proxied


class _ProxiedKafka(KafkaServer):
    """Brokers with one listener more, whose advertised address is a proxy's."""

    def __init__(
        self,
        processes: Processes,
        files: KafkaFiles,
        brokers: int,
        properties: Mapping[str, str],
        java_options: Sequence[str],
        data: Mapping[int, Path],
    ) -> None:
        self._data = data
        self._behind = dict(enumerate(free_ports(brokers), start=1))
        self.proxies = {node: TcpProxy(HOST, port) for node, port in self._behind.items()}
        super().__init__(processes, files, brokers, properties, java_options)
        for proxy in self.proxies.values():
            proxy.start()

    def close_proxies(self) -> None:
        """End all connections through the proxies."""
        for proxy in self.proxies.values():
            proxy.close()

    def _properties(self, node: int) -> dict[str, str]:
        found = super()._properties(node)
        ours = f"{_CLIENTS}://{HOST}:"
        return found | {
            "log.dirs": str(self._data.get(node, found["log.dirs"])),
            "listeners": f"{found['listeners']},{ours}{self._behind[node]}",
            "advertised.listeners": f"{found['advertised.listeners']},{ours}{self.proxies[node].port}",
            "listener.security.protocol.map": f"{found['listener.security.protocol.map']},{_CLIENTS}:PLAINTEXT",
        }

    def _prepare(self, node: int, properties: Mapping[str, str]) -> None:
        super()._prepare(node, properties)
        if node in self._data:
            shutil.rmtree(self._data[node], ignore_errors=True)
            shutil.copytree(self._home(node) / "data", self._data[node])
