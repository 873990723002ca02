"""Kafka asks who we are: service, SDK and command line say it in every way, and are told which part of it was wrong."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka.abc import AbstractTokenProvider

from embedq_sdk import EmbedClient, KafkaRefused, KafkaUnavailable
from embedq_sdk.admin.control import service_status
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev.ports import HOST
from embedq_shared.topics import Topics
from tests.helpers.command_line import run_embedq
from tests.helpers.http_server import serving
from tests.helpers.secured_kafka import PASSWORD, SecuredKafka, secured_kafka
from tests.helpers.service_process import Replica, replicas
from tests.helpers.support import patient

pytestmark = pytest.mark.kafka

TOPICS: Final = Topics("secured")
SECRET: Final = "the issuer's own secret"


class Token(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no type information
    """A token provider of a user's."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def token(self) -> str:
        return self._token


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    with secured_kafka(tmp_path_factory.mktemp("secured")) as running:
        asyncio.run(create_topics(running.open, prefix=TOPICS.prefix, partitions=2, reply_partitions=1))
        yield running


@contextmanager
def issuer(kafka: SecuredKafka) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A token endpoint: its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({"login": self.headers["Authorization"], "body": body})
            known = len(asked) > 0 and "d3Jvbmc" not in self.headers["Authorization"]
            answer = (
                {"access_token": kafka.token(), "expires_in": 3600, "token_type": "Bearer"}
                if known
                else {"error": "invalid_client", "error_description": self.headers["Authorization"]}
            )
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    with serving(Endpoint) as server:
        yield f"http://{HOST}:{server.server_port}/token", asked


def replica_of(kafka: SecuredKafka, models: Path, log: Path, **environ: str) -> Replica:
    settings = {name.removeprefix("EMBEDQ_").lower(): value for name, value in environ.items()}
    return Replica(kafka.stack, TOPICS, models / "a", log, redis=False, **settings)


# -- who is let in ---------------------------------------------------------------------------------------------------------


def ways(kafka: SecuredKafka, tmp_path: Path) -> dict[str, tuple[str, dict[str, Any], dict[str, str]]]:
    """Each way in: the address, the SDK's arguments, and the variables of service and command line besides them."""
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    (tmp_path / "token").write_text(kafka.token())
    ca = kafka.file("ca.pem")
    found: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
        "TLS and a certificate": (
            kafka.mutual_tls,
            {
                "security_protocol": "SSL",
                "ssl_cafile": ca,
                "ssl_certfile": kafka.file("client.pem"),
                "ssl_keyfile": kafka.file("client.key"),
            },
            {
                "EMBEDQ_KAFKA_SECURITY_PROTOCOL": "SSL",
                "EMBEDQ_KAFKA_SSL_CAFILE": ca,
                "EMBEDQ_KAFKA_SSL_CERTFILE": kafka.file("client.pem"),
                "EMBEDQ_KAFKA_SSL_KEYFILE": kafka.file("client.key"),
            },
        ),
        "OAUTHBEARER": (
            kafka.sasl_tls,
            {
                "security_protocol": "SASL_SSL",
                "ssl_cafile": ca,
                "sasl_mechanism": "OAUTHBEARER",
                "sasl_oauth_token_provider": Token(kafka.token()),
            },
            {
                "EMBEDQ_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
                "EMBEDQ_KAFKA_SSL_CAFILE": ca,
                "EMBEDQ_KAFKA_SASL_MECHANISM": "OAUTHBEARER",
                "EMBEDQ_KAFKA_OAUTH_TOKEN_FILE": str(tmp_path / "token"),
            },
        ),
    }
    for mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        environ = kafka.environ(mechanism=mechanism)
        del environ["EMBEDQ_KAFKA_SASL_PASSWORD"], environ["EMBEDQ_KAFKA_SERVERS"]
        environ["EMBEDQ_KAFKA_SASL_PASSWORD_FILE"] = str(tmp_path / "password")
        found[mechanism] = (kafka.sasl_tls, kafka.security(mechanism=mechanism), environ)
    found["SASL in the clear"] = (
        kafka.sasl,
        kafka.security(security_protocol="SASL_PLAINTEXT", ssl_cafile=None),
        kafka.environ(EMBEDQ_KAFKA_SECURITY_PROTOCOL="SASL_PLAINTEXT"),
    )
    return found


