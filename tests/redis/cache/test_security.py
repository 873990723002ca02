"""A Redis that asks for TLS, for a certificate, for a password and that allows little."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from structlog.testing import capture_logs

from embedq_consumer.cache import BadCacheSetting
from embedq_consumer.cache.circuit_breaker import CircuitBreaker
from embedq_consumer.cache.entries import CachedVector, EntryCodec, cache_key
from embedq_consumer.cache.redis_link import RedisOptions
from embedq_consumer.cache.vector_cache import CacheOptions, VectorCache
from embedq_consumer.engine import Text
from embedq_consumer.telemetry.metrics import Metrics
from embedq_sdk.dev.ports import free_ports
from tests.helpers.metric_values import sample_value
from tests.helpers.redis_process import RedisProcess, tls_redis_binary

KEY = cache_key("sha256:" + "f" * 64, Text("a"), 32, "float32")
ENTRY = CachedVector(
    tokens=1, truncated="", scale=None, vector=np.array([0.6, 0.8, *[0.0] * 30], "<f4").tobytes()
)
RIGHTS = ("+ping", "+mget", "+set", "~embedq:*")
"""What docs/security.md says that the service needs."""


class Opened:
    """A cache, what it logged while it was opened and used once, and what it counted."""

    def __init__(
        self, redis: RedisOptions, *, timeout_s: float = 10.0, connect_timeout_s: float = 10.0
    ) -> None:
        self.metrics = Metrics()
        self.breaker = CircuitBreaker(failures=100, pause_s=0)
        options = CacheOptions(
            redis=redis, ttl_s=100, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s
        )
        self.cache = VectorCache(
            options, EntryCodec(b"a secret of this test"), self.metrics, breaker=self.breaker
        )
        self.logs: list[Any] = []

    async def use(self) -> list[CachedVector | None]:
        with capture_logs() as logs:
            await self.cache.open()
            await self.cache.put_many([(KEY, ENTRY)])
            await self.cache.put_many([(KEY, ENTRY)])
            found = await self.cache.get_many([KEY])
        self.logs = logs
        return found

    def failures(self, reason: str) -> float:
        found = sample_value(self.metrics.registry, "embedq_cache_failures_total", {"reason": reason})
        assert found is not None
        return found


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Opened]]:
    async with AsyncExitStack() as stack:

        def make(redis: RedisOptions, **options: float) -> Opened:
            one = Opened(redis, **options)
            stack.push_async_callback(one.cache.close)
            return one

        yield make


def assert_says_once(one: Opened, reason: str, words: str, *secrets: str) -> None:
    """One line, which names the reason and what to look at, and none of the secrets."""
    (line,) = one.logs
    assert (line["event"], line["reason"]) == ("cache_unreachable", reason)
    assert words in line["hint"]
    assert not any(secret in str(line) for secret in secrets)
    assert one.failures(reason) == 4


# -- users and rights --------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(own_redis: RedisProcess) -> RedisProcess:
    """A user with the rights of the page, and none for whoever has no password."""
    for command in (
        ("ACL", "SETUSER", "embedq", "on", ">open sesame", *RIGHTS),
        ("ACL", "SETUSER", "reader", "on", ">open sesame", "+ping", "+mget", "~embedq:*"),
        ("ACL", "SETUSER", "elsewhere", "on", ">open sesame", "+ping", "+mget", "+set", "~other:*"),
        ("ACL", "SETUSER", "default", "off"),
    ):
        assert own_redis.command(*command) == b"+OK\r\n", command
    return own_redis


async def test_a_user_with_the_rights_of_the_page_is_enough(guarded: RedisProcess, opened: Any) -> None:
    one = opened(RedisOptions(url=guarded.url, username="embedq", password="open sesame"))
    assert await one.use() == [ENTRY]
    assert one.logs == []


async def test_user_and_password_may_stand_in_the_address(guarded: RedisProcess, opened: Any) -> None:
    one = opened(RedisOptions(url=guarded.url.replace("//", "//embedq:open%20sesame@")))
    assert await one.use() == [ENTRY]


@pytest.mark.parametrize(
    "who",
    [
        {"username": "embedq", "password": "wrong secret"},
        {"username": "nobody", "password": "wrong secret"},
        {"password": "wrong secret"},
        {},
    ],
    ids=["wrong password", "unknown user", "password alone", "nobody"],
)
async def test_a_wrong_user_or_password_is_one_line_that_says_so_and_no_vector_is_lost(
    guarded: RedisProcess, opened: Any, who: dict[str, str]
) -> None:
    one = opened(RedisOptions(url=guarded.url, **who))
    assert await one.use() == [None]
    assert_says_once(one, "password", "EMBEDQ_REDIS_PASSWORD", "wrong secret")


async def test_a_user_who_may_not_use_our_keys_is_one_line_that_names_the_rights(
    guarded: RedisProcess, opened: Any
) -> None:
    one = opened(RedisOptions(url=guarded.url, username="elsewhere", password="open sesame"))
    assert await one.use() == [None]
    assert [(line["event"], line.get("reason")) for line in one.logs] == [
        ("cache_writes_refused", None),
        ("cache_unreachable", "permission"),
    ]
    assert all("+mget +set` for `~embedq:*`" in line["hint"] for line in one.logs)


async def test_a_user_who_may_only_read_keeps_nothing_and_says_so_once(
    guarded: RedisProcess, opened: Any
) -> None:
    writer = opened(RedisOptions(url=guarded.url, username="embedq", password="open sesame"))
    await writer.use()
    one = opened(RedisOptions(url=guarded.url, username="reader", password="open sesame"))
    assert await one.use() == [ENTRY]
    assert [(line["event"], line["error"]) for line in one.logs] == [("cache_writes_refused", "NOPERM")]
    assert sample_value(one.metrics.registry, "embedq_cache_writes_total", {"outcome": "error"}) == 2


async def test_the_rights_of_the_page_are_no_more_than_that(guarded: RedisProcess) -> None:
    from redis.asyncio import Redis
    from redis.exceptions import NoPermissionError

    async with Redis(port=guarded.port, username="embedq", password="open sesame") as client:
        for command in (
            ("GET", "embedq:x"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("KEYS", "*"),
            ("SET", "x", "1"),
        ):
            with pytest.raises(NoPermissionError):
                await client.execute_command(*command)  # type: ignore[no-untyped-call]


# -- TLS ---------------------------------------------------------------------------------------------------------------


class Tls:
    """A Redis with TLS, the authority that signed its certificate, and a client's certificate."""

    def __init__(self, directory: Path, binary: str) -> None:
        authority = trustme.CA()
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.client = directory / "client.pem"
        authority.issue_cert("a-replica").private_key_and_cert_chain_pem.write_to_path(str(self.client))
        self.foreign_ca = directory / "foreign.pem"
        trustme.CA().cert_pem.write_to_path(str(self.foreign_ca))
        server = authority.issue_cert("127.0.0.1", "localhost")
        (directory / "server.pem").write_bytes(server.cert_chain_pems[0].bytes())
        (directory / "server.key").write_bytes(server.private_key_pem.bytes())
        elsewhere = authority.issue_cert("redis.example")
        (directory / "elsewhere.pem").write_bytes(elsewhere.cert_chain_pems[0].bytes())
        (directory / "elsewhere.key").write_bytes(elsewhere.private_key_pem.bytes())
        self._directory = directory
        self._binary = binary
        self._ports = free_ports(2)
        self._processes: list[RedisProcess] = []

    def start(self, *, name: str = "server", clients: str = "no") -> str:
        """The address of a Redis that shows this certificate."""
        directory = self._directory / f"{name} {clients}"
        directory.mkdir()
        port = self._ports.pop()
        process = RedisProcess(
            directory,
            *("--tls-port", str(port), "--tls-auth-clients", clients, "--tls-ca-cert-file", str(self.ca)),
            *("--tls-cert-file", str(self._directory / f"{name}.pem")),
            *("--tls-key-file", str(self._directory / f"{name}.key")),
            binary=self._binary,
        )
        process.start()
        self._processes.append(process)
        return f"rediss://127.0.0.1:{port}/0"

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[Tls]:
    binary = tls_redis_binary(tmp_path)
    if binary is None:
        pytest.skip("no redis-server here knows TLS; Debian's package redis-tools has one")
    one = Tls(tmp_path, binary)
    yield one
    one.kill()


