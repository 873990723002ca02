"""The cache against a real Redis: healthy, absent, frozen, killed, lying."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from embedq_consumer.cache.circuit_breaker import CircuitBreaker
from embedq_consumer.cache.entries import OVERHEAD_BYTES, CachedVector, EntryCodec, cache_key
from embedq_consumer.cache.redis_link import RedisOptions
from embedq_consumer.cache.vector_cache import CHUNK_BYTES, CacheOptions, VectorCache
from embedq_consumer.engine import Text
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.vectors import cut_and_normalize
from tests.helpers.metric_values import sample_value
from tests.helpers.redis_process import RedisProcess
from tests.helpers.support import wait_until

VERSION = "sha256:" + "c" * 64
CODEC = EntryCodec(b"a secret of this test alone")


def key(text: str, *, dimensions: int = 32) -> bytes:
    return cache_key(VERSION, Text(text), dimensions, "float32")


@functools.cache
def entry(text: str, *, dimensions: int = 32) -> CachedVector:
    """A vector that tells whose it is."""
    seed = np.random.default_rng(list(text.encode()))
    vector = cut_and_normalize(seed.standard_normal(dimensions, np.float32), dimensions)
    return CachedVector(tokens=len(text), truncated="", scale=None, vector=vector.tobytes())


def items(texts: Sequence[str], *, dimensions: int = 32) -> list[tuple[bytes, CachedVector]]:
    return [(key(text, dimensions=dimensions), entry(text, dimensions=dimensions)) for text in texts]


class Opened:
    """A cache, and what its metrics say."""

    def __init__(self, url: str, *, breaker: CircuitBreaker | None = None, **options: Any) -> None:
        self.metrics = Metrics()
        # Long enough that a busy test machine is not taken for a slow Redis; the pauses short, so tests need not wait.
        breaker = breaker or CircuitBreaker(failures=3, pause_s=0.01, longest_pause_s=0.05)
        settings = CacheOptions(redis=RedisOptions(url=url), **{"ttl_s": 100, "timeout_s": 5.0} | options)
        self.cache = VectorCache(settings, CODEC, self.metrics, breaker=breaker)

    def _sample(self, name: str, **labels: str) -> float:
        value = sample_value(self.metrics.registry, f"embedq_{name}", labels)
        assert value is not None, name
        return value

    def lookups(self, outcome: str) -> float:
        return self._sample("cache_lookups_total", outcome=outcome)

    def writes(self, outcome: str) -> float:
        return self._sample("cache_writes_total", outcome=outcome)

    def breaker_is_open(self) -> bool:
        return self._sample("cache_breaker_open") == 1

    def round_trips(self, operation: str) -> float:
        return self._sample("cache_seconds_count", operation=operation)


Open = Callable[..., Awaitable[Opened]]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_cache(url: str, **options: Any) -> Opened:
            one = Opened(url, **options)
            await one.cache.open()
            stack.push_async_callback(one.cache.close)
            return one

        yield open_cache


async def test_what_was_put_is_found_and_the_rest_is_missed(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    await one.cache.put_many(items(["a", "c"]))
    assert await one.cache.get_many([key("a"), key("b"), key("c")]) == [entry("a"), None, entry("c")]
    assert (one.lookups("hit"), one.lookups("miss"), one.writes("ok")) == (2, 1, 2)


async def test_an_entry_comes_back_with_every_field(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    name = cache_key(VERSION, Text("text", "Query:"), 64, "int8")
    quantized = CachedVector(tokens=512, truncated="start", scale=1 / 127, vector=bytes([127] + [0] * 63))
    await one.cache.put_many([(name, quantized)])
    assert await one.cache.get_many([name]) == [quantized]


async def test_nothing_asked_is_nothing_sent(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    assert await one.cache.get_many([]) == []
    await one.cache.put_many([])
    assert redis.calls("mget") == redis.calls("set") == 0


async def test_a_poll_of_texts_is_one_mget(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    texts = [f"text {n}" for n in range(500)]
    await one.cache.put_many(items(texts, dimensions=384))
    found = await one.cache.get_many([key(text, dimensions=384) for text in texts])
    assert found == [entry(text, dimensions=384) for text in texts]
    assert redis.calls("mget") == 1
    assert redis.calls("set") == 500


async def test_a_large_look_up_goes_in_chunks_and_keeps_its_order(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    texts = [f"text {n}" for n in range(300)]
    await one.cache.put_many(items(texts[::2], dimensions=2560))
    found = await one.cache.get_many([key(text, dimensions=2560) for text in texts])
    assert found == [None if n % 2 else entry(text, dimensions=2560) for n, text in enumerate(texts)]
    per_chunk = CHUNK_BYTES // (2560 * 4 + OVERHEAD_BYTES + 256)
    assert redis.calls("mget") == -(-300 // per_chunk)


async def test_the_same_key_twice_in_one_look_up_is_answered_twice(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    await one.cache.put_many(items(["a"]))
    assert await one.cache.get_many([key("a"), key("a")]) == [entry("a"), entry("a")]


@pytest.mark.parametrize("damage", [b"", b"x", b"EQV1" + b"\0" * 148, b"EQV2" + b"\0" * 160, b"\0" * 164])
async def test_a_damaged_entry_is_a_miss_until_it_is_overwritten(
    redis: RedisProcess, opened: Open, damage: bytes
) -> None:
    one = await opened(redis.url)
    redis.command("SET", key("a"), damage)
    assert await one.cache.get_many([key("a")]) == [None]
    assert one.lookups("corrupt") == 1
    await one.cache.put_many(items(["a"]))
    assert await one.cache.get_many([key("a")]) == [entry("a")]


async def test_an_entry_copied_to_another_key_is_corrupt(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url)
    await one.cache.put_many(items(["a"]))
    redis.command("RENAME", key("a"), key("b"))
    assert await one.cache.get_many([key("b")]) == [None]
    assert one.lookups("corrupt") == 1


async def test_a_key_of_another_redis_type_is_a_miss_and_is_overwritten(
    redis: RedisProcess, opened: Open
) -> None:
    one = await opened(redis.url)
    redis.command("LPUSH", key("a"), "x")
    assert await one.cache.get_many([key("a")]) == [None]
    await one.cache.put_many(items(["a"]))
    assert await one.cache.get_many([key("a")]) == [entry("a")]


async def test_every_key_expires_within_a_tenth_of_the_ttl(redis: RedisProcess, opened: Open) -> None:
    one = await opened(redis.url, ttl_s=1000)
    names = [name for name, _ in items([f"text {n}" for n in range(200)])]
    await one.cache.put_many(items([f"text {n}" for n in range(200)]))
    left = [int(redis.command("PTTL", name)[1:]) for name in names]
    assert redis.command("DBSIZE") == b":200\r\n"
    assert all(850_000 < ms <= 1_100_000 for ms in left)
    assert max(left) - min(left) > 50_000


async def test_a_full_redis_refuses_writes_and_goes_on_answering(
    own_redis: RedisProcess, opened: Open
) -> None:
    one = await opened(own_redis.url)
    await one.cache.put_many(items(["a"]))
    own_redis.command("CONFIG", "SET", "maxmemory", "1")  # the policy is noeviction
    await one.cache.put_many(items([f"text {n}" for n in range(20)]))
    assert one.writes("error") == 20
    assert not one.breaker_is_open()
    assert await one.cache.get_many([key("a")]) == [entry("a")]


async def test_redis_down_at_the_start_is_a_miss_and_is_found_when_it_comes(
    own_redis: RedisProcess, opened: Open
) -> None:
    own_redis.kill()
    one = await opened(own_redis.url)
    for _ in range(10):
        assert await one.cache.get_many([key("a")]) == [None]
        await one.cache.put_many(items(["a"]))
    assert one.breaker_is_open()
    assert (one.lookups("error"), one.writes("error")) == (10, 10)
    own_redis.start()
    await wait_until(lambda: closes_again(one), what="the breaker closed")
    await one.cache.put_many(items(["a"]))
    assert await one.cache.get_many([key("a")]) == [entry("a")]


async def closes_again(one: Opened) -> bool:
    await one.cache.get_many([key("probe")])
    return not one.breaker_is_open()


async def test_redis_killed_and_started_again_misses_and_then_hits(
    own_redis: RedisProcess, opened: Open
) -> None:
    one = await opened(own_redis.url)
    for _ in range(3):
        await one.cache.put_many(items(["a"]))
        assert await one.cache.get_many([key("a")]) == [entry("a")]
        own_redis.kill()
        for _ in range(5):
            assert await one.cache.get_many([key("a")]) == [None]
        assert one.breaker_is_open()
        own_redis.start()
        await wait_until(lambda: closes_again(one), what="the breaker closed")


async def test_a_restart_between_two_look_ups_costs_nothing(own_redis: RedisProcess, opened: Open) -> None:
    one = await opened(own_redis.url)
    await asyncio.gather(*(one.cache.put_many(items(["a"])) for _ in range(8)))  # every connection is in use
    own_redis.kill()
    own_redis.start()
    await one.cache.put_many(items(["a"]))
    assert await one.cache.get_many([key("a")]) == [entry("a")]
    assert one.lookups("error") == one.writes("error") == 0


async def test_an_open_breaker_leaves_redis_alone(own_redis: RedisProcess, opened: Open) -> None:
    one = await opened(own_redis.url, breaker=CircuitBreaker(failures=1, pause_s=3600))
    own_redis.kill()
    await one.cache.get_many([key("a")])
    own_redis.start()
    own_redis.command("CONFIG", "RESETSTAT")
    for _ in range(20):
        assert await one.cache.get_many([key("a")]) == [None]
    assert own_redis.calls("mget") == 0
    assert one.breaker_is_open()


async def test_a_frozen_redis_costs_one_time_out_however_many_keys(
    own_redis: RedisProcess, opened: Open
) -> None:
    one = await opened(own_redis.url, timeout_s=0.1, breaker=CircuitBreaker(failures=100))
    keys = [key(f"text {n}", dimensions=2560) for n in range(2048)]
    await one.cache.get_many(keys[:1])
    own_redis.freeze()
    assert await one.cache.get_many(keys) == [None] * 2048
    own_redis.thaw()
    assert one.lookups("error") == 2048
    assert one.round_trips("get") == 2  # the first look-up, and one chunk of the second


async def test_a_late_answer_never_answers_the_next_look_up(own_redis: RedisProcess, opened: Open) -> None:
    """One connection only, so that the next look-up would meet the late reply if the connection were kept."""
    one = await opened(own_redis.url, timeout_s=0.05, connections=1, breaker=CircuitBreaker(failures=10_000))
    texts = [f"text {n}" for n in range(40)]
    await one.cache.put_many(items(texts))

    def gone(connections: set[str]) -> bool:
        return not connections & own_redis.clients()

    for asked, next_asked in itertools.pairwise(texts):
        before = own_redis.clients()
        own_redis.freeze()
        assert await one.cache.get_many([key(asked)]) == [None]
        own_redis.thaw()
        found: list[CachedVector | None] = [None]
        while found == [None]:  # a slow machine may time out here as well
            found = await one.cache.get_many([key(next_asked)])
        assert found == [entry(next_asked)]
        await wait_until(partial(gone, before), what="the old connections closed")
    assert one.lookups("corrupt") == 0


@pytest.mark.parametrize("seed", range(4))
async def test_cancelled_look_ups_and_writes_never_mix_up_answers(
    redis: RedisProcess, opened: Open, seed: int
) -> None:
    """Cancels at each point that a round trip can be suspended at, twice now and then, two connections for many."""
    one = await opened(redis.url, connections=2, breaker=CircuitBreaker(failures=10_000))
    chance = random.Random(seed)
    texts = [f"text {n}" for n in range(200)]
    await one.cache.put_many(items(texts, dimensions=384))
    finished = 0

    async def caller() -> None:
        nonlocal finished
        for _ in range(60):
            some = chance.sample(texts, chance.choice([1, 3, 120]))
            if chance.random() < 0.2:
                work: Any = asyncio.ensure_future(one.cache.put_many(items(some, dimensions=384)))
            else:
                work = asyncio.ensure_future(one.cache.get_many([key(text, dimensions=384) for text in some]))
            if chance.random() < 0.6:
                for _ in range(chance.randrange(30)):
                    await asyncio.sleep(0)
                work.cancel()
                await asyncio.sleep(0)
                if chance.random() < 0.3:
                    work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                found = await work
                if isinstance(found, list):  # and not how many were written
                    assert found == [entry(text, dimensions=384) for text in some]
                    finished += 1

    await asyncio.gather(*(caller() for _ in range(8)))
    assert finished > 50
    assert one.lookups("corrupt") == one.lookups("error") == one.lookups("miss") == 0
    # A busy Redis takes a while to see that a connection was closed.
    await wait_until(lambda: len(redis.clients()) <= 2, what="no connection beyond the two")
    assert await one.cache.get_many([key("text 0", dimensions=384)]) == [entry("text 0", dimensions=384)]


async def test_a_stalled_event_loop_is_not_taken_for_a_slow_redis(redis: RedisProcess, opened: Open) -> None:
    """A reply of a megabyte, since a short one is read in the very turn in which the deadline is noticed."""
    one = await opened(redis.url, timeout_s=0.2)
    texts = [f"text {n}" for n in range(100)]
    await one.cache.put_many(items(texts, dimensions=2560))
    look_up = asyncio.ensure_future(one.cache.get_many([key(text, dimensions=2560) for text in texts]))
    await asyncio.sleep(0)  # it is sent
    time.sleep(0.5)  # noqa: ASYNC251 the stall itself
    assert await look_up == [entry(text, dimensions=2560) for text in texts]


async def test_a_cancelled_probe_does_not_keep_the_breaker_from_closing(
    own_redis: RedisProcess, opened: Open
) -> None:
    breaker = CircuitBreaker(failures=1, pause_s=0)
    one = await opened(own_redis.url, breaker=breaker)
    own_redis.kill()
    await one.cache.get_many([key("a")])
    own_redis.start()
    own_redis.freeze()
    probe = asyncio.ensure_future(one.cache.get_many([key("a")]))
    await wait_until(lambda: breaker.state == "probing", what="the probe")
    probe.cancel()
    own_redis.thaw()
    await wait_until(lambda: closes_again(one), what="the breaker closed")


JUNK = [
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    b"\r\n" * 10,
    b"$not-a-number\r\n",
    b"*2\r\n$-1\r\n",
    b"*1\r\n$-1\r\n" * 10,
    b":7\r\n" * 10,
    b"+OK\r\n" * 10,
    b"-NOAUTH Authentication required.\r\n" * 10,
    b"-LOADING Redis is loading the dataset in memory\r\n" * 10,
    b"$" + b"9" * 15 + b"\r\n",
    b"x" * 200_000,
    b"",
]


@pytest.mark.parametrize("answer", JUNK, ids=[str(n) for n in range(len(JUNK))])
async def test_a_peer_that_is_not_redis_is_a_miss(answer: bytes, opened: Open) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                writer.write(answer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        one = await opened(f"redis://127.0.0.1:{port}", timeout_s=0.1, connect_timeout_s=0.1)
        for _ in range(5):
            assert await one.cache.get_many([key("a"), key("b")]) == [None, None]
            await one.cache.put_many(items(["a"]))
        assert one.lookups("hit") == one.lookups("corrupt") == 0
        await one.cache.close()


async def test_after_close_look_ups_are_bypassed_and_no_connection_stays(
    redis: RedisProcess, opened: Open
) -> None:
    one = await opened(redis.url)
    await asyncio.gather(*(one.cache.put_many(items(["a"])) for _ in range(8)))
    await one.cache.close()
    assert await one.cache.get_many([key("a")]) == [None]
    assert one.lookups("bypass") == 1
    await wait_until(lambda: not redis.clients(), what="every connection closed")