WAYS: Final = (
    *("TLS and a certificate", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"),
    "SASL in the clear",
)


@pytest.mark.parametrize("way", WAYS)
async def test_service_sdk_and_command_line_come_in_each_way(
    kafka: SecuredKafka, models: Path, tmp_path: Path, way: str
) -> None:
    servers, security, environ = ways(kafka, tmp_path)[way]
    environ |= {"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": TOPICS.prefix}
    replica = replica_of(kafka, models, tmp_path / "log", **environ, EMBEDQ_LOG_LEVEL="debug")
    async with replicas(replica):
        async with EmbedClient(servers, topic_prefix=TOPICS.prefix, **security) as client:
            assert (await client.embed("a text", dimensions=32)).shape == (32,)
        done = await run_embedq("embed", "a text", "--dimensions", "32", environ=environ)
        assert (done.code, done.err) == (0, "")
        assert await replica.stop() == 0
    log = replica.log.read_text()
    for secret in (PASSWORD, (tmp_path / "token").read_text()):
        assert secret not in log


async def test_an_issuer_is_asked_for_a_token(kafka: SecuredKafka, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    with issuer(kafka) as (url, asked):
        environ = kafka.environ(mechanism="OAUTHBEARER", EMBEDQ_TOPIC_PREFIX=TOPICS.prefix) | {
            "EMBEDQ_KAFKA_OAUTH_TOKEN_URL": url,
            "EMBEDQ_KAFKA_OAUTH_CLIENT_ID": "us",
            "EMBEDQ_KAFKA_OAUTH_SCOPE": "kafka",
        }
        done = await run_embedq(
            "status", environ=environ | {"EMBEDQ_KAFKA_OAUTH_CLIENT_SECRET_FILE": str(tmp_path / "secret")}
        )
        assert (done.code, done.err) == (0, "")
        assert len(asked) == 1, "a token is kept for most of its life"
        assert asked[0]["body"] == b"grant_type=client_credentials&scope=kafka"

        wrong = await run_embedq(
            "status",
            environ=environ
            | {"EMBEDQ_KAFKA_OAUTH_CLIENT_ID": "wrong", "EMBEDQ_KAFKA_OAUTH_CLIENT_SECRET": SECRET},
        )
    assert wrong.code == 3
    assert "refuses client wrong (HTTP 401, invalid_client)" in wrong.err
    assert SECRET not in wrong.err
    assert wrong.err.count("\n") == 1


# -- who is not ------------------------------------------------------------------------------------------------------------


def refusals(kafka: SecuredKafka) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Each wrong way: the address, the SDK's arguments, and what is said."""
    ca, stranger = kafka.file("ca.pem"), kafka.file("stranger.pem")
    tls = {"security_protocol": "SSL", "ssl_cafile": ca}
    token: dict[str, Any] = {
        "mechanism": "OAUTHBEARER",
        "sasl_plain_username": None,
        "sasl_plain_password": None,
    }
    wrong = "not the password"
    return {
        "password of PLAIN": (
            kafka.sasl_tls,
            kafka.security(mechanism="PLAIN", sasl_plain_password=wrong),
            "refuses user alice or the password",
        ),
        "password of SCRAM": (
            kafka.sasl_tls,
            kafka.security(sasl_plain_password=wrong),
            "refuses user alice or the password",
        ),
        "user": (kafka.sasl_tls, kafka.security("nobody"), "refuses user nobody or the password"),
        "mechanism": (
            kafka.sasl,
            kafka.security(mechanism="SCRAM-SHA-256", security_protocol="SASL_PLAINTEXT", ssl_cafile=None),
            "does not know the SASL mechanism SCRAM-SHA-256; it offers PLAIN, SCRAM-SHA-512",
        ),
        "token": (
            kafka.sasl_tls,
            kafka.security(**token, sasl_oauth_token_provider=Token("no token")),
            "refuses the token",
        ),
        "token of yesterday": (
            kafka.sasl_tls,
            kafka.security(**token, sasl_oauth_token_provider=Token(kafka.token(lasts_s=-100))),
            "the token",
        ),
        "token for somebody else": (
            kafka.sasl_tls,
            kafka.security(**token, sasl_oauth_token_provider=Token(kafka.token(aud="another"))),
            "refuses the token",
        ),
        "authority": (
            kafka.tls,
            tls | {"ssl_cafile": stranger},
            "authority that is not among the trusted ones",
        ),
        "name": (kafka.tls.replace(HOST, "localhost"), tls, "has a certificate for another name"),
        "no certificate": (kafka.mutual_tls, tls, "asks for a client's certificate"),
        "certificate of yesterday": (
            kafka.mutual_tls,
            tls | {"ssl_certfile": kafka.file("expired.pem"), "ssl_keyfile": kafka.file("expired.key")},
            "refuses this client's certificate",
        ),
        "certificate of a stranger": (
            kafka.mutual_tls,
            tls | {"ssl_certfile": stranger, "ssl_keyfile": kafka.file("stranger.key")},
            "refuses this client's certificate",
        ),
        "TLS where there is none": (
            kafka.open,
            tls,
            "speaks no TLS there: expected the security protocol PLAINTEXT",
        ),
        "no TLS where there is": (
            kafka.tls,
            {},
            "speaks TLS there: expected the security protocol SSL or SASL_SSL",
        ),
        "no login where there is one": (kafka.sasl, {}, "asks for a login by SASL (PLAIN"),
        "a login where there is none": (kafka.tls, kafka.security(), "knows no login by SASL there"),
    }


REFUSALS: Final = (
    *(
        "password of PLAIN",
        "password of SCRAM",
        "user",
        "mechanism",
        "token",
        "token of yesterday",
        "token for somebody else",
        "authority",
        "name",
    ),
    *("no certificate", "certificate of yesterday", "certificate of a stranger", "TLS where there is none"),
    *("no TLS where there is", "no login where there is one", "a login where there is none"),
)


@pytest.mark.parametrize("wrong", REFUSALS)
async def test_a_refusal_says_at_once_what_is_wrong_and_shows_no_secret(
    kafka: SecuredKafka, wrong: str
) -> None:
    servers, security, said = refusals(kafka)[wrong]
    began = time.monotonic()
    with pytest.raises(KafkaRefused) as refused:
        async with EmbedClient(servers, topic_prefix=TOPICS.prefix, connect_timeout=patient(60), **security):
            pass
    assert time.monotonic() - began < patient(5)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    for secret in ("not the password", PASSWORD, "no token"):
        assert secret not in f"{refused.value} {refused.value!r}"
    with pytest.raises(KafkaRefused):
        await service_status(servers, topic_prefix=TOPICS.prefix, **security)


async def test_a_broker_whose_certificate_has_expired_says_so(tmp_path: Path, kafka: SecuredKafka) -> None:
    """Nothing of Kafka is needed for it: TLS comes first."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(kafka.file("expired.pem"), kafka.file("expired.key"))
    server = await asyncio.start_server(lambda reader, writer: writer.close(), HOST, 0, ssl=context)
    async with server:
        address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(KafkaRefused, match="has a certificate that has expired"):
            async with EmbedClient(address, security_protocol="SSL", ssl_cafile=kafka.file("ca.pem")):
                pass


async def test_a_broker_that_is_not_there_is_no_refusal(kafka: SecuredKafka) -> None:
    with pytest.raises(KafkaUnavailable) as error:
        await service_status("127.0.0.1:1", connect_timeout=1.0, **kafka.security())
    assert not isinstance(error.value, KafkaRefused)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"EMBEDQ_KAFKA_SASL_PASSWORD": "not the password"}, "refuses user alice or the password"),
        ({"EMBEDQ_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"}, "speaks TLS there"),
        ({"EMBEDQ_KAFKA_SSL_CAFILE": "stranger.pem"}, "not among the trusted ones"),
    ],
    ids=["password", "protocol", "authority"],
)
async def test_a_replica_and_a_command_that_are_refused_end_at_once_with_one_line(
    kafka: SecuredKafka, models: Path, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    environ = kafka.environ() | changes
    environ["EMBEDQ_KAFKA_SSL_CAFILE"] = kafka.file(Path(environ["EMBEDQ_KAFKA_SSL_CAFILE"]).name)
    replica = replica_of(kafka, models, tmp_path / "log", **environ)
    await replica.start(ready=False)
    assert await replica.ended() == 2
    [failed] = [event for event in replica.events() if event["event"] == "failed"]
    assert failed["reason"] == "KafkaRefused"
    assert said in failed["detail"]
    text = replica.log.read_text()
    assert "Traceback" not in text

    done = await run_embedq("status", environ=environ | {"EMBEDQ_TOPIC_PREFIX": TOPICS.prefix})
    assert done.code == 3
    assert said in done.err
    assert done.err.count("\n") == 1
    for secret in (PASSWORD, "not the password"):
        assert secret not in text + done.err