async def test_a_redis_with_tls_is_used_where_its_authority_is_known(tls: Tls, opened: Any) -> None:
    one = opened(RedisOptions(url=tls.start(), ssl_cafile=str(tls.ca)))
    assert await one.use() == [ENTRY]
    assert one.logs == []


async def test_a_redis_that_asks_for_a_certificate_gets_ours(tls: Tls, opened: Any) -> None:
    url = tls.start(clients="yes")
    one = opened(RedisOptions(url=url, ssl_cafile=str(tls.ca), ssl_certfile=str(tls.client)))
    assert await one.use() == [ENTRY]
    without = opened(RedisOptions(url=url, ssl_cafile=str(tls.ca)))
    assert await without.use() == [None]
    # Redis says why in an alert after the handshake, and hangs up: which of both is seen first is not ours to say.
    assert {line["reason"] for line in without.logs} <= {"tls", "connection"}
    assert all("certificate" in line["hint"] for line in without.logs)
    assert 1 <= len(without.logs) <= 2


@pytest.mark.parametrize("known", ["another authority", "the system's alone"])
async def test_an_authority_that_is_not_known_is_one_line_that_says_so(
    tls: Tls, opened: Any, known: str
) -> None:
    cafile = str(tls.foreign_ca) if known == "another authority" else ""
    one = opened(RedisOptions(url=tls.start(), ssl_cafile=cafile))
    assert await one.use() == [None]
    assert_says_once(one, "tls", "EMBEDQ_REDIS_SSL_CAFILE")
    assert "certificate" in one.logs[0]["error"]


