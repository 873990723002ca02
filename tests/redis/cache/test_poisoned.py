"""A Redis that others write to, or that is none: every answer is a miss, counted, and nothing else ever happens."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_consumer.cache.circuit_breaker import CircuitBreaker
from embedq_consumer.cache.entries import CachedVector, EntryCodec, cache_key
from embedq_consumer.cache.redis_link import RedisOptions
from embedq_consumer.cache.vector_cache import CacheOptions, VectorCache
from embedq_consumer.engine import Text
from embedq_consumer.telemetry.metrics import Metrics
from tests.helpers.hostile_redis import HOSTILE, HostileRedis, hostile_redis
from tests.helpers.metric_values import sample_value
from tests.helpers.redis_process import RedisProcess

VERSION = "sha256:" + "e" * 64
CODEC = EntryCodec(b"the secret of these replicas")


def key(text: str = "a", dimensions: int = 32) -> bytes:
    return cache_key(VERSION, Text(text), dimensions, "float32")


def entry(*numbers: float, dimensions: int = 32) -> CachedVector:
    vector = np.array([*numbers, *[0.0] * (dimensions - len(numbers))], "<f4")
    return CachedVector(tokens=1, truncated="", scale=None, vector=vector.tobytes())


class Opened:
    """A cache and what it counted."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, connections: int = 4) -> None:
        self.metrics = Metrics()
        self.breaker = CircuitBreaker(failures=3, pause_s=0, jitter=0)
        options = CacheOptions(
            redis=RedisOptions(url=url), ttl_s=100, timeout_s=timeout_s, connections=connections
        )
        self.cache = VectorCache(options, CODEC, self.metrics, breaker=self.breaker)

    def count(self, name: str, **labels: str) -> float:
        found = sample_value(self.metrics.registry, f"embedq_{name}", labels)
        assert found is not None
        return found


@pytest.fixture
async def one(redis: RedisProcess) -> AsyncIterator[Opened]:
    opened = Opened(redis.url)
    await opened.cache.open()
    yield opened
    await opened.cache.close()


@pytest.fixture
async def hostile() -> AsyncIterator[HostileRedis]:
    async with hostile_redis() as server:
        yield server


# -- a real Redis to which somebody else writes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (EntryCodec(b"somebody else's secret").pack(key(), entry(0.6, 0.8)), "signature"),
        (CODEC.pack(key("b"), entry(0.6, 0.8)), "signature"),
        (CODEC.pack(key(), entry(float("nan"))), "values"),
        (CODEC.pack(key(), entry(1e38, 1e38)), "values"),
        (CODEC.pack(key(), entry()), "values"),
        (CODEC.pack(key(dimensions=64), entry(1.0, dimensions=64)), "size"),
        (b"EQV1" + bytes(160), "format"),
        (b"x" * (3 << 20), "size"),
    ],
    ids=["foreign", "copied", "nan", "1e38", "zero", "other dimensions", "old", "3 MiB"],
)
async def test_what_another_client_put_under_a_key_is_a_miss_by_its_reason_and_is_replaced(
    redis: RedisProcess, one: Opened, value: bytes, reason: str
) -> None:
    own = entry(1.0)
    assert redis.command("SET", key(), value) == b"+OK\r\n"
    assert await one.cache.get_many([key(), key("none")]) == [None, None]
    assert one.count("cache_lookups_total", outcome="corrupt") == 1
    assert one.count("cache_corrupt_total", reason=reason) == 1
    await one.cache.put_many([(key(), own)])
    assert await one.cache.get_many([key()]) == [own]


@pytest.mark.parametrize(
    "command",
    [
        ("LPUSH", key(), "x"),
        ("HSET", key(), "field", "value"),
        ("ZADD", key(), "1", "member"),
        ("XADD", key(), "*", "field", "value"),
        ("EVAL", "redis.call('SETRANGE', KEYS[1], 100, 'x')", "1", key()),
        ("SETBIT", key(), "7", "1"),
        ("APPEND", key(), "1"),
        ("INCR", key()),
    ],
    ids=lambda command: command[0],
)
async def test_any_kind_of_value_is_a_miss_and_is_replaced(
    redis: RedisProcess, one: Opened, command: tuple[str | bytes, ...]
) -> None:
    assert not redis.command(*command).startswith(b"-")
    assert await one.cache.get_many([key()]) == [None]
    assert one.count("cache_lookups_total", outcome="hit") == 0
    assert one.breaker.state == "closed"
    await one.cache.put_many([(key(), entry(1.0))])
    assert await one.cache.get_many([key()]) == [entry(1.0)]


