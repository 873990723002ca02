"""A broker that lets nobody in without a certificate, a password or a token, and to nothing without a right."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import msgspec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from embedq_sdk.dev import DevStack
from embedq_sdk.dev.jars import KafkaFiles
from embedq_sdk.dev.kafka_server import KafkaServer
from embedq_sdk.dev.ports import HOST, free_ports
from tests.helpers.certificates import make_certificates, openssl
from tests.helpers.programs import own_environ
from tests.helpers.support import patient

PASSWORD: Final = "correct horse battery staple=,"
"""Of every user; with the characters that formats like to quote."""
USERS: Final = (
    *("alice", "service", "caller", "producer", "reader", "operator", "undertaker", "administrator"),
    "groupless",
)
AUDIENCE: Final = "embedq-tests"
SASL: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
IN_THE_CLEAR: Final = ("PLAIN", "SCRAM-SHA-512")


class SecuredKafka(msgspec.Struct, frozen=True, kw_only=True):
    """Where each listener of the broker is, and what opens it. Whoever comes to `open` may do everything."""

    stack: DevStack
    open: str
    tls: str
    """With a server's certificate."""
    mutual_tls: str
    """Asks for a client's, too."""
    sasl: str
    """In the clear, and by two mechanisms only."""
    sasl_tls: str
    files: Path
    """`ca.pem`, `client.pem` and `client.key`, and those of `expired`, `stranger` (another authority); `jwks.json`."""

    def file(self, name: str) -> str:
        return str(self.files / name)

    def security(
        self, user: str = "alice", mechanism: str = "SCRAM-SHA-512", **changes: Any
    ) -> dict[str, Any]:
        """Arguments of the SDK for a user of `sasl_tls`."""
        return {
            "security_protocol": "SASL_SSL",
            "ssl_cafile": self.file("ca.pem"),
            "sasl_mechanism": mechanism,
            "sasl_plain_username": user,
            "sasl_plain_password": PASSWORD,
        } | changes

    def environ(
        self, user: str = "alice", mechanism: str = "SCRAM-SHA-512", **changes: str
    ) -> dict[str, str]:
        """The same as variables of the service and the command line."""
        return {
            "EMBEDQ_KAFKA_SERVERS": self.sasl_tls,
            "EMBEDQ_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "EMBEDQ_KAFKA_SSL_CAFILE": self.file("ca.pem"),
            "EMBEDQ_KAFKA_SASL_MECHANISM": mechanism,
            "EMBEDQ_KAFKA_SASL_USERNAME": user,
            "EMBEDQ_KAFKA_SASL_PASSWORD": PASSWORD,
        } | changes

    def token(self, user: str = "alice", *, lasts_s: float = 3600.0, **claims: Any) -> str:
        """A token as an issuer would sign it."""
        now = time.time()
        body = {"sub": user, "aud": AUDIENCE, "iat": int(now) - 3600, "exp": int(now + lasts_s)} | claims
        head = {"alg": "RS256", "typ": "JWT", "kid": "tests"}
        signed = b".".join(_base64(json.dumps(part).encode()) for part in (head, body))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self.file("issuer.key")],
            input=signed,
            capture_output=True,
            check=True,
            timeout=patient(30),
        ).stdout
        return b".".join((signed, _base64(signature))).decode()


@contextmanager
def secured_kafka(directory: Path) -> Iterator[SecuredKafka]:
    """Start it; `directory` keeps its certificates."""
    _make_files(directory)
    ports = dict(zip(("SSL", "MTLS", "SASL_PLAINTEXT", "SASL_SSL"), free_ports(4), strict=True))
    plain_properties = KafkaServer._properties

    def properties(server: KafkaServer, node: int) -> dict[str, str]:
        return _secured(plain_properties(server, node), ports, directory)

    plain_command = KafkaFiles.command

    def command(files: KafkaFiles, java_options: Sequence[str], home: Path) -> list[str]:
        return plain_command(files, [*java_options, allowed], home)

    allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls=file://{directory}/jwks.json"
    with (
        patch.object(KafkaServer, "_properties", properties),
        patch.object(KafkaFiles, "command", command),
        DevStack(environ=own_environ()) as stack,
    ):
        asyncio.run(_add_users(stack.kafka_servers))
        yield SecuredKafka(
            stack=stack,
            open=stack.kafka_servers,
            tls=f"{HOST}:{ports['SSL']}",
            mutual_tls=f"{HOST}:{ports['MTLS']}",
            sasl=f"{HOST}:{ports['SASL_PLAINTEXT']}",
            sasl_tls=f"{HOST}:{ports['SASL_SSL']}",
            files=directory,
        )


