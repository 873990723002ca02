"""Who asks, and what they may. Nothing here does I/O."""

from __future__ import annotations

from typing import Final, Literal, Protocol

from embedq_gateway.errors import ApiError
from embedq_shared.topics import Lane

Scope = Literal["embed", "admin"]

ANYBODY: Final = "anybody"
"""The name of callers where no keys are asked for."""


class Caller:
    """One who asks: what an API key says, or everybody where no key is asked for."""

    def __init__(
        self,
        name: str,
        scopes: frozenset[Scope],
        *,
        aliases: frozenset[str] | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.name = name
        self.scopes = scopes
        self.aliases = aliases
        """None: all."""
        self.lane = lane
        """The lane of all its jobs; None: as each request says."""

    @property
    def client_id(self) -> str | None:
        """Whose its jobs are, for fair turns among clients; None: the gateway's."""
        return None if self.name == ANYBODY else f"key:{self.name}"

    def require(self, scope: Scope) -> None:
        """Check that it may do this.

        Raises:
            ApiError: it may not.
        """
        if scope not in self.scopes:
            raise ApiError("permission_denied", f"this API key lacks the scope `{scope}`")

    def require_alias(self, alias: str) -> None:
        """Check that it may use this model.

        Raises:
            ApiError: it may not.
        """
        if self.aliases is not None and alias not in self.aliases:
            raise ApiError("permission_denied", "this API key may not use this model", "model")

    def begin(self) -> None:
        """A request of its begins to run; `end` is called when it has.

        Raises:
            ApiError: it has too many in flight, or has used up its tokens.
        """

    def end(self, tokens: int) -> None:
        """A request has run, and cost this many tokens."""


class Keys(Protocol):
    """Where callers are found."""

    def caller(self, authorization: bytes | None) -> Caller:
        """Who sends this `Authorization` header.

        Raises:
            ApiError: nobody who is known.
        """


class OpenDoor:
    """No keys: everybody may do everything."""

    def __init__(self) -> None:
        self._anybody = Caller(ANYBODY, frozenset({"embed", "admin"}))

    def caller(self, authorization: bytes | None) -> Caller:
        """Everybody is the same one; a key that is sent is not looked at."""
        return self._anybody
