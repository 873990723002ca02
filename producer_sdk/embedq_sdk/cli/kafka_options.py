"""The options of every command that talks to Kafka, under the names and environment variables that the service has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, get_args

import click
import msgspec

from embedq_shared.kafka import SecurityProtocol

CONNECT_TIMEOUT_S: Final = 5.0
"""A person waits for the first answer."""

_FILE: Final = click.Path(exists=True, dir_okay=False)


class KafkaTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Where a command finds Kafka and embedq's topics, as arguments of the SDK's functions."""

    servers: str
    prefix: str
    security: dict[str, Any]


def kafka_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options below, and their values as its argument `kafka`, a `KafkaTarget`."""

    @functools.wraps(command)
    def with_target(
        *args: Any,
        servers: str,
        prefix: str,
        sasl_username: str | None,
        sasl_password: str | None,
        **rest: Any,
    ) -> Any:
        security = {name: rest.pop(name) for name in _AS_THEY_ARE}
        security |= {"sasl_plain_username": sasl_username, "sasl_plain_password": sasl_password}
        return command(*args, kafka=KafkaTarget(servers=servers, prefix=prefix, security=security), **rest)

    for option in reversed(_OPTIONS):
        with_target = option(with_target)
    return with_target


_AS_THEY_ARE: Final = (
    "security_protocol",
    "ssl_cafile",
    "ssl_certfile",
    "ssl_keyfile",
    "sasl_mechanism",
)
"""Options that the SDK calls by the same names."""

_OPTIONS: Final = (
    click.option(
        "--servers",
        envvar="EMBEDQ_KAFKA_SERVERS",
        required=True,
        show_envvar=True,
        help="Kafka's address: host:port, several separated by commas.",
    ),
    click.option(
        "--prefix",
        envvar="EMBEDQ_TOPIC_PREFIX",
        default="embed",
        show_default=True,
        show_envvar=True,
        help="What the names of embedq's topics begin with.",
    ),
    click.option(
        "--security-protocol",
        envvar="EMBEDQ_KAFKA_SECURITY_PROTOCOL",
        type=click.Choice(get_args(SecurityProtocol)),
        default=get_args(SecurityProtocol)[0],
        show_default=True,
        show_envvar=True,
        help="How to connect and log in.",
    ),
    click.option(
        "--ssl-cafile",
        envvar="EMBEDQ_KAFKA_SSL_CAFILE",
        type=_FILE,
        show_envvar=True,
        help="Certificates of the authorities to trust, PEM. Default: those of the system.",
    ),
    click.option(
        "--ssl-certfile",
        envvar="EMBEDQ_KAFKA_SSL_CERTFILE",
        type=_FILE,
        show_envvar=True,
        help="This client's certificate, PEM, if the brokers ask for one.",
    ),
    click.option(
        "--ssl-keyfile",
        envvar="EMBEDQ_KAFKA_SSL_KEYFILE",
        type=_FILE,
        show_envvar=True,
        help="The private key of --ssl-certfile, PEM. Default: in the same file.",
    ),
    click.option(
        "--sasl-mechanism",
        envvar="EMBEDQ_KAFKA_SASL_MECHANISM",
        type=click.Choice(["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]),
        default="PLAIN",
        show_default=True,
        show_envvar=True,
        help="How to log in with a name and a password.",
    ),
    click.option("--sasl-username", envvar="EMBEDQ_KAFKA_SASL_USERNAME", show_envvar=True, help="The name."),
    click.option(
        "--sasl-password",
        envvar="EMBEDQ_KAFKA_SASL_PASSWORD",
        show_envvar=True,
        help="The password; other users see what is on a command line, so prefer the environment.",
    ),
)
