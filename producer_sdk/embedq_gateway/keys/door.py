"""The door: from the key that a request carries to who sent it."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NoReturn

from embedq_gateway.errors import ApiError
from embedq_gateway.keys.caller import ANYBODY, Caller, anybody, caller_of
from embedq_gateway.keys.exposure import is_same_site
from embedq_gateway.keys.key_file import KeyEntry, digest_of
from embedq_gateway.keys.limits import Allowance, Limits

_INDEX_BYTES: Final = 8
"""Of a hash, by which it is found. Two keys that begin alike would be one in 2^64."""
_NO_HASH: Final = bytes(32)
"""Of nothing that anybody knows. A key whose hash begins like none is compared with it, as others are with their own."""
_FOREIGN_PAGE: Final = "without API keys only pages of this gateway itself may send requests: `Host` and `Origin` are another site's"


class Door:
    """The keys in force, and what each has used. In one event loop; `workers` processes share each key's limits.

    Invariants:

    - Keys are compared by their hashes, in a time that does not depend on how much of them is equal. What is looked up before is the
      beginning of a hash of what was sent: how long that takes says nothing of a key.
    - What a key has used, and has under way, survives `replace`, as long as its name is there.
    """

    def __init__(
        self,
        entries: Sequence[KeyEntry] | None,
        *,
        workers: int = 1,
        loopback: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None: there are no keys, and whoever comes may do everything. `loopback`: only this machine reaches the address."""
        self._workers = workers
        self._loopback = loopback
        self._clock = clock
        self._anybody = anybody(Allowance(Limits(), clock()), clock) if entries is None else None
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}
        if entries is not None:
            self.replace(entries)

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed."""
        return self._anybody is None

    @property
    def names(self) -> list[str]:
        """Of the keys, sorted."""
        return [ANYBODY] if self._anybody else sorted(caller.name for _, caller in self._callers.values())

    def replace(self, entries: Iterable[KeyEntry]) -> None:
        """Other keys from now on. A request that has come in goes on as it was let in."""
        known = {caller.name: caller.allowance for _, caller in self._callers.values()}
        now = self._clock()
        callers: dict[bytes, tuple[bytes, Caller]] = {}
        for entry in entries:
            limits = Limits(entry.tokens_per_minute, entry.in_flight).shared_by(self._workers)
            allowance = known.get(entry.name)
            if allowance is None:
                allowance = Allowance(limits, now)
            elif allowance.limits != limits:
                allowance.limit(limits, now)
            digest = bytes.fromhex(entry.hash.removeprefix("sha256:"))
            callers[digest[:_INDEX_BYTES]] = digest, caller_of(entry, allowance, self._clock)
        self._callers = callers

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who sent a request with these headers (names in lower case).

        Raises:
            ApiError: there is no key, or none that is known; or without keys, a page of another site sent it.
        """
        if self._anybody is not None:
            if not is_same_site(headers, loopback=self._loopback):
                raise ApiError("permission_denied", _FOREIGN_PAGE, "origin")
            return self._anybody
        key = key_in(headers)
        if key is None:
            _refuse("expected an API key, as `Authorization: Bearer KEY`")
        digest = digest_of(key)
        expected, found = self._callers.get(digest[:_INDEX_BYTES], (_NO_HASH, None))
        if not hmac.compare_digest(digest, expected) or found is None:
            _refuse("this API key is not known")
        return found


def key_in(headers: Mapping[bytes, bytes]) -> str | None:
    """The key that a request carries: `Authorization: Bearer KEY` as OpenAI, Cohere and TEI have it, else `x-api-key: KEY`."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        key = headers.get(b"x-api-key", b"")
    return key.strip().decode("latin-1") or None


def _refuse(message: str) -> NoReturn:
    raise ApiError("invalid_api_key", message, headers=((b"www-authenticate", b"Bearer"),))