async def test_a_certificate_of_another_host_is_refused(tls: Tls, opened: Any) -> None:
    one = opened(RedisOptions(url=tls.start(name="elsewhere"), ssl_cafile=str(tls.ca)))
    assert await one.use() == [None]
    assert_says_once(one, "tls", "EMBEDQ_REDIS_SSL_CAFILE")
    assert "IP address mismatch" in one.logs[0]["error"]


async def test_tls_where_there_is_none_and_none_where_there_is_say_so(
    redis: RedisProcess, tls: Tls, opened: Any
) -> None:
    """A Redis without TLS waits for the end of what it takes for a command, so it looks like one that is silent."""
    options = RedisOptions(url=redis.url.replace("redis://", "rediss://"), ssl_cafile=str(tls.ca))
    to_plain = opened(options, timeout_s=0.1, connect_timeout_s=0.1)
    assert await to_plain.use() == [None]
    assert_says_once(to_plain, "timeout", "must begin with redis:// or rediss://")
    to_tls = opened(RedisOptions(url=tls.start().replace("rediss://", "redis://")))
    assert await to_tls.use() == [None]
    (line,) = to_tls.logs
    assert "must begin with rediss://" in line["hint"]


# -- settings that cannot be used --------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_found_at_the_start_by_the_settings_name(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    authority.cert_pem.write_to_path(str(ca))
    other.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    gone = str(tmp_path / "gone")
    for options, words in (
        ({"ssl_cafile": gone}, "REDIS_SSL_CAFILE: .*No such file"),
        ({"ssl_cafile": str(other)}, "REDIS_SSL_CAFILE: expected a PEM file"),
        ({"ssl_certfile": gone}, "REDIS_SSL_CERTFILE: .*No such file"),
        ({"ssl_certfile": str(ca)}, "REDIS_SSL_CERTFILE: expected PEM files of a certificate and its key"),
        ({"ssl_keyfile": gone}, "REDIS_SSL_KEYFILE: needs"),
        ({"url": "rediss://:a@host", "password": "b"}, "REDIS_PASSWORD: cannot be set"),
        ({"url": "redis://host", "ssl_cafile": str(ca)}, "REDIS_SSL_CAFILE: needs an address .* rediss://"),
    ):
        with pytest.raises(BadCacheSetting, match=f"^{words}"):
            RedisOptions(**{"url": "rediss://host"} | options).check()
    RedisOptions(url="rediss://host", ssl_cafile=str(ca), password="a").check()


def test_no_repr_and_no_message_shows_a_secret() -> None:
    assert "secret" not in repr(RedisOptions(url="redis://:secret@host", password="secret"))
    with pytest.raises(BadCacheSetting) as caught:
        RedisOptions(url="redis://:secret@host", password="secret").check()
    assert "secret" not in str(caught.value)


def test_the_systems_authorities_are_those_of_python() -> None:
    """So the page need not say where they lie."""
    assert ssl.get_default_verify_paths().openssl_cafile