async def test_a_value_of_64_mib_fails_the_look_up_within_bounds_and_is_replaced(
    redis: RedisProcess, one: Opened
) -> None:
    """More than an answer may have: counted as a failure, and the write that follows puts things right."""
    script = "redis.call('SET', KEYS[1], string.rep('x', 64 * 1024 * 1024))"
    redis.command("EVAL", script, "1", key())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert await one.cache.get_many([key()]) == [None]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
    assert one.count("cache_failures_total", reason="protocol") == 1
    await one.cache.put_many([(key(), entry(1.0))])
    assert await one.cache.get_many([key()]) == [entry(1.0)]


async def test_replicas_with_other_secrets_do_not_believe_each_other_and_go_on(
    redis: RedisProcess, one: Opened
) -> None:
    other = VectorCache(
        CacheOptions(redis=RedisOptions(url=redis.url), ttl_s=100, timeout_s=5.0),
        EntryCodec(b"made by this process"),
        Metrics(),
    )
    await other.open()
    await other.put_many([(key(), entry(1.0))])
    assert await one.cache.get_many([key()]) == [None]
    assert await other.get_many([key()]) == [entry(1.0)]
    await other.close()


# -- what no real Redis does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("hangs_up", [False, True])
async def test_an_answer_that_is_none_is_a_failure_that_the_breaker_sees_and_nothing_else(
    hostile: HostileRedis, name: str, hangs_up: bool
) -> None:
    hostile.answer, hostile.hangs_up = HOSTILE[name], hangs_up
    # Zeros without an end of line are the one answer that is still waited for.
    one = Opened(hostile.url, timeout_s=0.5 if name == "zeros" and not hangs_up else 5.0)
    await one.cache.open()
    for _ in range(3):
        assert await one.cache.get_many([key("a"), key("b")]) == [None, None]
    assert one.count("cache_lookups_total", outcome="error") == 6
    assert one.count("cache_breaker_open") == 1
    hostile.answer, hostile.hangs_up = HostileRedis().answer, False
    assert await one.cache.get_many([key("a")]) == [None]
    assert one.count("cache_breaker_open") == 0
    assert one.count("cache_lookups_total", outcome="miss") == 1
    await one.cache.close()


@pytest.mark.parametrize(
    "half",
    [b"", b"*2", b"*2\r\n$-1\r\n", b"*2\r\n$164\r\nEQV2"],
    ids=["silence", "head", "one value", "half a value"],
)
async def test_half_an_answer_and_then_silence_costs_one_time_out(hostile: HostileRedis, half: bytes) -> None:
    hostile.answer = lambda keys: half
    one = Opened(hostile.url, timeout_s=0.1)
    await one.cache.open()
    assert await one.cache.get_many([key("a"), key("b")]) == [None, None]
    assert one.count("cache_failures_total", reason="timeout") == 1
    await one.cache.close()


async def test_an_answer_to_a_write_that_is_none_is_counted_too(hostile: HostileRedis) -> None:
    hostile.answer_to_set = b"*1\r\n*1\r\n:1\r\n"
    one = Opened(hostile.url)
    await one.cache.open()
    await one.cache.put_many([(key(), entry(1.0))])
    assert one.count("cache_writes_total", outcome="error") == 1
    assert one.count("cache_failures_total", reason="protocol") == 1
    await one.cache.close()


pieces = st.sampled_from(
    [
        b"*1\r\n",
        b"*2\r\n",
        b"$-1\r\n",
        b"$3\r\n",
        b"abc\r\n",
        b":1\r\n",
        b"-ERR x\r\n",
        b"+OK\r\n",
        b"\r\n",
        b">1\r\n",
        b"_\r\n",
    ]
)


def test_no_answer_raises() -> None:
    """Fuzzed over real connections of one cache. The server hangs up, so that half an answer costs no time."""

    async def start() -> tuple[HostileRedis, Opened]:
        hostile = await stack.enter_async_context(hostile_redis())
        one = Opened(hostile.url, connections=1)
        await one.cache.open()
        stack.push_async_callback(one.cache.close)
        return hostile, one

    async def ask(answer: bytes) -> None:
        hostile.answer, hostile.hangs_up = lambda keys: answer, True
        found = await one.cache.get_many([key("a"), key("b")])
        assert found == [None, None]
        asked.append(answer)
        counted = [one.count("cache_lookups_total", outcome=name) for name in ("miss", "corrupt", "error")]
        assert sum(counted) == 2 * len(asked)

    @given(answer=st.lists(pieces | st.binary(max_size=20), max_size=12).map(b"".join))
    @settings(max_examples=100)
    def fuzz(answer: bytes) -> None:
        runner.run(ask(answer))

    asked: list[bytes] = []
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        hostile, one = runner.run(start())
        fuzz()
        runner.run(stack.aclose())
