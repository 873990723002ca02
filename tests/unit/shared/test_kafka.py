"""The Kafka room against dumb fakes: hanging clients, records that cannot be read, coordinators that are not there yet."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import collect_hosts
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaConnectionError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import BrokerMetadata, OffsetAndMetadata

from embedq_shared.backoff import backoff
from embedq_shared.kafka import (
    BadOption,
    BoundedConsumer,
    BrokerUnreachable,
    KafkaOptions,
    KafkaRefused,
    Unreadable,
    UnreadableRecord,
    committed_offsets,
    connect,
    explain,
    group_lag,
    is_permanent,
    poll,
    poll_partition,
    stop_client,
)
from embedq_shared.kafka.clients import KafkaConnections

A, B = TopicPartition("t", 0), TopicPartition("t", 1)


async def forever() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    return


# -- options ------------------------------------------------------------------------------------------------------------


def test_plain_options_name_the_servers_and_the_protocol() -> None:
    assert KafkaOptions(servers="a:1,b:2").client_options() == {
        "bootstrap_servers": "a:1,b:2",
        "security_protocol": "PLAINTEXT",
    }


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("localhost:9092", "localhost:9092"),
        ("a:1, b:2 ,c:3", "a:1,b:2,c:3"),
        (",a:1,,b:2,", "a:1,b:2"),
        ("[::1]:9092", "[::1]:9092"),
        ("10.0.0.7:65535,kafka_1.svc.cluster.local:1", "10.0.0.7:65535,kafka_1.svc.cluster.local:1"),
    ],
)
def test_addresses_are_what_every_client_reads(given: str, taken: str) -> None:
    assert KafkaOptions(servers=given).servers == taken
    assert [
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for host, port, _ in collect_hosts(taken, randomize=False)
    ] == taken.split(",")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("", "got nothing"),
        (" , ,", "got nothing"),
        ("localhost", "such as localhost:9092, got 'localhost', which has no port"),
        ("a:1,b", "got 'b', which has no port"),
        ("http://localhost:9092", "without `http://`, got 'http://localhost:9092'"),
        ("PLAINTEXT://kafka:9092", "without `PLAINTEXT://`"),
        ("a:1,SASL_SSL://b:2", "without `SASL_SSL://`"),
        ("http://localhost", "without `http://`"),
        ("kafka:", "a port is a number"),
        ("kafka:nine", "a port is a number"),
        ("kafka:0", "a port is a number"),
        ("kafka:65536", "a port is a number"),
        ("kafka:-1", "a port is a number"),
        ("kafka:٩", "a port is a number"),
        ("kafka:9092/topic", "a port is a number"),
        (":9092", "several separated by commas, got ':9092'"),
        ("a:1 b:2", "separated by commas, got 'a:1 b:2'"),
        ("a:1;b:2", "separated by commas, got 'a:1;b:2'"),
        ("::1", r"as \[address\]:port, got '::1'"),
        ("fe80::1:9092", r"as \[address\]:port"),
        ("[::1]", r"as \[address\]:port"),
        ("[::1]9092", r"as \[address\]:port"),
        ("[kafka]:9092", "only an IPv6 address in brackets"),
    ],
)
def test_what_is_no_address_is_named_before_anybody_looks_for_it(wrong: str, told: str) -> None:
    with pytest.raises(BadOption, match=f"^servers: expected host:port.*{told}"):
        KafkaOptions(servers=wrong)


def test_a_login_in_an_address_is_not_repeated() -> None:
    for wrong in ("user:hunter2@kafka:9092", "kafka://user:hunter2@kafka:9092"):
        with pytest.raises(BadOption) as raised:
            KafkaOptions(servers=wrong)
        assert "hunter2" not in str(raised.value)


def test_names_and_passwords_go_to_the_client_as_they_are_and_are_not_shown() -> None:
    given = KafkaOptions(
        servers="a:1",
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_plain_username="u",
        sasl_plain_password="secret",
    )
    options = given.client_options()

    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("u", "secret")
    assert "secret" not in repr(given)
    assert "ssl_context" not in options


def test_tls_makes_a_context_that_checks_host_names_unless_one_is_given() -> None:
    made = KafkaOptions(servers="a:1", security_protocol="SSL").client_options()["ssl_context"]
    mine = ssl.create_default_context()

    assert made.check_hostname
    assert made.verify_mode is ssl.CERT_REQUIRED
    given = KafkaOptions(servers="a:1", security_protocol="SSL", ssl_context=mine)
    assert given.client_options()["ssl_context"] is mine


def test_a_certificate_file_that_is_not_there_is_named() -> None:
    with pytest.raises(
        BadOption, match=r"^ssl_cafile: expected readable PEM files.*/nowhere.pem \(No such file"
    ):
        KafkaOptions(servers="a:1", security_protocol="SSL", ssl_cafile="/nowhere.pem").client_options()


# -- stopping -----------------------------------------------------------------------------------------------------------


class Connections:
    """aiokafka's inner client."""

    hosts = ()
    _sasl_mechanism = "PLAIN"

    def __init__(self, close: Callable[[], Awaitable[None]] = at_once) -> None:
        self._close = close
        self.closed = False

    async def close(self) -> None:
        await self._close()
        self.closed = True


