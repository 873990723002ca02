"""Real servers: start, stop, pause, restart."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import uuid

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

import redis
from embedq_sdk.dev import DevStack, DevStackError, StartError
from embedq_sdk.dev import stack as stack_room
from embedq_sdk.dev.kafka_probe import cluster_nodes, group_coordinator
from embedq_sdk.dev.ports import free_ports
from embedq_shared import kafka
from tests.helpers.programs import alive, kafka_version, own_environ
from tests.helpers.support import patient, wait_for

pytestmark = pytest.mark.kafka


async def new_topic(servers: str, replicas: int = 1) -> str:
    topic = f"t-{uuid.uuid4().hex}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, replicas)])
    finally:
        await admin.close()
    return topic


async def produce(servers: str, topic: str, *values: bytes) -> None:
    async with AIOKafkaProducer(
        bootstrap_servers=servers, acks="all", max_request_size=3_000_000
    ) as producer:
        for value in values:
            await producer.send_and_wait(topic, value, partition=0)


async def read(servers: str, topic: str, count: int) -> list[bytes]:
    async with AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        async with asyncio.timeout(patient(30)):
            return [(await consumer.getone()).value for _ in range(count)]


def ask_redis(stack: DevStack) -> redis.Redis:
    return redis.Redis.from_url(stack.redis_url, socket_timeout=patient(2))


def kafka_address(stack: DevStack) -> tuple[str, int]:
    host, port = stack.kafka_servers.split(":")
    return host, int(port)


async def test_a_record_goes_through_kafka_and_a_value_through_redis(own_stack: DevStack) -> None:
    topic = await new_topic(own_stack.kafka_servers)
    await produce(own_stack.kafka_servers, topic, b"one", b"two")
    assert await read(own_stack.kafka_servers, topic, 2) == [b"one", b"two"]
    with ask_redis(own_stack) as client:
        assert client.set("k", b"v")
        assert client.get("k") == b"v"


def test_the_descriptions_name_what_runs(own_stack: DevStack) -> None:
    with ask_redis(own_stack) as client:
        version = client.info("server")["redis_version"]
    assert own_stack.kafka_description == f"Apache Kafka {kafka_version()} (embedded process)"
    assert own_stack.redis_description.startswith(f"Redis {version} (embedded process, ")
    assert psutil.Process(own_stack.kafka_pids[1]).name() == "java"


def test_everything_listens_on_the_loopback_interface_alone(own_stack: DevStack) -> None:
    for pid in (own_stack.redis_pid, *own_stack.kafka_pids.values()):
        listening = [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


async def test_extra_properties_reach_the_broker(own_stack: DevStack) -> None:
    topic = await new_topic(own_stack.kafka_servers)
    large = b"x" * 2_500_000  # over the broker's own default of 1 MiB
    await produce(own_stack.kafka_servers, topic, large)
    assert await read(own_stack.kafka_servers, topic, 1) == [large]


@pytest.mark.parametrize("kill", [False, True])
def test_redis_comes_back_on_the_same_port_and_empty(own_stack: DevStack, kill: bool) -> None:
    url, pid = own_stack.redis_url, own_stack.redis_pid
    with ask_redis(own_stack) as client:
        client.set("k", b"v")
        own_stack.stop_redis(kill=kill)
        assert not alive(pid)
        with pytest.raises(redis.ConnectionError):
            client.ping()
        own_stack.start_redis()
        assert own_stack.redis_url == url
        assert own_stack.redis_pid != pid
        assert client.get("k") is None


@pytest.mark.parametrize("kill", [False, True])
async def test_kafka_comes_back_on_the_same_port_with_its_records(own_stack: DevStack, kill: bool) -> None:
    servers, pid = own_stack.kafka_servers, own_stack.kafka_pids[1]
    topic = await new_topic(servers)
    await produce(servers, topic, b"before")
    await asyncio.to_thread(own_stack.stop_kafka, kill=kill)
    assert not alive(pid)
    await asyncio.to_thread(own_stack.start_kafka)
    assert own_stack.kafka_servers == servers
    await produce(servers, topic, b"after")
    assert await read(servers, topic, 2) == [b"before", b"after"]


def test_a_paused_kafka_answers_nobody_until_it_is_resumed(own_stack: DevStack) -> None:
    address = kafka_address(own_stack)
    own_stack.pause_kafka()
    try:
        with pytest.raises(TimeoutError):
            cluster_nodes(*address)
    finally:
        own_stack.resume_kafka()
    assert cluster_nodes(*address)[1] == {1}


def test_a_paused_redis_answers_nobody_until_it_is_resumed(own_stack: DevStack) -> None:
    with ask_redis(own_stack) as client:
        assert client.ping()
        own_stack.pause_redis()
        try:
            with pytest.raises(redis.TimeoutError):
                client.ping()
        finally:
            own_stack.resume_redis()
        assert client.ping()


def test_a_server_that_runs_cannot_be_started_twice(own_stack: DevStack) -> None:
    with pytest.raises(DevStackError, match="redis is running already"):
        own_stack.start_redis()
    with ask_redis(own_stack) as client:
        assert client.ping()


async def test_a_missing_topic_is_made_for_whoever_asks_as_kafka_does_but_our_clients_do_not_ask(
    own_stack: DevStack,
) -> None:
    options = {"bootstrap_servers": own_stack.kafka_servers, "request_timeout_ms": 1000}
    async with kafka.AIOKafkaProducer(**options) as ours:
        with pytest.raises(KafkaError):
            await ours.send_and_wait("nobody-made-this", b"x")
    async with AIOKafkaProducer(**options | {"request_timeout_ms": 20_000}) as theirs:
        await theirs.send_and_wait("nobody-made-this", b"x")


async def test_a_consumer_group_with_a_short_session_is_let_in(own_stack: DevStack) -> None:
    topic = await new_topic(own_stack.kafka_servers)
    await produce(own_stack.kafka_servers, topic, b"one")
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=own_stack.kafka_servers,
        group_id=uuid.uuid4().hex,
        auto_offset_reset="earliest",
        session_timeout_ms=6000,
    ) as consumer:
        async with asyncio.timeout(patient(30)):
            assert (await consumer.getone()).value == b"one"


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed")
async def test_kcat_produces_and_consumes(own_stack: DevStack) -> None:
    topic = await new_topic(own_stack.kafka_servers)
    kcat = ["kcat", "-b", own_stack.kafka_servers, "-t", topic]

    def run(*options: str, given: str = "") -> str:
        return subprocess.run(
            [*kcat, *options], input=given, capture_output=True, text=True, check=True, timeout=patient(30)
        ).stdout

    await asyncio.to_thread(run, "-P", "-H", "content-type=application/json", given='{"a":1}\n')
    assert await asyncio.to_thread(run, "-C", "-o", "beginning", "-e", "-q", "-f", "%h %s") == (
        'content-type=application/json {"a":1}'
    )


def test_servers_outlive_the_thread_that_started_them_and_nothing_outlives_their_end() -> None:
    """The kernel's parent-death signal follows the thread that forked, not its process."""
    stack = DevStack(environ=own_environ())
    starter = threading.Thread(target=stack.start)
    starter.start()
    starter.join()
    try:
        assert group_coordinator(*kafka_address(stack)) == 1  # consumer groups need not wait for their first
        assert cluster_nodes(*kafka_address(stack))[1] == {1}
        directory = stack.directory
        pids = [stack.guardian_pid, stack.redis_pid, *stack.kafka_pids.values()]
        assert all(map(alive, pids))
    finally:
        stack.close()
    assert not any(map(alive, pids))
    assert not directory.exists()
    with pytest.raises(DevStackError, match="not running"):
        _ = stack.kafka_servers
    stack.close()


