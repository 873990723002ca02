"""The cache over a link that keeps a dictionary, or fails as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from embedq_consumer.cache.circuit_breaker import CircuitBreaker
from embedq_consumer.cache.entries import OVERHEAD_BYTES, CachedVector, EntryCodec, cache_key
from embedq_consumer.cache.link import Command, LinkFailed, Reason, Refusal
from embedq_consumer.cache.redis_link import RedisOptions
from embedq_consumer.cache.vector_cache import BYTES_PER_SECOND, CHUNK_BYTES, CacheOptions, VectorCache
from embedq_consumer.engine import Text
from embedq_consumer.telemetry.metrics import Metrics
from tests.helpers.metric_values import sample_value

VERSION = "sha256:" + "d" * 64
NOWHERE = RedisOptions(url="")
OPTIONS = CacheOptions(redis=NOWHERE, ttl_s=100, timeout_s=2.0)
CODEC = EntryCodec(b"a secret of this test alone")


def key(text: str, dimensions: int = 8) -> bytes:
    return cache_key(VERSION, Text(text), dimensions, "float32")


def unit(dimensions: int) -> bytes:
    return np.full(dimensions, dimensions**-0.5, "<f4").tobytes()


def entry(text: str, dimensions: int = 8) -> CachedVector:
    return CachedVector(tokens=len(text), truncated="", scale=None, vector=unit(dimensions))


def items(*texts: str, dimensions: int = 8) -> list[tuple[bytes, CachedVector]]:
    return [(key(text, dimensions), entry(text, dimensions)) for text in texts]


def carried(dimensions: int) -> int:
    """Bytes that an entry costs a round trip: vector, header, key and framing."""
    return 4 * dimensions + OVERHEAD_BYTES + 256


class FakeLink:
    """A Redis in a dictionary, and what was asked of it."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.asked: list[tuple[list[Command], float]] = []
        self.failure: LinkFailed | None = None
        self.refuses_writes = False
        self.refusal = "OOM"
        self.hangs = False
        self.closed_within: float | None = None

    async def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        self.asked.append((list(commands), timeout_s))
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return [self._reply(command) for command in commands]

    def _reply(self, command: Command) -> Any:
        match command:
            case [b"MGET", *keys]:
                return [self.kept.get(key) for key in keys]
            case [b"SET", key, value, b"PX", _] if not self.refuses_writes:
                self.kept[key] = value
                return b"OK"
            case [b"SET", *_]:
                return Refusal(self.refusal)
            case [b"PING"]:
                return b"PONG"
        raise AssertionError(f"not a command of the cache: {command}")

    async def close(self, timeout_s: float) -> None:
        self.closed_within = timeout_s

    def names(self) -> list[bytes]:
        """The command of each round trip after `open`."""
        return [commands[0][0] for commands, _ in self.asked[1:]]


class Opened:
    """An open cache, its link, and what its metrics say."""

    def __init__(
        self,
        *,
        failures: int = 3,
        pause_s: float = 3600,
        longest_pause_s: float = 3600,
        options: CacheOptions = OPTIONS,
    ) -> None:
        self.link = FakeLink()
        self.metrics = Metrics()
        self.breaker = CircuitBreaker(failures=failures, pause_s=pause_s, longest_pause_s=longest_pause_s)
        self.cache = VectorCache(options, CODEC, self.metrics, link=self.link, breaker=self.breaker)

    async def open(self) -> Opened:
        await self.cache.open()
        return self

    def sample(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)

    def lookups(self) -> dict[str, float]:
        """The outcomes that were counted at all."""
        found = {
            name: self.sample("cache_lookups_total", outcome=name)
            for name in ("hit", "miss", "corrupt", "error", "bypass")
        }
        return {name: value for name, value in found.items() if value}

    def writes(self) -> dict[str, float]:
        found = {name: self.sample("cache_writes_total", outcome=name) for name in ("ok", "error", "bypass")}
        return {name: value for name, value in found.items() if value}


async def test_what_was_put_is_found_and_the_rest_is_missed() -> None:
    one = await Opened().open()
    await one.cache.put_many(items("a", "c"))
    assert await one.cache.get_many([key("a"), key("b"), key("c")]) == [entry("a"), None, entry("c")]
    assert one.lookups() == {"hit": 2, "miss": 1}
    assert one.writes() == {"ok": 2}


