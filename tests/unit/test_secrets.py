"""Secrets are in no text that anybody may see: not of the settings, nor of any struct that a room gets from them."""

from __future__ import annotations

import json
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from embedq_consumer.settings import Settings, SettingsError
from embedq_sdk import InvalidArgument
from embedq_sdk.cli.kafka_options import KafkaTarget
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_shared.kafka import BadOption, KafkaOptions, OAuthOptions
from embedq_shared.secret import Secret, read_secret

HIDDEN = "hunter2-and-more"
NEEDED = {"EMBEDQ_KAFKA_SERVERS": "localhost:9092", "EMBEDQ_MODEL": "/models/one"}
SECRET_NAME = re.compile(r"password|secret|(^|_)token$|_key$")
SASL = {
    "EMBEDQ_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
    "EMBEDQ_KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
    "EMBEDQ_KAFKA_SASL_USERNAME": "u",
}
OAUTH = {
    "EMBEDQ_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
    "EMBEDQ_KAFKA_SASL_MECHANISM": "OAUTHBEARER",
    "EMBEDQ_KAFKA_OAUTH_TOKEN_URL": "https://issuer/token",
    "EMBEDQ_KAFKA_OAUTH_CLIENT_ID": "us",
}


def secret_fields(kind: type[msgspec.Struct]) -> list[str]:
    hints = get_type_hints(kind)
    return [name for name in kind.__struct_fields__ if hints[name] is Secret]


FIELDS = secret_fields(Settings)


def with_secrets(**environ: str) -> Settings:
    return Settings.from_env(NEEDED | {f"EMBEDQ_{name.upper()}": HIDDEN for name in FIELDS} | environ)


def shown(value: object) -> Iterator[str]:
    yield repr(value)
    yield str(value)
    yield f"{value}"
    yield "%s %r" % (value, value)  # noqa: UP031  # as a log line may
    yield repr({"in": [value]})


# -- the type --------------------------------------------------------------------------------------------------------------


def test_a_secret_is_the_text_for_a_client_and_stars_for_a_reader() -> None:
    secret = Secret(HIDDEN)
    assert all(HIDDEN not in text and "***" in text for text in shown(secret))
    assert secret.reveal() == HIDDEN == Secret(secret).reveal()
    assert type(secret.reveal()) is str
    pair = ["u", secret]
    assert "\0".join(pair).encode() == b"u\0" + HIDDEN.encode()
    assert (secret.encode(), secret == HIDDEN, bool(secret), bool(Secret(""))) == (
        HIDDEN.encode(),
        True,
        True,
        False,
    )


def test_a_secret_is_neither_pickled_nor_encoded() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret(HIDDEN))
    with pytest.raises(TypeError):
        msgspec.json.encode({"password": Secret(HIDDEN)})
    assert json.dumps(f"{Secret(HIDDEN)}") == '"***"'


# -- every struct that holds one ---------------------------------------------------------------------------------------------


def test_what_is_named_like_a_secret_is_one() -> None:
    assert {"kafka_sasl_password", "kafka_oauth_client_secret"} <= set(FIELDS)
    named = {name for name in Settings.__struct_fields__ if SECRET_NAME.search(name)}
    assert set(FIELDS) - named == {"redis_url"}  # which may hold a password
    assert named <= set(FIELDS)


def test_no_struct_of_the_settings_shows_a_secret() -> None:
    """The settings, and whatever a room gets from them."""
    found = with_secrets(**SASL)
    structs: list[Any] = [found, found.named(), found.kafka()]
    for name, value in vars(Settings).items():
        if isinstance(value, property):
            structs.append(getattr(found, name))
    assert len(structs) > 6
    for struct in structs:
        assert all(HIDDEN not in text for text in shown(struct)), type(struct)
    assert found.kafka()["sasl_plain_password"] == HIDDEN


def test_no_struct_of_the_kafka_room_or_the_command_line_shows_one() -> None:
    security = {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_plain_username": "u",
        "sasl_plain_password": HIDDEN,
    }
    options = KafkaOptions(servers="a:1", **security)  # type: ignore[arg-type]
    oauth = OAuthOptions(token_url="https://a", client_id="u", client_secret=Secret(HIDDEN))
    provider = oauth.provider()
    target = KafkaTarget(
        servers="a:1", prefix="p", security=security | {"sasl_plain_password": Secret(HIDDEN)}
    )
    connection = KafkaConnection.of("a:1", security)
    for value in (options, options.client_options(), oauth, provider, target, connection, vars(connection)):
        assert all(HIDDEN not in text for text in shown(value)), type(value)


