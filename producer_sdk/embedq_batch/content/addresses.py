"""Addresses of stores: KIND:PLACE#NAME, and how they may be shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import msgspec

from embedq_sdk.errors import InvalidArgument


class Place(msgspec.Struct, frozen=True):
    """Where a store is, and the table or collection in it."""

    address: str
    name: str


def place_of(given: str, kind: str, what: str, argument: str = "to") -> Place:
    """Split `ADDRESS#NAME`.

    Raises:
        InvalidArgument: one of them is missing.
    """
    address, _, name = given.rpartition("#")
    if not address or not name:
        raise InvalidArgument(
            argument=argument,
            expected=f"{kind}:ADDRESS#{what.upper()}",
            got=without_password(given) or "nothing",
        )
    return Place(address, name)


_PASSWORD: Final = re.compile(r"(://[^:/@\s]*):[^@/\s]*@")
_SECRETS: Final = frozenset({"--sasl-password", "--oauth-client-secret"})
"""Options whose values are nobody else's."""
_HIDDEN: Final = "…"


def typed(arguments: Sequence[str]) -> str:
    """A command as it may be shown, and kept in a manifest: to be typed again, but for its secrets."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if shown and shown[-1] in _SECRETS:
            argument = _HIDDEN
        elif equals and name in _SECRETS:
            argument = f"{name}={_HIDDEN}"
        shown.append(_PASSWORD.sub(r"\1@", argument))
    return shlex.join(["embedq", *shown])


def without_password(address: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(address)
    if parts.password is None:
        return address
    who, _, where = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{who.partition(':')[0]}@{where}"))