async def test_a_damaged_value_is_corrupt_and_not_believed() -> None:
    one = await Opened().open()
    one.link.kept[key("a")] = CODEC.pack(key("b"), entry("a"))
    assert await one.cache.get_many([key("a")]) == [None]
    assert one.lookups() == {"corrupt": 1}


async def test_each_value_that_is_not_believed_is_counted_by_its_reason() -> None:
    one = await Opened().open()
    own = CODEC.pack(key("a"), entry("a"))
    one.link.kept[key("short")] = own[:-1]
    one.link.kept[key("old")] = b"EQV1" + own[4:]
    one.link.kept[key("foreign")] = EntryCodec(b"somebody else's secret").pack(key("foreign"), entry("a"))
    wrong = CachedVector(tokens=1, truncated="", scale=None, vector=b"\xff" * 32)  # NaN eight times
    one.link.kept[key("nan")] = CODEC.pack(key("nan"), wrong)
    names = [key(text) for text in ("short", "old", "foreign", "nan", "none")]
    assert await one.cache.get_many(names) == [None] * 5
    assert one.lookups() == {"miss": 1, "corrupt": 4}
    reasons = ("size", "format", "signature", "values")
    assert [one.sample("cache_corrupt_total", reason=reason) for reason in reasons] == [1, 1, 1, 1]


async def test_a_look_up_that_no_job_asks_for_counts_as_neither_hit_nor_miss() -> None:
    one = await Opened().open()
    assert await one.cache.put_many(items("a")) == 1
    assert await one.cache.get_many([key("a"), key("b")], counted=False) == [entry("a"), None]
    assert one.lookups() == {}


async def test_nothing_asked_is_nothing_sent() -> None:
    one = await Opened().open()
    assert await one.cache.get_many([]) == []
    await one.cache.put_many([])
    assert one.link.names() == []


async def test_a_write_that_redis_refuses_is_an_error_but_no_failure_of_the_link() -> None:
    one = await Opened(failures=1).open()
    one.link.refuses_writes = True
    assert await one.cache.put_many(items("a", "b")) == 0
    assert one.writes() == {"error": 2}
    assert one.breaker.state == "closed"


async def test_refused_writes_are_logged_once_and_once_more_when_they_are_taken_again() -> None:
    one = await Opened().open()
    with capture_logs() as logs:
        for code in ("NOPERM", "NOPERM", "READONLY"):
            one.link.refuses_writes, one.link.refusal = True, code
            await one.cache.put_many(items("a", "b"))
        one.link.refuses_writes = False
        await one.cache.put_many(items("a"))
        await one.cache.put_many(items("a"))
    assert [(line["event"], line.get("error")) for line in logs] == [
        ("cache_writes_refused", "NOPERM"),
        ("cache_writes_refused", "READONLY"),
        ("cache_writes_accepted", None),
    ]
    assert "+set" in logs[0]["hint"]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("password", "EMBEDQ_REDIS_PASSWORD"),
        ("permission", "+mget"),
        ("tls", "EMBEDQ_REDIS_SSL_CAFILE"),
        ("protocol", "not Redis"),
    ],
)
async def test_what_does_not_pass_by_itself_is_logged_at_once_by_what_to_look_at_and_only_once(
    reason: Reason, words: str
) -> None:
    one = await Opened(failures=5, pause_s=0).open()
    one.link.failure = LinkFailed("TheKind", reason)
    with capture_logs() as logs:
        for _ in range(4):
            assert await one.cache.get_many([key("a")]) == [None]
        one.link.failure = None
        await one.cache.get_many([key("a")])
        await one.cache.get_many([key("a")])
    assert [line["event"] for line in logs] == ["cache_unreachable", "cache_reachable"]
    assert (logs[0]["error"], logs[0]["reason"]) == ("TheKind", reason)
    assert words in logs[0]["hint"]
    assert one.sample("cache_failures_total", reason=reason) == 4


async def test_another_reason_while_the_breaker_is_open_is_logged_too() -> None:
    one = await Opened(failures=1, pause_s=0).open()
    one.link.failure = LinkFailed("ConnectionError", "connection")
    with capture_logs() as logs:
        await one.cache.get_many([key("a")])
        one.link.failure = LinkFailed("AuthenticationError", "password")
        await one.cache.get_many([key("a")])
        await one.cache.get_many([key("a")])
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("cache_breaker_opened", "connection"),
        ("cache_unreachable", "password"),
    ]