class Producer(AIOKafkaProducer):  # type: ignore[misc]
    def __init__(self, stop: Callable[[], Awaitable[None]], connections: Connections | None = None) -> None:
        self._closed = True  # for its __del__
        self._stop = stop
        self.client = connections or Connections()
        self.sender: asyncio.Task[None] = asyncio.ensure_future(forever())
        self._sender: Any = SimpleNamespace(sender_task=self.sender)

    async def stop(self) -> None:
        await self._stop()


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
    def __init__(self, stop: Callable[[], Awaitable[None]]) -> None:
        self._closed = True
        self._stop = stop
        self._client = Connections()
        self._fetcher = Connections()

    async def stop(self) -> None:
        await self._stop()


class Admin(AIOKafkaAdminClient):  # type: ignore[misc]
    def __init__(self, stop: Callable[[], Awaitable[None]]) -> None:
        self._stop = stop
        self._client = Connections()

    async def close(self) -> None:
        await self._stop()


async def test_a_client_that_stops_is_left_alone() -> None:
    producer, consumer, admin = Producer(at_once), Consumer(at_once), Admin(at_once)

    assert [await stop_client(client, 1.0) for client in (producer, consumer, admin)] == [None] * 3
    assert not producer.sender.cancelled()
    assert not any(connections.closed for connections in (producer.client, consumer._client, admin._client))
    producer.sender.cancel()


async def test_a_producer_that_hangs_loses_its_sender_and_its_connections() -> None:
    producer = Producer(forever)

    assert await stop_client(producer, 0.01) == "TimeoutError"
    assert producer.sender.cancelled()
    assert producer.client.closed


async def test_a_producer_without_a_sender_can_hang_too() -> None:
    producer = Producer(forever)
    producer.sender.cancel()
    producer._sender = None

    assert await stop_client(producer, 0.01) == "TimeoutError"
    assert producer.client.closed


async def test_a_consumer_that_hangs_loses_its_fetcher_and_its_connections() -> None:
    consumer = Consumer(forever)

    assert await stop_client(consumer, 0.01) == "TimeoutError"
    assert consumer._fetcher.closed
    assert consumer._client.closed


async def test_an_admin_client_that_hangs_loses_its_connections() -> None:
    admin = Admin(forever)

    assert await stop_client(admin, 0.01) == "TimeoutError"
    assert admin._client.closed


async def test_connections_that_hang_as_well_do_not_keep_us() -> None:
    producer = Producer(forever, Connections(forever))

    assert await stop_client(producer, 0.01) == "TimeoutError"
    assert producer.sender.cancelled()


async def test_what_stopping_raises_is_named_and_not_raised() -> None:
    async def refuse() -> None:
        raise KafkaError("no")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert await stop_client(Consumer(refuse), 1.0) == "KafkaError"
    assert await stop_client(Consumer(cancelled), 1.0) == "CancelledError"


async def test_a_cancelled_stop_leaves_no_task_behind_not_even_the_sender() -> None:
    before = asyncio.all_tasks()
    stopping = asyncio.ensure_future(stop_client(Producer(forever), 10.0))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == before


