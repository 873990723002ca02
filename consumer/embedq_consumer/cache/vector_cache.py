"""Vectors kept in Redis: best effort in both directions, and never a wrong answer.

Redis may be down, slow, full, restarted, written to by others or something else entirely; each of these is a miss.
`entries` says what guards the answers, `redis_link` how a connection is kept from answering the wrong look-up.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import structlog

from embedq_consumer.cache.circuit_breaker import CircuitBreaker, Permit
from embedq_consumer.cache.entries import OVERHEAD_BYTES, CachedVector, EntryCodec, entry_bytes
from embedq_consumer.cache.link import Command, Link, LinkFailed, Reason, Refusal
from embedq_consumer.cache.redis_link import RedisLink, RedisOptions
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.grouping import batched_by

log = structlog.get_logger()

CHUNK_BYTES: Final = 1 << 20
"""Vector bytes of one MGET or one pipelined write: what Redis serves in a few milliseconds, so that a short time-out
stays fair, and what the event loop parses without holding up everything else."""
BYTES_PER_SECOND: Final = 25e6
"""The slowest link that still counts as working: a round trip may take this much longer for what it carries."""


_ENTRY_BYTES: Final = OVERHEAD_BYTES + 256
"""What an entry costs a round trip besides its vector: header, key, and Redis's framing."""
_SETTINGS: Final = frozenset({"password", "permission", "tls", "protocol"})
"""Failures that do not pass by themselves."""
_HINTS: Final[dict[Reason, str]] = {
    "timeout": "Redis does not answer within EMBEDQ_CACHE_TIMEOUT_MS; see also whether the address must begin with "
    "redis:// or rediss://",
    "connection": "Redis does not take or keep the connection; see EMBEDQ_REDIS_URL, whether it must begin with rediss://, "
    "and whether Redis asks for a certificate",
    "tls": "Redis and this service do not accept each other's certificates; see EMBEDQ_REDIS_SSL_CAFILE, "
    "EMBEDQ_REDIS_SSL_CERTFILE, and whether the address must begin with redis://, without TLS",
    "password": "Redis refuses this user name or password; see EMBEDQ_REDIS_USERNAME, EMBEDQ_REDIS_PASSWORD, "
    "EMBEDQ_REDIS_PASSWORD_FILE",
    "permission": "the Redis user lacks a right; it needs `+ping +mget +set` for `~embedq:*`",
    "protocol": "what answers there is not Redis, or has put something else than values under our keys",
    "refused": "Redis refuses the command",
}
"""What to look at, for each reason. Texts of our own: what the other side says may quote anything."""


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the cache is and how long it may take.

    `timeout_s` bounds each round trip, plus what its bytes need at `BYTES_PER_SECOND`; a round trip that must first
    connect has `connect_timeout_s` more. The entries of each write live for `ttl_s` ± 10 %, so that they do not expire
    together. With an empty address there is no cache.
    """

    redis: RedisOptions
    ttl_s: float
    timeout_s: float = 0.05
    connect_timeout_s: float = 0.5
    connections: int = 4


class VectorCache:
    """Looks vectors up in Redis and keeps new ones there. When it cannot, that costs a caller one time-out at most.

    After a few failures in a row the breaker opens and every look-up is a miss at once. `link` and `breaker` are for
    tests; by default they are made from the options.

    Raises:
        ValueError: the address is not one that redis-py understands; its message may quote a password.
    """

    def __init__(
        self,
        options: CacheOptions,
        codec: EntryCodec,
        metrics: Metrics,
        *,
        link: Link | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._options = options
        self._codec = codec
        self._metrics = metrics
        self._link = link
        if link is None and options.redis.url:
            self._link = RedisLink(
                options.redis,
                connect_timeout_s=options.connect_timeout_s,
                connections=options.connections,
            )
        self._breaker = breaker or CircuitBreaker()
        self._usable: Link | None = None  # the link from `open` until `close`
        self._said: Reason | None = None  # the last reason that was logged, until Redis answers again
        self._said_open = False  # that the breaker opened was logged, and not yet that it closed
        self._refusal: str | None = None  # why Redis refuses writes, if it did the last time

    async def open(self) -> None:
        """Start answering. Never fails because Redis does; the log says whether it was there."""
        self._usable = self._link
        if self._usable is not None:
            await self._round_trip(self._usable, "ping", [(b"PING",)], 0, say=True)

    async def close(self) -> None:
        """Close every connection; from now on each look-up is a bypass."""
        self._usable = None
        if self._link:
            await self._link.close(self._options.timeout_s)

    async def get_many(self, keys: Sequence[bytes], *, counted: bool = True) -> list[CachedVector | None]:
        """The entry of each key, in order, or None where Redis has none or cannot be asked. Never raises.

        One MGET, or one for every `CHUNK_BYTES` of vectors. The first chunk that fails ends the look-up, so that a
        dead Redis costs one time-out however many keys there are. Not `counted`: no job asks, so hits and misses say nothing.
        """
        entries: list[CachedVector | None] = [None] * len(keys)
        count = self._count_lookups if counted else _count_nothing
        link = self._usable
        if link is None:
            count(bypass=len(keys))
            return entries
        for chunk, size in _chunks([_ENTRY_BYTES + entry_bytes(key) for key in keys]):
            asked = keys[chunk]
            replies = await self._round_trip(link, "get", [(b"MGET", *asked)], size)
            if replies is None:
                count(error=len(keys) - chunk.start)
                break
            there = [
                (index, key, value)
                for index, (key, value) in enumerate(zip(asked, replies[0], strict=True), chunk.start)
                if value is not None
            ]
            corrupt = 0
            found = self._codec.unpack_many([(key, value) for _, key, value in there])
            for (index, _, _), entry in zip(there, found, strict=True):
                if isinstance(entry, str):
                    corrupt += 1
                    self._metrics.cache_corrupt.labels(entry).inc()
                else:
                    entries[index] = entry
            count(hit=len(there) - corrupt, miss=len(asked) - len(there), corrupt=corrupt)
        return entries

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> int:
        """Keep these entries, as far as Redis takes them, replacing what it had for these keys; how many it took. Never raises.

        One pipelined write, or one for every `CHUNK_BYTES` of vectors; the first that fails ends it.
        """
        link, kept = self._usable, 0
        if link is None:
            self._count_writes(bypass=len(items))
            return 0
        for chunk, size in _chunks([_ENTRY_BYTES + len(entry.vector) for _, entry in items]):
            commands: list[Command] = [
                (b"SET", key, self._codec.pack(key, entry), b"PX", self._jittered_ttl_ms())
                for key, entry in items[chunk]
            ]
            replies = await self._round_trip(link, "put", commands, size)
            if replies is None:
                self._count_writes(error=len(items) - chunk.start)
                break
            taken = replies.count(b"OK")
            kept += taken
            self._count_writes(ok=taken, error=len(replies) - taken)
            self._note_refusal(next((each.code for each in replies if isinstance(each, Refusal)), None))
        return kept

    async def _round_trip(
        self, link: Link, operation: str, commands: Sequence[Command], size: int, *, say: bool = False
    ) -> list[Any] | None:
        """One reply for each command; None if the breaker is open or the round trip failed. `say`: log any failure."""
        permit = self._breaker.admit(time.monotonic())
        if permit is None:
            return None
        began = time.perf_counter()
        try:
            replies = await link.exchange(commands, self._options.timeout_s + size / BYTES_PER_SECOND)
        except LinkFailed as failure:
            self._failed(permit, failure, say)
            return None
        except BaseException:
            self._breaker.abandoned(permit)
            raise
        else:
            self._succeeded(permit)
            return replies
        finally:
            self._metrics.cache_seconds.labels(operation).observe(time.perf_counter() - began)

    def _succeeded(self, permit: Permit) -> None:
        """Log once that Redis answers again: where the breaker was open, once it has done so for a while."""
        before = self._breaker.state
        self._breaker.succeeded(permit)
        if before != (after := self._breaker.state) and after == "closed":
            self._metrics.cache_open.set(0)
        if self._said is not None and self._breaker.recovered(time.monotonic()):
            log.info("cache_breaker_closed" if self._said_open else "cache_reachable")
            self._said, self._said_open = None, False

    def _failed(self, permit: Permit, failure: LinkFailed, say: bool) -> None:
        """Log each state once: a wrong password or the like at once, what may pass when the breaker opens.

        A breaker that opens, closes and opens again under load is one state."""
        before = self._breaker.state
        self._breaker.failed(permit, time.monotonic())
        after = self._breaker.state
        self._metrics.cache_failures.labels(failure.reason).inc()
        opened = before == "closed" and after == "open"
        if opened:
            self._metrics.cache_open.set(1)
        other = failure.reason != self._said and failure.reason in _SETTINGS
        if (opened and not self._said_open) or other or say:
            event = "cache_breaker_opened" if opened else "cache_unreachable"
            log.warning(event, error=str(failure), reason=failure.reason, hint=_HINTS[failure.reason])
            self._said = failure.reason
            self._said_open = self._said_open or opened

    def _note_refusal(self, code: str | None) -> None:
        """Log once that Redis refuses writes, or takes them again."""
        if code == self._refusal:
            return
        if code is None:
            log.info("cache_writes_accepted")
        else:
            hint = (
                _HINTS["permission"] if code == "NOPERM" else "Redis answers look-ups and keeps nothing new"
            )
            log.warning("cache_writes_refused", error=code, hint=hint)
        self._refusal = code

    def _jittered_ttl_ms(self) -> bytes:
        return b"%d" % max(1, self._options.ttl_s * 1000 * random.uniform(0.9, 1.1))

    def _count_lookups(self, **outcomes: int) -> None:
        for outcome, number in outcomes.items():
            if number:
                self._metrics.cache.labels(outcome).inc(number)

    def _count_writes(self, **outcomes: int) -> None:
        for outcome, number in outcomes.items():
            if number:
                self._metrics.cache_writes.labels(outcome).inc(number)


def _count_nothing(**outcomes: int) -> None:
    """These look-ups are not counted."""


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Where each round trip's entries lie, and how many bytes their vectors have."""
    for indices in batched_by(range(len(sizes)), sizes.__getitem__, CHUNK_BYTES):
        chunk = slice(indices[0], indices[-1] + 1)
        yield chunk, sum(sizes[chunk])