async def test_one_time_out_is_not_logged() -> None:
    one = await Opened().open()
    one.link.failure = LinkFailed("TimeoutError", "timeout")
    with capture_logs() as logs:
        await one.cache.get_many([key("a")])
        one.link.failure = None
        await one.cache.get_many([key("a")])
    assert logs == []
    assert one.sample("cache_failures_total", reason="timeout") == 1


async def test_a_large_look_up_goes_in_chunks_and_the_first_that_fails_ends_it() -> None:
    one = await Opened().open()
    per_chunk = CHUNK_BYTES // carried(4096)
    keys = [key(str(n), 4096) for n in range(3 * per_chunk)]
    assert await one.cache.get_many(keys) == [None] * len(keys)
    assert one.link.names() == [b"MGET"] * 3
    one.link.failure = LinkFailed("TimeoutError")
    assert await one.cache.get_many(keys) == [None] * len(keys)
    assert one.link.names() == [b"MGET"] * 4
    assert one.lookups() == {"miss": len(keys), "error": len(keys)}


async def test_a_large_write_goes_in_chunks_and_the_first_that_fails_ends_it() -> None:
    one = await Opened().open()
    per_chunk = CHUNK_BYTES // carried(4096)
    many = items(*(str(n) for n in range(3 * per_chunk)), dimensions=4096)
    await one.cache.put_many(many)
    assert [len(commands) for commands, _ in one.link.asked[1:]] == [per_chunk] * 3
    one.link.failure = LinkFailed("TimeoutError")
    await one.cache.put_many(many)
    assert one.link.names() == [b"SET"] * 4
    assert one.writes() == {"ok": len(many), "error": len(many)}


async def test_a_chunk_that_succeeded_before_one_that_failed_is_kept() -> None:
    one = await Opened().open()
    await one.cache.put_many(items("a", dimensions=4096))
    per_chunk = CHUNK_BYTES // carried(4096)
    keys = [key("a", 4096), *(key(str(n), 4096) for n in range(per_chunk))]
    answered = one.link.exchange

    async def once(commands: Sequence[Command], timeout_s: float) -> list[Any]:
        replies = await answered(commands, timeout_s)
        one.link.failure = LinkFailed("TimeoutError")
        return replies

    one.link.exchange = once  # type: ignore[method-assign]
    assert await one.cache.get_many(keys) == [entry("a", 4096)] + [None] * per_chunk
    assert one.lookups() == {"hit": 1, "miss": per_chunk - 1, "error": 1}


async def test_a_round_trip_may_take_longer_for_what_it_carries() -> None:
    one = await Opened().open()
    await one.cache.put_many(items("a", dimensions=4096))
    await one.cache.get_many([key("a", 4096)])
    allowed = OPTIONS.timeout_s + carried(4096) / BYTES_PER_SECOND
    assert [timeout_s for _, timeout_s in one.link.asked] == [OPTIONS.timeout_s, allowed, allowed]


async def test_entries_expire_within_a_tenth_of_the_ttl_and_not_together() -> None:
    one = await Opened().open()
    await one.cache.put_many(items(*(str(n) for n in range(200))))
    (commands, _) = one.link.asked[1]
    expiries = [int(command[4]) for command in commands]
    assert all(90_000 <= ms <= 110_000 for ms in expiries)
    assert max(expiries) - min(expiries) > 5_000


async def test_an_entry_lives_for_a_millisecond_at_least() -> None:
    one = await Opened(options=CacheOptions(redis=NOWHERE, ttl_s=0.0001)).open()
    await one.cache.put_many(items("a"))
    assert one.link.asked[1][0][0][3:] == (b"PX", b"1")


async def test_after_failures_in_a_row_the_breaker_leaves_redis_alone_and_says_so() -> None:
    one = await Opened(failures=2).open()
    one.link.failure = LinkFailed("ConnectionError")
    with capture_logs() as logs:
        for _ in range(4):
            assert await one.cache.get_many([key("a")]) == [None]
        await one.cache.put_many(items("a"))
    assert one.link.names() == [b"MGET"] * 2
    assert one.lookups() == {"error": 4}
    assert one.writes() == {"error": 1}
    assert one.sample("cache_breaker_open") == 1
    assert [(line["event"], line["error"]) for line in logs] == [("cache_breaker_opened", "ConnectionError")]
    assert one.sample("cache_failures_total", reason="connection") == 2