def _secured(plain: dict[str, str], ports: Mapping[str, int], files: Path) -> dict[str, str]:
    addresses = [f"{name}://{HOST}:{port}" for name, port in ports.items()]
    kinds = ("SSL:SSL", "MTLS:SSL", "SASL_PLAINTEXT:SASL_PLAINTEXT", "SASL_SSL:SASL_SSL")
    modules = "org.apache.kafka.common.security"
    users = " ".join(f'user_{user}="{PASSWORD}"' for user in USERS)
    jaas = {
        "plain": f"{modules}.plain.PlainLoginModule required {users};",
        "scram-sha-256": f"{modules}.scram.ScramLoginModule required;",
        "scram-sha-512": f"{modules}.scram.ScramLoginModule required;",
        "oauthbearer": f"{modules}.oauthbearer.OAuthBearerLoginModule required;",
    }
    found = plain | {
        "listeners": ",".join([plain["listeners"], *addresses]),
        "advertised.listeners": ",".join([plain["advertised.listeners"], *addresses]),
        "listener.security.protocol.map": ",".join([plain["listener.security.protocol.map"], *kinds]),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(files / "broker.store"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(files / "ca.pem"),
        "listener.name.mtls.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": ",".join(SASL),
        "listener.name.sasl_plaintext.sasl.enabled.mechanisms": ",".join(IN_THE_CLEAR),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:alice;User:CN=client",
        "sasl.oauthbearer.jwks.endpoint.url": f"file://{files}/jwks.json",
        "sasl.oauthbearer.expected.audience": AUDIENCE,
        # Else 4.1 takes the client's, which checks neither signature nor audience.
        "sasl.oauthbearer.jwt.validator.class": "org.apache.kafka.common.security.oauthbearer.BrokerJwtValidator",
    }
    for listener in ("sasl_plaintext", "sasl_ssl"):
        prefix = f"listener.name.{listener}"
        found |= {f"{prefix}.{name}.sasl.jaas.config": line for name, line in jaas.items()}
        found[f"{prefix}.oauthbearer.sasl.server.callback.handler.class"] = (
            f"{modules}.oauthbearer.OAuthBearerValidatorCallbackHandler"
        )
    return found


class _ScramResponse(Response):  # type: ignore[misc]  # aiokafka has no type information
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _ScramStruct(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 51
    API_VERSION = 0
    RESPONSE_TYPE = _ScramResponse
    SCHEMA = Schema(
        ("deletions", CompactArray(("name", CompactString("utf-8")), ("tags", TaggedFields))),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _ScramRequest(Request[_ScramStruct]):  # type: ignore[misc]
    """AlterUserScramCredentials, which aiokafka's admin client lacks."""

    API_KEY = 51

    def __init__(self, mechanism: int, name: str) -> None:
        self._mechanism = mechanism
        self._name = name

    def build(self, request_struct_class: Any) -> Any:
        salt, rounds = b"salt" * 4, 4096
        salted = hashlib.pbkdf2_hmac(self._name, PASSWORD.encode(), salt, rounds)
        tags: dict[int, bytes] = {}
        rows = [(user, self._mechanism, rounds, salt, salted, tags) for user in USERS]
        return request_struct_class([], rows, tags)


async def _add_users(servers: str) -> None:
    """Passwords for SCRAM, which brokers keep in the cluster's metadata."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        for mechanism, name in ((1, "sha256"), (2, "sha512")):
            response = await admin._send_request(_ScramRequest(mechanism, name))
            assert {code for _, code, *_ in response.results} == {0}, response
    finally:
        await admin.close()


def _make_files(directory: Path) -> None:
    make_certificates(directory)
    openssl("genrsa", "-out", "issuer.key", "2048", directory=directory)
    shown = openssl("rsa", "-in", "issuer.key", "-noout", "-modulus", directory=directory)
    modulus = bytes.fromhex(shown.decode().strip().removeprefix("Modulus="))
    key = {
        "kty": "RSA",
        "alg": "RS256",
        "use": "sig",
        "kid": "tests",
        "n": _base64(modulus).decode(),
        "e": "AQAB",
    }
    (directory / "jwks.json").write_text(json.dumps({"keys": [key]}))


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
