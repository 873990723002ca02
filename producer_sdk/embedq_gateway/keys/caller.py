"""Who asks, and what they may do: what each route is handed instead of a key."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import msgspec

from embedq_gateway.errors import ApiError
from embedq_gateway.keys.key_file import KeyEntry, Scope
from embedq_gateway.keys.limits import Allowance, guessed_tokens
from embedq_shared.topics import Lane

ANYBODY: Final = "anybody"
"""The name of who asks where there are no keys, in metrics and logs."""
_EVERYTHING: Final = frozenset[Scope]({"embed", "admin", "metrics"})


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who sent a request: a key, by its name, or anybody where there are no keys."""

    name: str
    scopes: frozenset[Scope]
    aliases: frozenset[str] | None
    lane: Lane | None
    allowance: Allowance
    clock: Callable[[], float] = time.monotonic

    @property
    def client_id(self) -> str | None:
        """Whose its jobs are, for fair turns among clients; None: the gateway's."""
        return client_id(self.name)

    def require(self, scope: Scope) -> None:
        """Whether it may do this at all. Whoever may administer may read the metrics too.

        Raises:
            ApiError: 403.
        """
        if scope not in self.scopes and not (scope == "metrics" and "admin" in self.scopes):
            raise ApiError(
                "permission_denied",
                f"this needs an API key with the scope `{scope}`; this one has {_shown(self.scopes)}",
            )

    def require_alias(self, alias: str) -> None:
        """Whether it may use a model.

        Raises:
            ApiError: 403.
        """
        if self.aliases is not None and alias not in self.aliases:
            raise ApiError(
                "permission_denied",
                f"this API key may use {', '.join(sorted(self.aliases))}, and no other model",
                "model",
            )

    def lane_for(self, asked: Lane | None) -> Lane:
        """The lane of its job: the one that it asks for, or that its key is bound to.

        Raises:
            ApiError: 403, where the key is bound to the other one.
        """
        if self.lane is not None and asked not in (None, self.lane):
            raise ApiError(
                "permission_denied", f"this API key may use the {self.lane} lane alone", "x-embedq-lane"
            )
        return asked or self.lane or "interactive"

    def admit(self, *, characters: int, texts: int) -> Admission:
        """Begin a request of so much text; use it as a block, and say in it how many tokens it was (`settle`).

        Raises:
            ApiError: 429, with `Retry-After`.
        """
        guessed = guessed_tokens(characters, texts)
        now = self.clock()
        if (refused := self.allowance.begin(guessed, now)) is not None:
            raise ApiError(
                "rate_limit_exceeded",
                f"this API key may use {refused.what}: try again in {refused.wait_s} s",
                retry_after_s=refused.wait_s,
                headers=tuple(self.allowance.headers(now)),
            )
        return Admission(self.allowance, guessed, self.clock)


class Admission:
    """A request under way. At its end what was guessed is replaced by what it was; one that failed costs nothing.

    One that is given up by its client costs what was guessed: its texts may well have been computed.
    """

    def __init__(self, allowance: Allowance, guessed: int, clock: Callable[[], float]) -> None:
        self._allowance = allowance
        self._guessed = guessed
        self._used: int | None = None
        self._clock = clock

    def settle(self, tokens: int) -> None:
        """It has cost this."""
        self._used = tokens

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer tells of the key's limits."""
        return self._allowance.headers(self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        used = self._used
        if used is None:
            used = 0 if kind is None or issubclass(kind, Exception) else self._guessed
        self._allowance.end(self._guessed, used, self._clock())


def _shown(scopes: frozenset[Scope]) -> str:
    return " and ".join(f"`{scope}`" for scope in sorted(scopes)) or "none"


def client_id(name: str) -> str | None:
    """Whose the jobs of a caller of this name are; see `Caller.client_id`."""
    return None if name == ANYBODY else f"key:{name}"


def caller_of(entry: KeyEntry, allowance: Allowance, clock: Callable[[], float]) -> Caller:
    """Who sends this key."""
    return Caller(
        name=entry.name,
        scopes=frozenset(entry.scopes),
        aliases=None if entry.aliases is None else frozenset(entry.aliases),
        lane=entry.lane,
        allowance=allowance,
        clock=clock,
    )


def anybody(allowance: Allowance, clock: Callable[[], float]) -> Caller:
    """Who asks where there are no keys: they may do everything."""
    return Caller(name=ANYBODY, scopes=_EVERYTHING, aliases=None, lane=None, allowance=allowance, clock=clock)
