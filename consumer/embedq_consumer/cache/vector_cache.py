"""Vectors kept in Redis: best effort in both directions, and never a wrong answer. The only module that imports redis.

Redis may be down, slow, full, restarted or something else entirely; each of these is a miss. What guards the answers:

- The key names everything that a vector depends on, each part hashed or of bounded form.
- Each entry carries a checksum over its own key and content, so that a damaged entry, or one that belongs to another
  key, is a miss too.
- A connection whose round trip did not run to its end is closed before anybody can use it again.
"""

from __future__ import annotations

import asyncio
import random
import re
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from types import TracebackType
from typing import Any, Final, Literal, Self, cast

import msgspec
import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from embedq_consumer.cache.circuit_breaker import CircuitBreaker, State
from embedq_consumer.engine import Text
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import Dtype
from embedq_shared.vectors import vector_bytes

log = structlog.get_logger(__name__)

CHUNK_BYTES: Final = 1 << 20
"""Vector bytes of one MGET or one pipelined write: what Redis serves in a few milliseconds, so that a short time-out
stays fair, and what the event loop parses without holding up everything else."""
BYTES_PER_SECOND: Final = 25e6
"""The slowest link that still counts as working: a round trip may take this much longer for what it carries."""

# What Redis, its client or whatever else listens on that port can do to a round trip. ValueError and EOFError come
# from the client's parser when the peer does not speak the protocol.
_FAILURES: Final = (RedisError, OSError, EOFError, ValueError)

_MAGIC: Final = b"EQV1"
_HEADER: Final = struct.Struct("<4sB3xIdI")  # magic, flags, tokens, scale, checksum: 24 bytes
_BEFORE_CHECKSUM: Final = _HEADER.size - 4
_CUTS: Final[tuple[Literal["", "start", "end"], ...]] = ("", "start", "end")
_CUT_MASK: Final = 0b011
_HAS_SCALE: Final = 0b100

_VERSION: Final = re.compile(r"sha256:([0-9a-f]{64})")
_SHORT_PROMPT: Final = 4096
"""Characters. Digests of longer prompts are not kept, so that senders cannot fill the memory with them."""


class CachedVector(msgspec.Struct, frozen=True, gc=False):
    """One vector in wire form: little-endian bytes of its dtype, as `vectors.quantize` makes them.

    `truncated` says which end of the text was cut, if any; the entry answers only those who allow that.
    """

    tokens: int
    truncated: Literal["", "start", "end"]
    scale: float | None
    vector: bytes


def cache_key(model_version: str, text: Text, dimensions: int, dtype: str) -> bytes:
    """The Redis key of one vector: of all that the model sees of the input, but for `truncate`, which the entry holds.

    Two keys are equal exactly if version, text, prompt, window (`chunk.tokens`, of a mean over windows), dimensions and
    dtype are: each part has a fixed length or cannot hold a colon, and only a key with a window has one part more.

    Raises:
        ValueError: `model_version` is not `sha256:` and 64 hex digits, or the text holds a lone surrogate.
    """
    prompt = text.prompt
    frame = _frame if len(prompt) <= _SHORT_PROMPT else _frame.__wrapped__
    head, tail = frame(
        model_version, prompt, dimensions, dtype, None if text.chunk is None else text.chunk.tokens
    )
    return head + sha256(text.text.encode()).hexdigest().encode() + tail


@lru_cache(maxsize=512)
def _frame(
    model_version: str, prompt: str, dimensions: int, dtype: str, window: int | None
) -> tuple[bytes, bytes]:
    version = _VERSION.fullmatch(model_version)
    if version is None:
        raise ValueError("model_version: expected sha256: and 64 hex digits")
    mean = "" if window is None else f":mean{window}"
    tail = f":{sha256(prompt.encode()).hexdigest()}{mean}:{dimensions}:{dtype}"
    return f"embedq:v1:{version[1]}:".encode(), tail.encode()


def pack(key: bytes, entry: CachedVector) -> bytes:
    """The value that Redis keeps for this key."""
    flags = _CUTS.index(entry.truncated) | (_HAS_SCALE if entry.scale is not None else 0)
    header = _HEADER.pack(_MAGIC, flags, entry.tokens, entry.scale or 0.0, 0)[:_BEFORE_CHECKSUM]
    return b"".join((header, _checksum(key, header, entry.vector).to_bytes(4, "little"), entry.vector))