async def test_three_brokers_go_on_without_one_of_them() -> None:
    stack = DevStack(environ=own_environ(), brokers=3)
    await asyncio.to_thread(stack.start)
    try:
        assert len(stack.kafka_pids) == 3
        topic = await new_topic(stack.kafka_servers, replicas=3)
        await produce(stack.kafka_servers, topic, b"one")
        await asyncio.to_thread(stack.stop_kafka, 1, kill=True)
        await produce(stack.kafka_servers, topic, b"two")
        await asyncio.to_thread(stack.start_kafka, 1)
        assert await read(stack.kafka_servers, topic, 2) == [b"one", b"two"]
    finally:
        await asyncio.to_thread(stack.close)


def test_a_failed_start_shows_the_end_of_the_log_and_leaves_nothing() -> None:
    stack = DevStack(environ=own_environ(), kafka_properties={"num.io.threads": "none"})
    with pytest.raises(StartError) as failed:
        stack.start()
    assert "EMBEDQ_KAFKA_SERVERS" in str(failed.value)  # what to do
    assert "num.io.threads" in str(failed.value)  # the log
    with pytest.raises(DevStackError, match="not running"):
        _ = stack.directory


def test_a_server_that_ends_by_itself_is_noticed() -> None:
    with DevStack(environ={**own_environ(), "EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1"}) as stack:
        stack.check()
        psutil.Process(stack.redis_pid).kill()

        def ended() -> bool:
            stack.check()
            return False

        with pytest.raises(DevStackError, match="redis ended with exit code -9"):
            wait_for(ended, what="the error")


def test_a_redis_port_taken_meanwhile_is_replaced_by_another(
    own_stack: DevStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedq_sdk.dev import stack as module

    answers = [[int(own_stack.redis_url.split(":")[2].split("/")[0])]]
    monkeypatch.setattr(
        module, "free_ports", lambda count, first=(): answers.pop() if answers else free_ports(count)
    )
    with DevStack(environ={**own_environ(), "EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1"}) as second:
        assert second.redis_url != own_stack.redis_url
        with ask_redis(second) as client:
            assert client.ping()


def test_a_kafka_port_taken_meanwhile_is_replaced_by_another(
    own_stack: DevStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedq_sdk.dev import kafka_server as module

    answers = [[kafka_address(own_stack)[1]]]
    monkeypatch.setattr(
        module, "free_ports", lambda count, first=(): answers.pop() if answers else free_ports(count)
    )
    with DevStack(environ={**own_environ(), "EMBEDQ_REDIS_URL": own_stack.redis_url}) as second:
        assert second.kafka_servers != own_stack.kafka_servers
        assert cluster_nodes(*kafka_address(second))[1] == {1}


def test_the_usual_ports_are_the_same_after_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = free_ports(2)
    monkeypatch.setattr(stack_room, "USUAL_KAFKA", usual[:1])
    monkeypatch.setattr(stack_room, "USUAL_REDIS", usual[1:])
    for _ in range(2):
        with DevStack(environ=own_environ(), usual_ports=True) as own:
            assert kafka_address(own)[1] == usual[0]
            assert own.redis_url.endswith(f":{usual[1]}/0") or f":{usual[1]}" in own.redis_url
