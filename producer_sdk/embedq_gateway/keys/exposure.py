"""Whether a gateway may listen where it was told to. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

_LOOPBACK_NAMES: Final = frozenset({"localhost", "ip6-localhost"})


class Exposed(Exception):
    """Without keys, whoever reaches the address could use the service; the message begins with the setting to change."""


def check_exposure(host: str, *, has_keys: bool, allow_anonymous: bool) -> None:
    """Refuse to serve everybody by an oversight.

    Raises:
        Exposed: the address is not this machine's alone, there are no keys, and nobody said that this is meant.
    """
    if not (has_keys or allow_anonymous or is_loopback(host)):
        raise Exposed(
            f"HOST: expected a loopback address such as 127.0.0.1, got {host!r}: without keys whoever reaches it could use "
            "the service. Make keys (`embedq gateway keys add`, KEYS_FILE), or say that this is meant (ALLOW_ANONYMOUS=true)"
        )


@lru_cache(
    maxsize=64
)  # reading an address costs a twentieth of a request, and most requests name the same one
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Of a name, only the usual ones are believed."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in _LOOPBACK_NAMES


def is_same_site(headers: Mapping[bytes, bytes], *, loopback: bool) -> bool:
    """Whether a request may come from a page of ours, or from no page at all.

    Without keys a page of another site, open in a browser on this machine, could otherwise send requests (`Origin` is another
    one then), or point a name of its own at a loopback address and read the answers (`Host` is that name then).
    """
    host = headers.get(b"host", b"").decode("latin-1")
    if loopback and host and not is_loopback(_without_port(host)):
        return False
    origin = headers.get(b"origin")
    return origin is None or origin.decode("latin-1").partition("://")[2] == host


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
