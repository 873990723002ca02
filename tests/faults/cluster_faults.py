"""What each fault of the schedule does to brokers, Redis and the network before them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from embedq_sdk.dev.kafka_probe import group_coordinator
from embedq_sdk.dev.ports import HOST
from tests.helpers.cluster import Cluster
from tests.helpers.redis_process import redis_command
from tests.helpers.tcp_proxy import TcpProxy

_LATE_S: Final = 0.3
_SLOW_BYTES_PER_S: Final = 20_000
_REDIS_LATE_S: Final = 0.06
"""Just above the service's own patience with Redis."""

Undo = Callable[[], None]


def begin(cluster: Cluster, fault: str, node: int) -> Undo:
    """Let a fault begin; returns what ends it. Both block.

    Raises:
        ValueError: there is no such fault.
    """
    match fault:
        case "broker_killed" | "coordinator_killed":
            cluster.stop_kafka(node, kill=True)
            return lambda: cluster.start_kafka(node)
        case "broker_frozen" | "coordinator_frozen":
            cluster.pause_kafka(node)
            return lambda: cluster.resume_kafka(node)
        case "broker_disk_full":
            disk = cluster.disks[node]
            disk.fill()

            def room_again() -> None:
                disk.empty()
                if cluster.ended(node):  # what Kafka does when its one disk fails
                    cluster.start_kafka(node)

            return room_again
        case "all_brokers_cut":
            for proxy in cluster.proxies.values():
                proxy.cut()
            return cluster.heal_brokers
        case "redis_killed":
            cluster.stop_redis(kill=True)
            return cluster.start_redis
        case "redis_frozen":
            cluster.pause_redis()
            return cluster.resume_redis
        case "redis_full":
            _tell_redis(cluster, "CONFIG", "SET", "maxmemory-policy", "noeviction")
            _tell_redis(cluster, "CONFIG", "SET", "maxmemory", "1")
            return lambda: _tell_redis(cluster, "CONFIG", "SET", "maxmemory", "0")
        case "redis_read_only":
            _tell_redis(cluster, "REPLICAOF", HOST, "1")
            return lambda: _tell_redis(cluster, "REPLICAOF", "NO", "ONE")
        case _ if fault.startswith("redis_"):
            return _network(cluster.redis_proxy, fault.removeprefix("redis_"), _REDIS_LATE_S)
        case "requests_held" | "answers_held":
            return _network(cluster.proxies[node], fault, _LATE_S)
        case _ if fault.startswith("broker_"):
            return _network(cluster.proxies[node], fault.removeprefix("broker_"), _LATE_S)
        case _:
            raise ValueError(f"no fault of a cluster: {fault}")


def coordinator(cluster: Cluster) -> int:
    """The broker that coordinates the consumer groups; 1 if none says so now. Blocks."""
    for address in cluster.direct_servers.split(","):
        try:
            node = group_coordinator(HOST, int(address.split(":")[1]))
        except (OSError, EOFError):
            continue
        if node in cluster.nodes:
            return node
    return 1


async def met_by(cluster: Cluster, fault: str, node: int) -> int:
    """The broker that a fault meets."""
    if fault == "broker_disk_full":
        return next(iter(cluster.disks))
    if fault.startswith("coordinator_"):
        return await asyncio.to_thread(coordinator, cluster)
    return node


def _network(proxy: TcpProxy, fault: str, late_s: float) -> Undo:
    match fault:
        case "reset":
            proxy.reset()
        case "cut":
            proxy.cut()
        case "half_open":
            proxy.half_open()
        case "late":
            proxy.delay(late_s)
        case "slow":
            proxy.drip(_SLOW_BYTES_PER_S)
        case "requests_held":
            proxy.hold_requests()
        case "answers_held":
            proxy.hold_answers()
        case _:
            raise ValueError(f"no fault of a network: {fault}")
    return proxy.heal


def _tell_redis(cluster: Cluster, *words: str) -> None:
    host, port = cluster.direct_redis_url.removeprefix("redis://").partition("/")[0].split(":")
    answer = redis_command(host, int(port), *words)
    if answer != b"+OK\r\n":
        raise RuntimeError(f"Redis said {answer!r} to {' '.join(words)}")
