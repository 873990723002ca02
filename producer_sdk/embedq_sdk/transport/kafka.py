"""How the SDK reaches Kafka: clients with the SDK's settings, a deadline around each step, and the SDK's own errors."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from embedq_sdk.errors import InvalidArgument, KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.fair_timeout import fair_timeout
from embedq_shared.backoff import backoff
from embedq_shared.kafka import (
    AIOKafkaAdminClient,
    AIOKafkaConsumer,
    AIOKafkaProducer,
    BadOption,
    BoundedConsumer,
    BrokerUnreachable,
    KafkaError,
    KafkaOptions,
    TopicPartition,
    WholePartition,
    connect,
    explain,
    is_permanent,
    stop_client,
)
from embedq_shared.kafka import KafkaRefused as KafkaRefusedByBroker

T = TypeVar("T")
Client = TypeVar("Client", AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient)

SECURITY: Final = frozenset(KafkaOptions.__struct_fields__) - {"servers"}
"""Names of the keyword arguments that say how to log in."""

REQUEST_TIMEOUT_S: Final = 10.0
"""One Kafka request; a job whose send timed out is sent again until its own deadline."""
CLOSE_TIMEOUT_S: Final = 2.0
"""Closing a client takes a few seconds at most, whatever Kafka does."""
MAX_BATCH_BYTES: Final = 1_000_000
"""16 KB, aiokafka's default, would carry one vector or a few texts in each request."""
_OVERHEAD_BYTES: Final = 24_576
"""What a request may be larger than its largest batch: headers and framing."""
_GROUP_REQUEST_TIMEOUT_S: Final = 75.0
"""JoinGroup waits for the whole rebalance (60 s) within one request."""
_LEAST_CALL_S: Final = 0.1
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class KafkaConnection:
    """Where Kafka is and how to log in, checked; makes clients and runs calls that end in time."""

    def __init__(self, options: KafkaOptions) -> None:
        self.servers = options.servers
        """host:port, several separated by commas."""
        with _arguments():
            self._options = options.client_options()

    @classmethod
    def of(cls, servers: str | Sequence[str], security: Mapping[str, Any]) -> KafkaConnection:
        """From the arguments of a public function.

        Raises:
            InvalidArgument: no address or a wrong one, an unknown option, or a certificate file that cannot be loaded.
        """
        several = [servers] if isinstance(servers, str) else servers
        if not isinstance(several, (list, tuple)) or not all(isinstance(each, str) for each in several):
            raise InvalidArgument(
                argument="servers",
                expected="host:port, several separated by commas or in a list",
                got=type(servers).__name__,
            )
        for name in security:
            if name not in SECURITY:
                raise InvalidArgument(
                    argument=name, expected=f"one of {', '.join(sorted(SECURITY))}", got="an unknown option"
                )
        given = {name: value for name, value in security.items() if value is not None}
        with _arguments():
            return cls(KafkaOptions(servers=",".join(several), **given))

    def unavailable(self, reason: str) -> KafkaUnavailable:
        """The error that names these servers."""
        return KafkaUnavailable(servers=self.servers, reason=reason)

    def failed(self, error: KafkaError | OSError, what: str = "") -> KafkaUnavailable:
        """The error for what Kafka's client raised while doing `what`: a `KafkaRefused` where trying again will not help."""
        why = f"{what}: {explain(error)}" if what else explain(error)
        kind = KafkaRefused if is_permanent(error) else KafkaUnavailable
        return kind(servers=self.servers, reason=why)

    def producer(self) -> AIOKafkaProducer:
        """Not idempotent: an idempotent producer never gives a batch up while the broker is down, and a job that is
        written twice is answered twice, which costs less than a hang."""
        return AIOKafkaProducer(
            client_id="embedq-sdk",
            acks="all",
            enable_idempotence=False,
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_BATCH_BYTES + _OVERHEAD_BYTES,
            linger_ms=0,
            request_timeout_ms=int(REQUEST_TIMEOUT_S * 1000),
            **self._options,
        )

    def consumer(self, **settings: Any) -> AIOKafkaConsumer:
        """A consumer that commits nothing by itself and never skips to the end by itself."""
        timeout_s = _GROUP_REQUEST_TIMEOUT_S if settings.get("group_id") else REQUEST_TIMEOUT_S
        return BoundedConsumer(
            client_id="embedq-sdk",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=8 << 20,
            request_timeout_ms=int(timeout_s * 1000),
            **settings,
            **self._options,
        )

    def whole_partition(self, topic: str, *, poll_ms: int) -> WholePartition:
        """A topic of one partition, to be read whole and then followed. While nothing is written, a broker answers every `poll_ms`."""
        settings = {"client_id": "embedq-sdk", "request_timeout_ms": int(REQUEST_TIMEOUT_S * 1000)}
        return WholePartition(
            TopicPartition(topic, 0), settings | self._options, poll_ms=poll_ms, fetch_ms=poll_ms
        )

    def admin(self) -> AIOKafkaAdminClient:
        """For topics, offsets and configurations."""
        return AIOKafkaAdminClient(
            client_id="embedq-sdk", request_timeout_ms=int(REQUEST_TIMEOUT_S * 1000), **self._options
        )

    async def call(self, seconds: float, what: str, work: Awaitable[T]) -> T:
        """The outcome of one Kafka call.

        Raises:
            KafkaUnavailable: it failed, or took more than `seconds` in which our event loop ran; `what` names it ("listing the
                topics").
        """
        try:
            async with fair_timeout(seconds):
                return await work
        except TimeoutError:
            raise self.unavailable(f"{what} took more than {seconds:g} s") from None
        except (KafkaError, OSError) as error:
            raise self.failed(error, what) from error

    async def connect(self, make: Callable[[], Client], timeout: float) -> Client:
        """A started client: one of `producer`, `consumer`, `admin`. The caller closes it.

        Raises:
            KafkaRefused: a broker answers, and trying again will not help.
            KafkaUnavailable: not within `timeout` seconds.
        """
        try:
            return await connect(make, timeout)
        except (BrokerUnreachable, KafkaRefusedByBroker) as error:
            raise self.failed(error) from error

    @contextlib.asynccontextmanager
    async def client(self, make: Callable[[], Client], timeout: float) -> AsyncIterator[Client]:
        """A client as `connect` gives it, closed at the end of the block.

        Raises:
            KafkaUnavailable: not within `timeout` seconds.
        """
        client = await self.connect(make, timeout)
        try:
            yield client
        finally:
            await close(client)


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """An option that cannot be used is the caller's argument of that name."""
    try:
        yield
    except BadOption as error:
        raise InvalidArgument(argument=error.option, expected=error.expected, got=error.got) from error