# -- connecting ---------------------------------------------------------------------------------------------------------


class Starting(Consumer):
    """A consumer whose start does what a script says."""

    def __init__(self, start: Callable[[], Awaitable[None]]) -> None:
        super().__init__(at_once)
        self._start = start

    async def start(self) -> None:
        await self._start()


async def test_connecting_tries_again_with_a_new_client() -> None:
    async def fail() -> None:
        raise KafkaConnectionError("refused\nand more")

    made = [Starting(fail), Starting(fail), Starting(at_once)]
    tried = iter(made)

    assert await connect(lambda: next(tried), 5.0) is made[2]


async def test_connecting_ends_at_its_deadline_with_the_last_reason() -> None:
    async def fail() -> None:
        raise KafkaConnectionError("refused\nand more")

    with pytest.raises(BrokerUnreachable, match=r"refused$"):
        await connect(lambda: Starting(fail), 0.01)
    with pytest.raises(BrokerUnreachable, match=r"no answer within 0\.01 s"):
        await connect(lambda: Starting(forever), 0.01)


async def test_connecting_does_not_hide_our_own_faults() -> None:
    async def wrong() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await connect(lambda: Starting(wrong), 5.0)


class Starved(KafkaConnections):
    """A client whose broker names `later` nodes once it is asked again; node 7 coordinates everything."""

    def __init__(self, later: int) -> None:
        super().__init__(bootstrap_servers="localhost:1")
        self._later = later

    def force_metadata_update(self) -> Any:
        self.cluster._brokers = {
            number: BrokerMetadata(number, "localhost", 1, None) for number in range(self._later)
        }
        return asyncio.ensure_future(self._answered())

    async def send(self, node_id: int, request: Any, **options: Any) -> Any:
        return SimpleNamespace(error_code=0, coordinator_id=7)

    async def _answered(self) -> bool:
        return bool(self._later)


async def test_a_broker_that_knows_no_brokers_yet_is_asked_again() -> None:
    assert await Starved(1).coordinator_lookup(0, "group") == 7
    with pytest.raises(KafkaConnectionError, match="knows no brokers yet") as raised:
        await Starved(0).coordinator_lookup(0, "group")
    assert raised.value.retriable  # aiokafka's own loop looks again


def test_back_off_doubles_up_to_its_limit_and_half_of_it_is_random() -> None:
    pauses = [backoff(n, first_s=0.5, longest_s=3.0, draw=lambda: 1.0) for n in range(5)]

    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff(1, first_s=0.5, longest_s=3.0, draw=lambda: 0.0) == 0.5
    assert backoff(10_000, first_s=0.5, longest_s=3.0, draw=lambda: 1.0) == 3.0


# -- records that cannot be read ----------------------------------------------------------------------------------------


class Log:
    """A consumer over partitions in memory."""

    def __init__(self, partitions: dict[TopicPartition, Sequence[bytes]]) -> None:
        self._records = partitions
        self._positions = dict.fromkeys(partitions, 0)
        self.most: list[int] = []

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> dict[TopicPartition, list[Any]]:
        self.most.append(max_records)
        found = {}
        for tp in partitions or self._records:
            start = self._positions[tp]
            self._positions[tp] = len(self._records[tp])
            found[tp] = [
                SimpleNamespace(topic=tp.topic, partition=tp.partition, offset=n, value=self._records[tp][n])
                for n in range(start, len(self._records[tp]))
            ]
        return {tp: records for tp, records in found.items() if records}


BAD = Unreadable(1, "why")


@pytest.mark.parametrize("whole", [False, True])
async def test_in_a_poll_what_cannot_be_read_stands_among_the_others(whole: bool) -> None:
    consumer = Log({A: [b"one", BAD, b"two"]})
    found = await (poll(consumer, timeout_ms=0) if whole else poll_partition(consumer, A, timeout_ms=0))

    first, second, third = found
    assert [getattr(record, "value", None) for record in (first, third)] == [b"one", b"two"]
    assert second == UnreadableRecord(topic="t", partition=0, first_offset=1, offset=1, reason="why")
    assert await poll_partition(consumer, A, timeout_ms=0) == []


