"""The options of every command that talks to Kafka, under the names and environment variables that the service has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, get_args

import click
import msgspec

from embedq_shared.access import BadOption, SaslMechanism, SecurityProtocol
from embedq_shared.secret import Secret, read_secret

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
    return _with_options(command, _servers(required=True))


def optional_kafka_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a command that can do without: `kafka` is None where no servers are given."""
    return _with_options(command, _servers(required=False))


def _with_options(command: Callable[..., Any], servers_option: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def with_target(*args: Any, servers: str | None, prefix: str, **rest: Any) -> Any:
        given = {name: rest.pop(name) for name in _NAMES}
        security = {name: given[name] for name in _AS_THEY_ARE}
        security["sasl_plain_username"] = given["sasl_username"]
        security["sasl_plain_password"] = _secret(given, "sasl_password")
        if given["security_protocol"].startswith("SASL") and given["sasl_mechanism"] == "OAUTHBEARER":
            security["sasl_oauth_token_provider"] = _provider(given)
        kafka = None
        if servers is not None:
            kafka = KafkaTarget(servers=servers, prefix=prefix, security=security)
        return command(*args, kafka=kafka, **rest)

    for option in reversed((servers_option, *_OPTIONS)):
        with_target = option(with_target)
    return with_target


def _secret(given: dict[str, Any], name: str) -> Secret | None:
    """An option's value, or that of its file."""
    path = given[f"{name}_file"]
    if path is None:
        return None if given[name] is None else Secret(given[name])
    option = f"--{name.replace('_', '-')}"
    if given[name] is not None:
        raise click.UsageError(f"give either {option} or {option}-file")
    try:
        return read_secret(path)
    except ValueError as error:
        raise click.BadParameter(f"{path} {error}", param_hint=f"{option}-file") from None


def _provider(given: dict[str, Any]) -> Any:
    from embedq_shared.kafka import OAuthOptions

    options = OAuthOptions(
        token_file=given["oauth_token_file"] or "",
        token_url=given["oauth_token_url"] or "",
        client_id=given["oauth_client_id"] or "",
        client_secret=_secret(given, "oauth_client_secret") or Secret(""),
        scope=given["oauth_scope"] or "",
        cafile=given["oauth_cafile"] or "",
    )
    try:
        return options.provider()
    except BadOption as error:
        raise click.BadParameter(
            f"expected {error.expected}, got {error.got}", param_hint=f"--{error.option.replace('_', '-')}"
        ) from None


_AS_THEY_ARE: Final = (
    "security_protocol",
    "ssl_cafile",
    "ssl_certfile",
    "ssl_keyfile",
    "sasl_mechanism",
)
"""Options that the SDK calls by the same names."""
_NAMES: Final = (
    *_AS_THEY_ARE,
    "sasl_username",
    "sasl_password",
    "sasl_password_file",
    "oauth_token_file",
    "oauth_token_url",
    "oauth_client_id",
    "oauth_client_secret",
    "oauth_client_secret_file",
    "oauth_scope",
    "oauth_cafile",
)


def _servers(*, required: bool) -> Callable[..., Any]:
    return click.option(
        "--servers",
        envvar="EMBEDQ_KAFKA_SERVERS",
        required=required,
        show_envvar=True,
        help="Kafka's address: host:port, several separated by commas.",
    )


_OPTIONS: Final = (
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
        type=click.Choice(get_args(SaslMechanism)),
        default="PLAIN",
        show_default=True,
        show_envvar=True,
        help="How to log in: with a name and a password, or with a token.",
    ),
    click.option("--sasl-username", envvar="EMBEDQ_KAFKA_SASL_USERNAME", show_envvar=True, help="The name."),
    click.option(
        "--sasl-password",
        envvar="EMBEDQ_KAFKA_SASL_PASSWORD",
        show_envvar=True,
        help="The password; other users see what is on a command line, so prefer the environment.",
    ),
    click.option(
        "--sasl-password-file",
        envvar="EMBEDQ_KAFKA_SASL_PASSWORD_FILE",
        type=_FILE,
        show_envvar=True,
        help="A file that holds the password.",
    ),
    click.option(
        "--oauth-token-file",
        envvar="EMBEDQ_KAFKA_OAUTH_TOKEN_FILE",
        type=_FILE,
        show_envvar=True,
        help="A file that holds the token for OAUTHBEARER.",
    ),
    click.option(
        "--oauth-token-url",
        envvar="EMBEDQ_KAFKA_OAUTH_TOKEN_URL",
        show_envvar=True,
        help="An issuer's token endpoint, which gives tokens for OAUTHBEARER.",
    ),
    click.option(
        "--oauth-client-id",
        envvar="EMBEDQ_KAFKA_OAUTH_CLIENT_ID",
        show_envvar=True,
        help="Who we are to the token endpoint.",
    ),
    click.option(
        "--oauth-client-secret",
        envvar="EMBEDQ_KAFKA_OAUTH_CLIENT_SECRET",
        show_envvar=True,
        help="Our secret there; prefer the environment or a file.",
    ),
    click.option(
        "--oauth-client-secret-file",
        envvar="EMBEDQ_KAFKA_OAUTH_CLIENT_SECRET_FILE",
        type=_FILE,
        show_envvar=True,
        help="A file that holds that secret.",
    ),
    click.option(
        "--oauth-scope",
        envvar="EMBEDQ_KAFKA_OAUTH_SCOPE",
        show_envvar=True,
        help="The scope to ask the token endpoint for.",
    ),
    click.option(
        "--oauth-cafile",
        envvar="EMBEDQ_KAFKA_OAUTH_CAFILE",
        type=_FILE,
        show_envvar=True,
        help="Certificates of the authorities to trust at the token endpoint, PEM.",
    ),
)
