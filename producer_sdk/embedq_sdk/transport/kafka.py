"""Opening and closing aiokafka's objects with a deadline around each step, since aiokafka itself may wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from embedq_sdk.errors import InvalidArgument, KafkaUnavailable, TopicMissing

T = TypeVar("T")
Part = TypeVar("Part", AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient)

SECURITY: Final = frozenset(
    {
        "security_protocol",
        "ssl_context",
        "sasl_mechanism",
        "sasl_plain_username",
        "sasl_plain_password",
        "sasl_kerberos_service_name",
        "sasl_kerberos_domain_name",
        "sasl_oauth_token_provider",
    }
)
"""Options that go to aiokafka as they are."""

REQUEST_TIMEOUT_S: Final = 10.0
"""One Kafka request; a job whose send timed out is sent again until its own deadline."""
CLOSE_TIMEOUT_S: Final = 2.0
MAX_BATCH_BYTES: Final = 1_000_000
_ATTEMPT_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class KafkaConnection:
    """Where Kafka is, and how to log in."""

    address: str
    security: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, servers: str | list[str], security: Mapping[str, Any]) -> KafkaConnection:
        """Checked at the door."""
        address = ",".join(servers) if isinstance(servers, list) else servers
        if not isinstance(address, str) or not address.strip(", "):
            raise InvalidArgument(
                argument="servers", expected="host:port, several with commas", got=repr(servers)
            )
        for name in security:
            if name not in SECURITY:
                raise InvalidArgument(
                    argument=name, expected=f"one of {', '.join(sorted(SECURITY))}", got="an unknown option"
                )
        return cls(address, dict(security))

    def unavailable(self, reason: str) -> KafkaUnavailable:
        """The error that names these servers."""
        return KafkaUnavailable(servers=self.address, reason=reason)

    def producer(self) -> AIOKafkaProducer:
        """Not idempotent: an idempotent one never gives a batch up while the broker is down, and a job that is
        there twice is answered twice, which costs less than a hang."""
        return AIOKafkaProducer(
            bootstrap_servers=self.address,
            client_id="embedq-sdk",
            acks="all",
            enable_idempotence=False,
            # 16 KB, the default, would carry one vector or a few texts in each request.
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_BATCH_BYTES + 24_576,
            linger_ms=0,
            request_timeout_ms=int(REQUEST_TIMEOUT_S * 1000),
            **self.security,
        )

    def consumer(self, **settings: Any) -> AIOKafkaConsumer:
        """A consumer that commits nothing by itself and never skips to the end by itself."""
        return AIOKafkaConsumer(
            bootstrap_servers=self.address,
            client_id="embedq-sdk",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=8 << 20,
            # JoinGroup waits for the whole rebalance within one request.
            request_timeout_ms=75_000 if settings.get("group_id") else int(REQUEST_TIMEOUT_S * 1000),
            **settings,
            **self.security,
        )

    def admin(self) -> AIOKafkaAdminClient:
        """For topics, offsets and configurations."""
        return AIOKafkaAdminClient(
            bootstrap_servers=self.address,
            client_id="embedq-sdk",
            request_timeout_ms=int(REQUEST_TIMEOUT_S * 1000),
            **self.security,
        )

    async def within(self, seconds: float, what: str, work: Awaitable[T]) -> T:
        """The outcome of one Kafka call, or KafkaUnavailable."""
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise self.unavailable(f"{what} took more than {seconds:g} s") from None
        except (KafkaError, OSError) as error:
            raise self.unavailable(f"{what}: {reason(error)}") from error

    async def start(self, make: Callable[[], Part], timeout: float) -> Part:
        """A started part. Tries again until `timeout`, since Kafka is often started at the same time as its clients.

        Raises:
            KafkaUnavailable: not within `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        pause = _FIRST_PAUSE_S
        why = "no connection"
        while True:
            part = make()
            try:
                async with asyncio.timeout(min(_ATTEMPT_S, max(0.001, end - loop.time()))):
                    await part.start()
                return part
            except TimeoutError:
                why = f"no answer within {timeout:g} s"
            except (KafkaError, OSError) as error:
                why = reason(error)
            except BaseException:
                await close(part)
                raise
            await close(part, timeout=0.5)
            left = end - loop.time()
            if left <= pause:
                raise self.unavailable(why)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    @contextlib.asynccontextmanager
    async def opened(self, make: Callable[[], Part], timeout: float) -> AsyncIterator[Part]:
        """A part, started and closed."""
        part = await self.start(make, timeout)
        try:
            yield part
        finally:
            await close(part)


def reason(error: BaseException) -> str:
    """A Kafka error in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


async def existing_topics(servers: KafkaConnection, consumer: AIOKafkaConsumer, timeout: float) -> set[str]:
    """All topics. Asking for one by its name could create it; asking for all never does."""
    found: set[str] = await servers.within(timeout, "listing the topics", consumer.topics())
    return found


async def require_topics(
    servers: KafkaConnection, consumer: AIOKafkaConsumer, names: list[str], timeout: float
) -> None:
    """Check that topics are there before anything names them.

    Raises:
        TopicMissing: the first one that is not there.
    """
    found = await existing_topics(servers, consumer, timeout)
    for name in names:
        if name not in found:
            raise TopicMissing(servers=servers.address, topic=name)


async def close(
    part: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient, *, timeout: float = CLOSE_TIMEOUT_S
) -> None:
    """Stop a part, or abandon it after `timeout` seconds. Never raises what Kafka says: nobody could act on it."""
    stop = part.close if isinstance(part, AIOKafkaAdminClient) else part.stop
    try:
        async with asyncio.timeout(timeout):
            await stop()
        return
    except (TimeoutError, KafkaError, OSError):
        pass
    # With the connections gone, whatever stop() waited for fails by itself.
    client = part.client if isinstance(part, AIOKafkaProducer) else part._client
    with contextlib.suppress(TimeoutError, KafkaError, OSError):
        async with asyncio.timeout(timeout):
            await client.close()
    sender = part._sender if isinstance(part, AIOKafkaProducer) else None
    if sender is not None and sender.sender_task is not None:
        sender.sender_task.cancel()
        await asyncio.wait([sender.sender_task], timeout=timeout)