async def list_topics(connection: KafkaConnection, consumer: AIOKafkaConsumer, timeout: float) -> set[str]:
    """The names of all topics, asked for once.

    Raises:
        KafkaUnavailable: no answer within `timeout` seconds.
    """
    found: set[str] = await connection.call(timeout, "listing the topics", consumer.topics())
    return found


async def require_topics(
    connection: KafkaConnection, consumer: AIOKafkaConsumer, names: list[str], timeout: float
) -> set[str]:
    """Check that topics exist before anything names them: asking for one by its name could create it. Returns all that exist.

    Asks again for `timeout` seconds, as `connect` does: a broker that has just started lets us in before it knows of any broker,
    itself included, and until then it cannot say which topics there are.

    Raises:
        TopicMissing: the first one that does not exist.
        KafkaRefused: trying again will not help.
        KafkaUnavailable: no answer within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    for attempt in itertools.count():
        try:
            found = await list_topics(connection, consumer, max(_LEAST_CALL_S, end - time.monotonic()))
            break
        except KafkaRefused:
            raise
        except KafkaUnavailable:
            pause = backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
            if end - time.monotonic() <= pause:
                raise
            await asyncio.sleep(pause)
    for name in names:
        if name not in found:
            raise TopicMissing(servers=connection.servers, topic=name)
    return found


async def close(client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient) -> None:
    """Stop a client, or abandon it after `CLOSE_TIMEOUT_S`."""
    await stop_client(client, CLOSE_TIMEOUT_S)