async def test_a_breaker_that_many_look_ups_open_at_once_is_logged_once() -> None:
    one = await Opened(failures=2).open()
    one.link.failure = LinkFailed("TimeoutError")
    with capture_logs() as logs:
        await asyncio.gather(*(one.cache.get_many([key("a")]) for _ in range(8)))
    assert [line["event"] for line in logs] == ["cache_breaker_opened"]


async def test_a_breaker_that_opens_again_and_again_is_logged_once() -> None:
    one = await Opened(failures=1, pause_s=0).open()
    with capture_logs() as logs:
        for _ in range(3):
            one.link.failure = LinkFailed("TimeoutError")
            await one.cache.get_many([key("a")])
            one.link.failure = None
            await one.cache.get_many([key("a")])
    assert [line["event"] for line in logs] == ["cache_breaker_opened"]
    assert one.sample("cache_breaker_open") == 0


async def test_a_probe_that_succeeds_closes_the_breaker_and_says_so() -> None:
    one = await Opened(failures=1, pause_s=0, longest_pause_s=0).open()
    one.link.failure = LinkFailed("ConnectionError")
    await one.cache.get_many([key("a")])
    await one.cache.get_many([key("a")])  # a probe that fails
    assert one.sample("cache_breaker_open") == 1
    one.link.failure = None
    with capture_logs() as logs:
        await one.cache.put_many(items("a"))
    assert [line["event"] for line in logs] == ["cache_breaker_closed"]
    assert one.sample("cache_breaker_open") == 0
    assert await one.cache.get_many([key("a")]) == [entry("a")]


async def test_a_cancelled_probe_leaves_the_next_caller_to_probe() -> None:
    one = await Opened(failures=1, pause_s=0).open()
    one.link.failure = LinkFailed("ConnectionError")
    await one.cache.get_many([key("a")])
    one.link.failure, one.link.hangs = None, True
    probe = asyncio.ensure_future(one.cache.get_many([key("a")]))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert one.sample("cache_breaker_open") == 1
    one.link.hangs = False
    await one.cache.get_many([key("a")])
    assert one.sample("cache_breaker_open") == 0


async def test_each_round_trip_is_timed_by_its_operation() -> None:
    one = await Opened().open()
    await one.cache.put_many(items("a"))
    one.link.failure = LinkFailed("TimeoutError")
    await one.cache.get_many([key("a")])
    counts = {name: one.sample("cache_seconds_count", operation=name) for name in ("ping", "put", "get")}
    assert counts == {"ping": 1, "put": 1, "get": 1}


async def test_an_unreachable_redis_is_logged_at_the_start_and_is_no_error() -> None:
    one = Opened()
    one.link.failure = LinkFailed("ConnectionError")
    with capture_logs() as logs:
        await one.cache.open()
    assert [line["event"] for line in logs] == ["cache_unreachable"]


async def test_before_open_and_after_close_everything_is_a_bypass() -> None:
    one = Opened()
    assert await one.cache.get_many([key("a")]) == [None]
    await one.cache.open()
    await one.cache.close()
    assert one.link.closed_within == OPTIONS.timeout_s
    assert await one.cache.get_many([key("a"), key("b")]) == [None, None]
    await one.cache.put_many(items("a"))
    assert one.lookups() == {"bypass": 3}
    assert one.writes() == {"bypass": 1}


async def test_without_an_address_everything_is_a_bypass() -> None:
    metrics = Metrics()
    cache = VectorCache(CacheOptions(redis=NOWHERE, ttl_s=1), CODEC, metrics)
    await cache.open()
    assert await cache.get_many([key("a")]) == [None]
    await cache.close()
    assert sample_value(metrics.registry, "embedq_cache_lookups_total", {"outcome": "bypass"}) == 1


def test_an_address_that_redis_does_not_have_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="redis://"):
        VectorCache(CacheOptions(redis=RedisOptions(url="localhost:6379"), ttl_s=1), CODEC, Metrics())