def test_no_error_and_no_traceback_shows_one() -> None:
    caught: list[BaseException] = []
    for environ in (
        SASL | {"EMBEDQ_KAFKA_SSL_KEYFILE": "/key"},
        SASL | {"EMBEDQ_KAFKA_SASL_USERNAME": ""},
        OAUTH | {"EMBEDQ_KAFKA_OAUTH_TOKEN_URL": f"http://u:{HIDDEN}@issuer"},
        {"EMBEDQ_HTTP_PORT": "no"},
    ):
        with pytest.raises(SettingsError) as error:
            with_secrets(**environ)
        caught.append(error.value)
    with pytest.raises(InvalidArgument) as argument:
        KafkaConnection.of("a:1", {"security_protocol": "SASL_SSL", "sasl_plain_password": HIDDEN})
    for each in (*caught, argument.value):
        assert HIDDEN not in "".join(traceback.format_exception(each))


# -- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_each_secret_may_be_in_a_file(field: str, end: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b" with space \n\nand lines" + end)
    found = Settings.from_env(NEEDED | {f"EMBEDQ_{field.upper()}_FILE": str(tmp_path / "secret")})
    assert getattr(found, field).reveal() == " with space \n\nand lines"


@pytest.mark.parametrize("field", FIELDS)
def test_a_secret_that_is_set_twice_is_an_error(field: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(HIDDEN)
    name = f"EMBEDQ_{field.upper()}"
    with pytest.raises(SettingsError, match=f"^{name}: cannot be set together with {name}_FILE$"):
        Settings.from_env(NEEDED | {name: "x", f"{name}_FILE": str(tmp_path / "secret")})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read (No such file"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_file_that_holds_no_secret_is_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    with pytest.raises(SettingsError) as error:
        Settings.from_env(NEEDED | {"EMBEDQ_KAFKA_SASL_PASSWORD_FILE": str(tmp_path / "secret")})
    assert str(error.value).startswith("EMBEDQ_KAFKA_SASL_PASSWORD_FILE: expected a file with one secret; ")
    assert why in str(error.value)


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ValueError, match="longer than"):
        read_secret("/dev/zero")


# -- what belongs together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"EMBEDQ_KAFKA_SSL_KEYFILE": "/key.pem"},
            "EMBEDQ_KAFKA_SSL_CERTFILE: expected the certificate of the key in EMBEDQ_KAFKA_SSL_KEYFILE, got nothing",
        ),
        (
            SASL | {"EMBEDQ_KAFKA_SASL_USERNAME": ""},
            "EMBEDQ_KAFKA_SASL_USERNAME: expected a user name for SCRAM-SHA-256, got nothing",
        ),
        (SASL, "EMBEDQ_KAFKA_SASL_PASSWORD: expected a password for SCRAM-SHA-256, got nothing"),
        (
            SASL | {"EMBEDQ_KAFKA_SASL_MECHANISM": "OAUTHBEARER"},
            "EMBEDQ_KAFKA_OAUTH_TOKEN_URL: expected either it or EMBEDQ_KAFKA_OAUTH_TOKEN_FILE for OAUTHBEARER, got neither",
        ),
        (
            OAUTH,
            "EMBEDQ_KAFKA_OAUTH_CLIENT_SECRET: expected a value for EMBEDQ_KAFKA_OAUTH_TOKEN_URL, got nothing",
        ),
        (
            OAUTH | {"EMBEDQ_KAFKA_OAUTH_TOKEN_FILE": "/token"},
            "EMBEDQ_KAFKA_OAUTH_TOKEN_URL: expected either it or EMBEDQ_KAFKA_OAUTH_TOKEN_FILE for OAUTHBEARER, got both",
        ),
        (
            OAUTH
            | {
                "EMBEDQ_KAFKA_OAUTH_CLIENT_SECRET": "s",
                "EMBEDQ_KAFKA_OAUTH_TOKEN_URL": "http://issuer.example/token",
            },
            "EMBEDQ_KAFKA_OAUTH_TOKEN_URL: expected an https:// address, got one with http://",
        ),
        (
            SASL | {"EMBEDQ_KAFKA_SASL_MECHANISM": "GSSAPI"},
            "EMBEDQ_KAFKA_SASL_MECHANISM: expected one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER, got 'GSSAPI'",
        ),
    ],
)
def test_what_does_not_fit_together_is_said_at_once(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_env(NEEDED | environ)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("security", "option"),
    [
        ({"security_protocol": "TLS"}, "security_protocol"),
        ({"ssl_keyfile": "/key"}, "ssl_certfile"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "MAGIC"}, "sasl_mechanism"),
        ({"security_protocol": "SASL_SSL", "sasl_plain_username": "u"}, "sasl_plain_password"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}, "sasl_oauth_token_provider"),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "OAUTHBEARER",
                "sasl_oauth_token_provider": "token",
            },
            "sasl_oauth_token_provider",
        ),
    ],
)
def test_the_sdk_names_the_argument_that_does_not_fit(security: dict[str, Any], option: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        KafkaConnection.of("a:1", security)
    assert error.value.argument == option
    with pytest.raises(BadOption):
        KafkaOptions(servers="a:1", **security)
