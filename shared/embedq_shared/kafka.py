"""The one room that knows aiokafka's traps: connecting, stopping, unreadable records, committed offsets.

Service and SDK use aiokafka through it. The contract (messages, codec, headers, topics) does not import it, so that
reading a record needs no Kafka client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec
from aiokafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    ConsumerRecord,
    TopicPartition,
)
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    IllegalStateError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    NotCoordinatorForGroupError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    UnsupportedCodecError,
)
from aiokafka.helpers import create_ssl_context

from embedq_shared.backoff import backoff

__all__ = [
    "TOO_LARGE",
    "UNREADABLE",
    "AIOKafkaAdminClient",
    "AIOKafkaConsumer",
    "AIOKafkaProducer",
    "BrokerUnreachable",
    "CommitFailedError",
    "ConsumerRebalanceListener",
    "ConsumerRecord",
    "IllegalStateError",
    "InvalidTopicError",
    "KafkaError",
    "KafkaOptions",
    "Polled",
    "RoundRobinPartitionAssignor",
    "SecurityProtocol",
    "TopicAuthorizationFailedError",
    "TopicPartition",
    "UnknownTopicOrPartitionError",
    "UnreadableRecord",
    "committed_offsets",
    "connect",
    "group_lag",
    "poll",
    "poll_partition",
    "position",
    "read_commits",
    "reason",
    "step_over",
    "stop_client",
]

Client = TypeVar("Client", AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient)

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]

UNREADABLE: Final = (UnicodeDecodeError, CorruptRecordException, UnsupportedCodecError)
"""What aiokafka raises for a record that it cannot hand out, poll after poll, until its reader steps over it.

The first is a header name that is not UTF-8, which any producer but aiokafka's can write.
"""

TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
"""What a broker says of a batch, or of a record, that is larger than it takes."""

_ATTEMPT_S: Final = 5.0
"""One attempt to connect: a broker that hangs must not cost the whole deadline."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_DISCARD_S: Final = 0.5
"""For stopping a client that never connected: there is nothing to flush."""
_POSITION_S: Final = 1.0
_REFETCH_MS: Final = 5_000
"""The longest wait for one record that the failed poll had fetched already: it is fetched again."""
_CAREFUL_RECORDS: Final = 2_000
"""Records read one by one after a poll that failed, before polls are whole again: each costs a call."""
_SEARCH_S: Final = 5.0
"""How long to look for the partition that made a poll fail; the next poll fails again and looks further."""
_SEARCH_PAUSE_S: Final = 0.02
_COORDINATOR_PAUSE_S: Final = 0.1

_NO_COORDINATOR: Final = (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)
"""What a broker says about a group while it elects or loads the group's coordinator: it will know soon."""


# -- connecting -----------------------------------------------------------------------------------------------------------