def unpack(key: bytes, value: bytes) -> CachedVector | None:
    """What `pack` made for this very key, or None if `value` is anything else."""
    if len(value) != _HEADER.size + _entry_bytes(key):
        return None
    magic, flags, tokens, scale, checksum = _HEADER.unpack_from(value)
    vector = value[_HEADER.size :]
    cut = flags & _CUT_MASK
    if (
        magic != _MAGIC
        or cut >= len(_CUTS)
        or flags & ~(_CUT_MASK | _HAS_SCALE)
        or checksum != _checksum(key, value[:_BEFORE_CHECKSUM], vector)
    ):
        return None
    return CachedVector(tokens, _CUTS[cut], scale if flags & _HAS_SCALE else None, vector)


def _checksum(key: bytes, header: bytes, vector: bytes) -> int:
    return zlib.crc32(vector, zlib.crc32(header, zlib.crc32(key)))


def _entry_bytes(key: bytes) -> int:
    """Bytes of the vector that this key asks for."""
    _, dimensions, dtype = key.rsplit(b":", 2)
    return _wire_bytes(dimensions, dtype)


@lru_cache(maxsize=4096)
def _wire_bytes(dimensions: bytes, dtype: bytes) -> int:
    return vector_bytes(int(dimensions), cast(Dtype, dtype.decode()))