async def test_a_poll_of_all_partitions_is_one_call() -> None:
    consumer = Log({A: [b"one"], B: [b"two"]})

    found: list[Any] = await poll(consumer, timeout_ms=0)
    assert [record.value for record in found] == [b"one", b"two"]
    assert len(consumer.most) == 1


async def test_a_poll_takes_a_bounded_number_of_records() -> None:
    """A batch of 64 MiB may hold millions."""
    consumer = Log({A: [], B: []})
    await poll(consumer, timeout_ms=0)
    await poll_partition(consumer, A, timeout_ms=0)

    assert consumer.most == [1_000, 1_000]


# -- groups -------------------------------------------------------------------------------------------------------------


class Cluster:
    """An admin client and a consumer's offsets, with the answers of a script before the right one."""

    def __init__(self, committed: dict[TopicPartition, int], *before: Any) -> None:
        self._committed = committed
        self._before = list(before)

    async def list_consumer_group_offsets(
        self, group: str, *, partitions: list[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        assert group == "mine"
        if self._before:
            first = self._before.pop(0)
            if isinstance(first, Exception):
                raise first
            return first  # type: ignore[no-any-return]
        return {tp: OffsetAndMetadata(self._committed.get(tp, -1), "") for tp in partitions}

    async def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        return [{"topic": name, "partitions": [{"partition": 0}, {"partition": 1}]} for name in names]

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 5)

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 20)


async def test_committed_offsets_wait_for_the_groups_coordinator() -> None:
    """Also where aiokafka overlooks the error, and gives an answer without any partition."""
    cluster = Cluster({A: 7}, GroupCoordinatorNotAvailableError(), GroupLoadInProgressError(), {})

    assert await committed_offsets(cluster, "mine", [A, B]) == {A: 7, B: -1}


async def test_other_errors_of_the_brokers_are_raised() -> None:
    with pytest.raises(TopicAuthorizationFailedError):
        await committed_offsets(Cluster({}, TopicAuthorizationFailedError()), "mine", [A])


async def test_lag_counts_what_is_there_and_not_committed() -> None:
    """Committed within the topic, before its beginning, never, and beyond the end of a topic that was made anew."""
    cluster = Cluster({A: 18, TopicPartition("u", 0): 2, TopicPartition("u", 1): 30})

    assert await group_lag(cluster, cluster, "mine", ["t", "u"]) == {"t": 2 + 15, "u": 15 + 15}


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TopicAuthorizationFailedError("embed.jobs"), "this user has no right to topic embed.jobs"),
        (TopicAuthorizationFailedError({"b", "a"}), "this user has no right to topic a, b"),
        (GroupAuthorizationFailedError("embedq"), "this user has no right to consumer group embedq"),
        (ClusterAuthorizationFailedError(), "this user has no right to cluster"),
        (KafkaRefused("the broker says no"), "the broker says no"),
    ],
)
async def test_a_refusal_is_permanent_said_in_words_and_ends_connecting_at_once(
    error: KafkaError, said: str
) -> None:
    tried = 0

    async def refuse() -> None:
        nonlocal tried
        tried += 1
        raise error

    assert is_permanent(error)
    assert explain(error) == said
    with pytest.raises(KafkaRefused, match=f"^{said}$"):
        await connect(lambda: Starting(refuse), 60.0)
    assert tried == 1


@pytest.mark.parametrize(
    "error",
    [KafkaConnectionError("gone"), KafkaError(), BrokerUnreachable("why"), OSError("no"), TimeoutError()],
)
def test_what_may_heal_is_not_permanent(error: Exception) -> None:
    assert not is_permanent(error)


async def test_a_port_that_nobody_listens_at_or_that_says_nothing_is_no_refusal() -> None:
    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        for protocol in ("PLAINTEXT", "SSL"):
            options = KafkaOptions(
                servers=f"127.0.0.1:1,127.0.0.1:{port}",
                security_protocol=protocol,
            ).client_options()
            with pytest.raises(BrokerUnreachable):
                await connect(lambda options=options: BoundedConsumer(**options), 0.3)  # type: ignore[misc]