class BrokerUnreachable(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """No broker let us in before the deadline; the message is the last reason."""


class KafkaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where Kafka is and how to log in, the same for service, SDK and command line.

    The names are aiokafka's, plus the three `ssl_…file`s, of which `client_options` makes its `ssl_context`. None leaves
    aiokafka's default.
    """

    servers: str
    """host:port, several separated by commas."""
    security_protocol: SecurityProtocol = "PLAINTEXT"
    ssl_context: Any = None
    """Instead of the files."""
    ssl_cafile: str | None = None
    """Certificates of the authorities to trust (PEM); None: those of the system."""
    ssl_certfile: str | None = None
    """This client's certificate (PEM), where the broker asks for one."""
    ssl_keyfile: str | None = None
    """Its private key (PEM); None: in `ssl_certfile`."""
    sasl_mechanism: str | None = None
    sasl_plain_username: str | None = None
    sasl_plain_password: str | None = None
    sasl_kerberos_service_name: str | None = None
    sasl_kerberos_domain_name: str | None = None
    sasl_oauth_token_provider: Any = None

    def __repr__(self) -> str:
        """Without the password."""
        return f"KafkaOptions(servers={self.servers!r}, security_protocol={self.security_protocol!r}, …)"

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for any aiokafka client. Reads the certificate files, if TLS is on.

        Raises:
            OSError: a file cannot be read, or is not a certificate or key (`ssl.SSLError`).
        """
        options = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name not in _FILES and name != "servers" and value is not None
        }
        if self.security_protocol.endswith("SSL") and self.ssl_context is None:
            options["ssl_context"] = create_ssl_context(
                cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
            )
        return options | {"bootstrap_servers": self.servers}


_FILES: Final = frozenset({"ssl_cafile", "ssl_certfile", "ssl_keyfile"})
"""Fields that aiokafka has no argument for."""


async def connect(make: Callable[[], Client], within: float) -> Client:
    """A started client. Tries again with new ones for `within` seconds, since Kafka is often started together with us.

    Raises:
        BrokerUnreachable: not within `within` seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + within
    attempt = 0
    while True:
        client = make()
        try:
            async with asyncio.timeout(min(_ATTEMPT_S, max(0.001, end - loop.time()))):
                await client.start()
            return client
        except TimeoutError:
            why = f"no answer within {within:g} s"
        except (KafkaError, OSError) as error:
            why = reason(error)
        except BaseException:
            await stop_client(client, _DISCARD_S)
            raise
        await stop_client(client, _DISCARD_S)
        pause = backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
        if end - loop.time() <= pause:
            raise BrokerUnreachable(why)
        await asyncio.sleep(pause)
        attempt += 1


def reason(error: BaseException) -> str:
    """An error of aiokafka's in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# -- stopping -------------------------------------------------------------------------------------------------------------


async def stop_client(
    client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient, within: float
) -> str | None:
    """Stop a client, or abandon it: None if it stopped, else why it did not, in one word.

    aiokafka's own `stop` never ends while the brokers are gone. After `within` seconds it is cancelled, and what it
    leaves running is ended here: a producer's sender, which would connect again and send what was given up long ago, a
    consumer's fetcher, and the connections. Each of these steps takes `within` seconds at most. Raises nothing that
    Kafka says, since nothing could be done about it. If the caller is cancelled, only the sender is ended.
    """
    stop = client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop()
    problem: str | None = "CancelledError"
    try:
        problem = await _finished(stop, within)
    finally:
        sender = _sender_of(client)
        if problem is not None and sender is not None:
            sender.cancel()
    if problem is None:
        return None
    if isinstance(client, AIOKafkaConsumer) and client._fetcher is not None:
        await _finished(client._fetcher.close(), within)
    connections = client.client if isinstance(client, AIOKafkaProducer) else client._client
    await _finished(connections.close(), within)
    if sender is not None:
        await asyncio.wait({sender}, timeout=within)
    return problem


def _sender_of(
    client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient,
) -> asyncio.Task[None] | None:
    if not isinstance(client, AIOKafkaProducer) or client._sender is None:
        return None
    sender: asyncio.Task[None] | None = client._sender.sender_task
    return sender


async def _finished(work: Awaitable[None], within: float) -> str | None:
    """Wait for `work` for `within` seconds at most: None if it succeeded, else why not, in one word.

    It runs as a task: a fetch that a consumer's `stop` cancels lets `stop` itself end with CancelledError, which must
    not pass for a cancellation of ours.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=within)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_ignore_outcome)
    if not task.done():
        return "TimeoutError"
    if task.cancelled():
        return "CancelledError"
    failure = task.exception()
    return None if failure is None else type(failure).__name__


def _ignore_outcome(task: asyncio.Future[None]) -> None:
    """What a client raises once it was abandoned is of no use, and asyncio must not log it as never retrieved."""
    if not task.cancelled():
        task.exception()


# -- records that cannot be read --------------------------------------------------------------------------------------------


class UnreadableRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record that aiokafka cannot hand out, and that was stepped over: nothing is known but where it is."""

    topic: str
    partition: int
    offset: int
    reason: str
    """The type of aiokafka's error."""


Polled: TypeAlias = "ConsumerRecord | UnreadableRecord"


async def poll_partition(
    consumer: AIOKafkaConsumer, partition: TopicPartition, *, timeout_ms: int
) -> list[Polled]:
    """The next records of one partition, in order; waits `timeout_ms` for the first. One that cannot be read comes as an
    `UnreadableRecord`, and the consumer's position is after it.
    """
    try:
        polled = await consumer.getmany(partition, timeout_ms=timeout_ms)
    except UNREADABLE:
        # The failed poll withheld the good records before that one, and the position has not moved: read them again.
        return await _read_one_by_one(consumer, partition)
    found: list[Polled] = polled.get(partition, [])
    return found


async def poll(consumer: AIOKafkaConsumer, *, timeout_ms: int) -> list[Polled]:
    """The next records of one of the assigned partitions, in order; waits `timeout_ms` for the first.

    One that cannot be read comes as an `UnreadableRecord`. A poll of several partitions that fails loses what it had
    drained of the others, whose positions have moved. So only polls that cannot lose anything are made: of one record,
    and of one partition.
    """
    try:
        first = await consumer.getmany(timeout_ms=timeout_ms, max_records=1)
    except UNREADABLE:
        return await _find_unreadable(consumer)
    found: list[Polled] = []
    for partition, records in first.items():
        found += records
        found += await poll_partition(consumer, partition, timeout_ms=0)
    return found


