"""`embedq status` where the brokers are new, the group has a name of its own, or every client must show a certificate."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from embedq_sdk import EmbedClient, InvalidArgument
from embedq_sdk.admin.control import service_status
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_sdk.dev.kafka_server import KafkaServer
from embedq_sdk.dev.ports import HOST, free_ports
from tests.helpers.certificates import make_certificates
from tests.helpers.command_line import Run, run_embedq
from tests.helpers.programs import own_environ
from tests.helpers.unreadable_records import plain_producer

pytestmark = pytest.mark.kafka


# -- no coordinator yet -------------------------------------------------------------------------------------------------


@pytest.fixture
def new_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A broker that no group has ever asked for its coordinator, as every broker is when it is new."""
    monkeypatch.setattr(KafkaServer, "open_groups", lambda self: None)
    with DevStack(environ=own_environ()) as stack:
        yield stack.kafka_servers


async def test_status_waits_until_a_new_broker_has_a_group_coordinator(new_broker: str) -> None:
    await create_topics(new_broker, partitions=2, reply_partitions=1)

    done = await run_embedq("status", environ={"EMBEDQ_KAFKA_SERVERS": new_broker})

    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "no live replicas",
        "embed.jobs: 0 jobs waiting",
        "embed.jobs.bulk: 0 jobs waiting",
    ]


# -- the service's group --------------------------------------------------------------------------------------------------


async def test_the_lag_is_that_of_the_group_that_is_asked_for(servers: str, embedq: Run) -> None:
    prefix = f"lag-{uuid.uuid4().hex[:8]}"
    group = f"{prefix}-group"
    await create_topics(servers, prefix=prefix, partitions=2, reply_partitions=1)
    async with plain_producer(servers) as producer:
        for n in range(10):
            await producer.send_and_wait(f"{prefix}.jobs", b"{}", partition=n % 2)
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False)
    await consumer.start()
    try:
        first, second = (TopicPartition(f"{prefix}.jobs", n) for n in range(2))
        consumer.assign([first, second])
        await consumer.commit({first: 5, second: 3})
    finally:
        await consumer.stop()

    found = await service_status(servers, topic_prefix=prefix, group=group)
    by_option = await embedq("status", "--prefix", prefix, "--group", group)
    by_environment = await embedq("status", "--prefix", prefix, EMBEDQ_GROUP=group)
    other = await embedq("status", "--prefix", prefix)

    assert [lane.jobs for lane in found.lag] == [2, 0]
    for shown in (by_option, by_environment):
        assert f"{prefix}.jobs: 2 jobs waiting" in shown.out.splitlines()
    assert f"{prefix}.jobs: 10 jobs waiting" in other.out.splitlines()


async def test_jobs_that_wait_in_retry_topics_are_counted_where_there_are_any(
    servers: str, embedq: Run
) -> None:
    prefix = f"retries-{uuid.uuid4().hex[:8]}"
    await create_topics(servers, prefix=prefix, partitions=2, reply_partitions=1, retry_tiers=2)
    async with plain_producer(servers) as producer:
        for n in range(3):
            await producer.send_and_wait(f"{prefix}.retry.2", b"{}", partition=n % 2)

    found = await service_status(servers, topic_prefix=prefix)
    shown = await embedq("status", "--prefix", prefix)
    as_json = await embedq("status", "--prefix", prefix, "--json")

    assert [(tier.topic, tier.jobs) for tier in found.retries] == [
        (f"{prefix}.retry.1", 0),
        (f"{prefix}.retry.2", 3),
    ]
    assert [line for line in shown.out.splitlines() if ".retry." in line] == [
        f"{prefix}.retry.2: 3 jobs waiting for another run"
    ]
    assert json.loads(as_json.out)["retries"] == [
        {"topic": f"{prefix}.retry.1", "jobs": 0},
        {"topic": f"{prefix}.retry.2", "jobs": 3},
    ]


async def test_a_group_needs_a_name(servers: str) -> None:
    with pytest.raises(InvalidArgument, match="`group`"):
        await service_status(servers, group="")


# -- client certificates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_broker(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address at which a broker asks each client for a certificate."""
    (port,) = free_ports(1)
    properties = KafkaServer._properties

    def with_tls(self: KafkaServer, node: int) -> dict[str, str]:
        plain = properties(self, node)
        return plain | {
            "listeners": f"{plain['listeners']},SSL://{HOST}:{port}",
            "advertised.listeners": f"{plain['advertised.listeners']},SSL://{HOST}:{port}",
            "listener.security.protocol.map": f"{plain['listener.security.protocol.map']},SSL:SSL",
            "ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(certificates / "broker.store"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(certificates / "ca.pem"),
        }

    monkeypatch.setattr(KafkaServer, "_properties", with_tls)
    with DevStack(environ=own_environ()) as stack:
        asyncio.run(create_topics(stack.kafka_servers, partitions=2, reply_partitions=1))
        yield f"{HOST}:{port}"


def test_the_command_line_and_the_client_show_their_certificates(tls_broker: str, certificates: Path) -> None:
    """By option and by the service's environment variables; without one the broker refuses."""
    files = {name: str(certificates / name) for name in ("ca.pem", "client.pem", "client.key")}

    async def work() -> None:
        options = await run_embedq(
            *("status", "--security-protocol", "SSL", "--ssl-cafile", files["ca.pem"]),
            *("--ssl-certfile", files["client.pem"], "--ssl-keyfile", files["client.key"]),
            environ={"EMBEDQ_KAFKA_SERVERS": tls_broker},
        )
        environ = {
            "EMBEDQ_KAFKA_SERVERS": tls_broker,
            "EMBEDQ_KAFKA_SECURITY_PROTOCOL": "SSL",
            "EMBEDQ_KAFKA_SSL_CAFILE": files["ca.pem"],
        }
        without = await run_embedq("status", environ=environ)
        with_variables = await run_embedq(
            *("topics", "create", "--partitions", "2", "--reply-partitions", "1"),
            environ=environ
            | {
                "EMBEDQ_KAFKA_SSL_CERTFILE": files["client.pem"],
                "EMBEDQ_KAFKA_SSL_KEYFILE": files["client.key"],
            },
        )
        assert (options.code, options.err) == (0, "")
        assert options.out.startswith("no live replicas")
        assert without.code == 3
        assert without.err.count("\n") == 1
        assert with_variables.code == 0
        async with EmbedClient(
            tls_broker,
            security_protocol="SSL",
            ssl_cafile=files["ca.pem"],
            ssl_certfile=files["client.pem"],
            ssl_keyfile=files["client.key"],
        ) as client:
            await client.submit("a text")

    asyncio.run(work())