class VectorCache:
    """Looks vectors up in Redis and keeps new ones there, and costs nobody more than a time-out when it cannot.

    `timeout_s` bounds each round trip, plus what its bytes need at `BYTES_PER_SECOND`; a round trip that must first
    connect has `connect_timeout_s` more. After a few failures in a row the breaker opens and every look-up is a miss
    at once. The entries of each write live for `ttl_s` ± 10 %, so that they do not expire together.

    Raises:
        ValueError: `url` is not an address that redis-py understands.
    """

    def __init__(
        self,
        url: str | None,
        *,
        metrics: Metrics,
        ttl_s: float,
        timeout_s: float = 0.05,
        connect_timeout_s: float = 0.5,
        connections: int = 4,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._metrics = metrics
        self._ttl_ms = ttl_s * 1000
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._breaker = breaker or CircuitBreaker()
        self._connections: list[AbstractConnection] = []
        self._idle: asyncio.LifoQueue[AbstractConnection] = asyncio.LifoQueue()
        self._open = False
        if url:
            # Only for its parsing of addresses: redis-py's pool may lose a connection when a release is cancelled.
            # RESP2, since the default RESP3 brings push messages that a cache has no use for. No time-outs of
            # redis-py's own: one deadline spans a whole round trip. No driver_info: finding its version reads files.
            makes = ConnectionPool.from_url(
                url,
                protocol=2,
                socket_timeout=None,
                socket_connect_timeout=None,
                health_check_interval=0,
                driver_info=None,
            )
            self._connections = [makes.make_connection() for _ in range(connections)]  # type: ignore[no-untyped-call]

    async def open(self) -> None:
        """Start answering. Never fails because Redis does; the log says whether it was there."""
        for connection in self._connections:
            self._idle.put_nowait(connection)
        self._open = bool(self._connections)
        if self._open and await self._trip("ping", [(b"PING",)], 0) is None:
            log.warning("cache_unreachable")

    async def close(self) -> None:
        """Close every connection; from now on each look-up is a bypass."""
        self._open = False
        for connection in self._connections:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.disconnect()
            except _FAILURES:
                continue  # it is closed all the same; only the peer's farewell is missing

    async def get_many(self, keys: Sequence[bytes]) -> list[CachedVector | None]:
        """The entry of each key, in order, or None where there is none to be had. Never raises.

        One MGET, or one for every `CHUNK_BYTES` of vectors. The first chunk that fails ends the look-up, so that a
        dead Redis costs one time-out however many keys there are.
        """
        entries: list[CachedVector | None] = [None] * len(keys)
        if not self._open:
            self._count(bypass=len(keys))
            return entries
        for start, end, size in _chunks([_entry_bytes(key) for key in keys]):
            chunk = keys[start:end]
            replies = await self._trip("get", [(b"MGET", *chunk)], size)
            if replies is None:
                self._count(error=len(keys) - start)
                break
            misses = corrupt = 0
            for at, (key, value) in enumerate(zip(chunk, replies[0], strict=True), start):
                if value is None:
                    misses += 1
                elif (entry := unpack(key, value)) is None:
                    corrupt += 1
                else:
                    entries[at] = entry
            self._count(hit=len(chunk) - misses - corrupt, miss=misses, corrupt=corrupt)
        return entries

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> None:
        """Keep these entries, as far as Redis takes them, over what it had for these keys. Never raises.

        One pipelined write, or one for every `CHUNK_BYTES` of vectors; the first that fails ends it.
        """
        if not self._open:
            self._count_writes(bypass=len(items))
            return
        for start, end, size in _chunks([len(entry.vector) for _, entry in items]):
            commands: list[tuple[bytes, ...]] = [
                (b"SET", key, pack(key, entry), b"PX", self._jittered_ttl())
                for key, entry in items[start:end]
            ]
            replies = await self._trip("put", commands, size)
            if replies is None:
                self._count_writes(error=len(items) - start)
                break
            taken = replies.count(b"OK")
            self._count_writes(ok=taken, error=len(replies) - taken)

    async def _trip(self, operation: str, commands: list[tuple[bytes, ...]], size: int) -> list[Any] | None:
        """One reply for each command, all sent in one write; None if the breaker is open or the round trip failed."""
        before = self._breaker.state
        admission = self._breaker.admit(time.monotonic())
        if admission is None:
            return None
        began = time.perf_counter()
        failure = "cancelled"
        try:
            replies = await self._exchange(commands, self._timeout_s + size / BYTES_PER_SECOND)
            failure = ""
        except _FAILURES as error:
            failure = type(error).__name__  # not its message, which may quote what was sent
            return None
        else:
            return replies
        finally:
            if not failure:
                self._breaker.succeeded(admission)
            elif failure == "cancelled":
                self._breaker.abandoned(admission)
            else:
                self._breaker.failed(admission, time.monotonic())
            self._metrics.cache_seconds.labels(operation).observe(time.perf_counter() - began)
            self._tell(before, failure)

    async def _exchange(self, commands: list[tuple[bytes, ...]], timeout_s: float) -> list[Any]:
        async with _Deadline(timeout_s) as deadline:
            connection = await self._idle.get()
            whole = False
            try:
                if fresh := not connection.is_connected:
                    deadline.extend(self._connect_timeout_s)
                try:
                    replies = await _converse(connection, commands)
                except RedisConnectionError:
                    if fresh:
                        raise
                    # Redis was restarted, or closed a connection that it thought idle: not a failure yet.
                    await connection.disconnect(nowait=True)
                    deadline.extend(self._connect_timeout_s)
                    replies = await _converse(connection, commands)
                whole = True
            finally:
                # Nothing below can be suspended, so that not even a second cancellation comes in between.
                if not whole:
                    await connection.disconnect(nowait=True)
                self._idle.put_nowait(connection)
        return replies

    def _jittered_ttl(self) -> bytes:
        return b"%d" % max(1, self._ttl_ms * random.uniform(0.9, 1.1))

    def _tell(self, before: State, failure: str) -> None:
        after = self._breaker.state
        self._metrics.cache_open.set(after != "closed")
        if before == "closed" and after == "open":
            log.warning("cache_breaker_opened", error=failure)
        elif before != "closed" and after == "closed":
            log.info("cache_breaker_closed")

    def _count(self, **outcomes: int) -> None:
        for outcome, number in outcomes.items():
            if number:
                self._metrics.cache.labels(outcome).inc(number)

    def _count_writes(self, **outcomes: int) -> None:
        for outcome, number in outcomes.items():
            if number:
                self._metrics.cache_writes.labels(outcome).inc(number)


async def _converse(connection: AbstractConnection, commands: list[tuple[bytes, ...]]) -> list[Any]:
    """Send all, then read as many replies.

    That Redis refuses a SET is a reply too, since it may be full and yet answer look-ups. Any other command that it
    refuses, or answers in another form than asked, has failed.
    """
    await connection.connect()  # type: ignore[no-untyped-call]
    await connection.send_packed_command(connection.pack_commands(commands))
    replies: list[Any] = []
    for name, *arguments in commands:
        try:
            reply = await connection.read_response()
        except ResponseError as refusal:
            if name != b"SET":
                raise
            reply = refusal
        if name == b"MGET" and not (isinstance(reply, list) and len(reply) == len(arguments)):
            raise InvalidResponse("MGET: expected one value for each key")
        replies.append(reply)
    return replies


class _Deadline:
    """`asyncio.timeout`, but Redis is not charged for the event loop's own stalls.

    A loop that was held up finds the reply and the deadline due in one and the same turn, and plain `timeout` lets the
    deadline win. Here a deadline that fires late is put off once more, by as much as it was late.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds, self._due)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def extend(self, seconds: float) -> None:
        when = self._timer.when() + seconds
        self._timer.cancel()
        self._timer = self._loop.call_at(when, self._due)

    def _due(self) -> None:
        now = self._loop.time()
        self._timeout.reschedule(now + min(now - self._timer.when(), self._seconds))


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, end, bytes) of consecutive runs of at most `CHUNK_BYTES`, or of one entry that is larger."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and total + size > CHUNK_BYTES:
            yield start, at, total
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes), total
