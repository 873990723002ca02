"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"

_LOWEST: Final = 15_000
_HIGHEST: Final = 32_000
"""Below the ephemeral range: a client that keeps connecting to a closed port of that range can be given that very port
as its own and connect to itself, and then a restarted server cannot bind it."""
_LINUX_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES: Final = 500


USUAL_KAFKA: Final = (9092, 19092, 29092)
USUAL_REDIS: Final = (6379, 16379, 26379)
USUAL_GATEWAY: Final = (8080, 18080, 28080)
"""Where clients look first, and where the next start will look again if that is taken."""


def is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_ports(count: int, first: Sequence[int] = ()) -> list[int]:
    """`count` distinct ports that are free now, those of `first` before others. Another process may take one before it is
    used: then try others.

    Raises:
        OSError: there are not as many.
    """
    highest = _HIGHEST
    if _LINUX_RANGE.exists():
        highest = min(highest, int(_LINUX_RANGE.read_text().split()[0]))
    ports: list[int] = []
    others = random.sample(range(_LOWEST, max(highest, _LOWEST + 5_000)), _TRIES)
    for port in chain(first, others):
        if port in ports or not is_free(port):
            continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"fewer than {count} free ports on {HOST} among {_TRIES} tried")
