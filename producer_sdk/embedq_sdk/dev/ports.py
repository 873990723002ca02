"""Free TCP ports on the loopback interface."""

import random
import socket
from pathlib import Path

HOST = "127.0.0.1"

# A client that keeps dialling a closed port of the ephemeral range can be given that very port as its
# own and so connect to itself, which would also stop a restarted server from binding it. Hence below.
_LOWEST, _HIGHEST = 15_000, 32_000
_LINUX_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Return `count` distinct ports that nobody listened on just now.

    Another process may take one before it is used: callers try again with new ones.
    """
    highest = _HIGHEST
    if _LINUX_RANGE.exists():
        highest = min(highest, int(_LINUX_RANGE.read_text().split()[0]))
    ports: list[int] = []
    for port in random.sample(range(_LOWEST, max(highest, _LOWEST + 5_000)), 500):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"no {count} free ports on {HOST} among 500 tried")