async def _find_unreadable(consumer: AIOKafkaConsumer) -> list[Polled]:
    """The next records of all partitions, up to the one that made a poll fail: aiokafka does not say which partition it
    is in, and must fetch it again first.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + _SEARCH_S
    found: list[Polled] = []
    while True:
        for partition in sorted(consumer.assignment()):
            found += await poll_partition(consumer, partition, timeout_ms=0)
        if any(isinstance(record, UnreadableRecord) for record in found) or loop.time() > end:
            return found
        await asyncio.sleep(_SEARCH_PAUSE_S)


async def _read_one_by_one(consumer: AIOKafkaConsumer, partition: TopicPartition) -> list[Polled]:
    """The records up to the one that cannot be read, which is stepped over: what raises is at the position."""
    found: list[Polled] = []
    while len(found) < _CAREFUL_RECORDS:
        try:
            polled = await consumer.getmany(partition, timeout_ms=_REFETCH_MS, max_records=1)
        except UNREADABLE as error:
            offset = await step_over(consumer, partition)
            if offset is not None:
                found.append(
                    UnreadableRecord(
                        topic=partition.topic,
                        partition=partition.partition,
                        offset=offset,
                        reason=type(error).__name__,
                    )
                )
            break
        if not polled:
            break  # the broker is slow: if the record is still there, the next poll fails again
        found += polled[partition]
    return found


async def step_over(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """Move past the record at the position, for which a poll of one record raised one of `UNREADABLE`; its offset.

    None, and nothing moved, if the partition is not assigned any more. Where compaction left holes, the offset may be
    one before the record: then the next poll raises again.
    """
    offset = await position(consumer, partition)
    if offset is None:
        return None
    try:
        consumer.seek(partition, offset + 1)
    except IllegalStateError:
        return None
    return offset


async def position(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """The offset of the next record; None while the consumer has no position there."""
    try:
        async with asyncio.timeout(_POSITION_S):
            offset: int = await consumer.position(partition)
    except (TimeoutError, IllegalStateError):
        return None
    return offset


# -- groups -----------------------------------------------------------------------------------------------------------------


async def read_commits(
    consumer: Any, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, tuple[int | None, str]]:
    """What a consumer's group has stored of each partition: the offset, None if there is none, and the metadata.

    aiokafka's own `committed` drops the metadata. Waits without end while there is no coordinator.

    Raises:
        KafkaError: what the brokers say.
    """
    wanted = list(partitions)
    found = await consumer._coordinator.fetch_committed_offsets(wanted)
    return {
        partition: (None, "")
        if (stored := found.get(partition)) is None or stored.offset < 0
        else (stored.offset, stored.metadata)
        for partition in wanted
    }


async def committed_offsets(
    admin: AIOKafkaAdminClient, group: str, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, int]:
    """A group's committed offset for each of `partitions`, -1 where it never committed.

    Waits without end while the brokers have no coordinator for the group, as a new cluster has none until it is first
    asked: the deadline is the caller's.

    Raises:
        KafkaError: what else the brokers say.
    """
    wanted = list(partitions)
    while True:
        try:
            found = await admin.list_consumer_group_offsets(group, partitions=wanted)
        except _NO_COORDINATOR:
            found = {}
        # aiokafka does not look at the answer's own error code, with which no partition comes.
        if len(found) == len(wanted):
            return {partition: committed.offset for partition, committed in found.items()}
        await asyncio.sleep(_COORDINATOR_PAUSE_S)


async def group_lag(
    admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer, group: str, topics: Iterable[str]
) -> Mapping[str, int]:
    """How many records of each topic a group has not committed. Where it never committed, all that are there count.

    Waits like `committed_offsets`; any `consumer` will do, it only asks for offsets.

    Raises:
        KafkaError: what the brokers say.
    """
    names = list(topics)
    partitions = [
        TopicPartition(described["topic"], one["partition"])
        for described in await admin.describe_topics(names)
        for one in described["partitions"]
    ]
    committed = await committed_offsets(admin, group, partitions)
    begins = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    lag = dict.fromkeys(names, 0)
    for partition in partitions:
        lag[partition.topic] += max(0, ends[partition] - max(committed[partition], begins[partition]))
    return lag
