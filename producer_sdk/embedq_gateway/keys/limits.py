"""How much a key may use: tokens a minute, and requests in flight. Pure: time is an argument, in monotonic seconds."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

CHARACTERS_A_TOKEN: Final = 4
"""A guess at what a request will cost, until its answer says what it did: English has four to five, other scripts fewer."""
_MINUTE_S: Final = 60.0
_SHORTEST_WAIT_S: Final = 1.0
"""What a client is told to wait at least. The header has whole seconds, and sooner there is hardly anything to gain."""


def guessed_tokens(characters: int, texts: int) -> int:
    """What texts may cost, before they were tokenized: never nothing."""
    return max(texts, 1, math.ceil(characters / CHARACTERS_A_TOKEN))


class Limits(msgspec.Struct, frozen=True):
    """What a key may use; None: as much as it likes."""

    tokens_per_minute: float | None = None
    in_flight: int | None = None

    def shared_by(self, workers: int) -> Limits:
        """One process's part, where several answer side by side: tokens divided, requests divided and rounded up."""
        return Limits(
            None if self.tokens_per_minute is None else self.tokens_per_minute / workers,
            None if self.in_flight is None else math.ceil(self.in_flight / workers),
        )


class TooMany(NamedTuple):
    """A request that must wait: of what there is too much, and for how long, in whole seconds."""

    what: str
    wait_s: int


class TokenBucket:
    """Tokens that may be used now; a minute fills it, and it holds no more than a minute's.

    A request is let in by a guess and settled by what it was, so the level may fall below zero: then the next one waits for
    longer. One that is larger than the bucket is let in when the bucket is full.

    Invariants:

    - The level never exceeds the capacity.
    - Of requests that cost what was guessed, those let in within `t` seconds cost at most the capacity, what came in meanwhile
      (`t` times the rate), and the last one.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._capacity = per_minute
        self._level = per_minute
        self._at = now

    def take(self, tokens: int, now: float) -> float:
        """0 if these were taken; otherwise nothing was, and this is for how many seconds to wait."""
        self._fill(now)
        needed = min(float(tokens), self._capacity)
        if self._level >= needed:
            self._level -= tokens
            return 0.0
        return (needed - self._level) * _MINUTE_S / self._capacity

    def settle(self, taken: int, used: int, now: float) -> None:
        """A request that took some has used others."""
        self._fill(now)
        self._level = min(self._capacity, self._level + taken - used)

    def left(self, now: float) -> float:
        """Tokens that may be used now; below zero where more were used than guessed."""
        self._fill(now)
        return self._level

    def full_in(self, now: float) -> float:
        """Seconds until it holds a minute's tokens again."""
        self._fill(now)
        return (self._capacity - self._level) * _MINUTE_S / self._capacity

    def resize(self, per_minute: float, now: float) -> None:
        """Another rate from now on: what was used of the old one stays used."""
        self._fill(now)
        self._level = min(per_minute, self._level + per_minute - self._capacity)
        self._capacity = per_minute

    def _fill(self, now: float) -> None:
        passed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._level = min(self._capacity, self._level + passed * self._capacity / _MINUTE_S)


class Allowance:
    """What one key has under way and has used. It outlives a change of its limits, and of the file."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = Limits()
        self._bucket: TokenBucket | None = None
        self._under_way = 0
        self.limit(limits, now)

    @property
    def limits(self) -> Limits:
        """Those in force."""
        return self._limits

    @property
    def under_way(self) -> int:
        """Requests that were begun and have not ended."""
        return self._under_way

    def limit(self, limits: Limits, now: float) -> None:
        """Other limits from now on."""
        rate = limits.tokens_per_minute
        if rate is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(rate, now)
        else:
            self._bucket.resize(rate, now)
        self._limits = limits

    def begin(self, tokens: int, now: float) -> TooMany | None:
        """A request begins that may cost these tokens, or must wait, and then nothing has changed."""
        most = self._limits.in_flight
        if most is not None and self._under_way >= most:
            return TooMany(f"{most:,} requests in flight", math.ceil(_SHORTEST_WAIT_S))
        if self._bucket is not None and (wait := self._bucket.take(tokens, now)) > 0:
            rate = self._limits.tokens_per_minute
            return TooMany(f"{rate:,.0f} tokens a minute", math.ceil(max(wait, _SHORTEST_WAIT_S)))
        self._under_way += 1
        return None

    def end(self, guessed: int, used: int, now: float) -> None:
        """A request that began has ended, with what it really cost."""
        self._under_way -= 1
        if self._bucket is not None:
            self._bucket.settle(guessed, used, now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """What a client is told of its tokens, by the names that OpenAI gave these headers."""
        if self._bucket is None:
            return []
        return [
            (b"x-ratelimit-limit-tokens", b"%d" % (self._limits.tokens_per_minute or 0)),
            (b"x-ratelimit-remaining-tokens", b"%d" % max(0.0, self._bucket.left(now))),
            (b"x-ratelimit-reset-tokens", b"%.3fs" % self._bucket.full_in(now)),
        ]
