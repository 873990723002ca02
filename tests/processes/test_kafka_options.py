"""The options that every command has for reaching Kafka."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.certificates import make_certificates
from tests.helpers.command_line import run_embedq


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--ssl-keyfile", "{key}"), "ssl_certfile"),
        (("--ssl-certfile", "{key}"), "ssl_certfile"),
        (("--ssl-cafile", "{key}"), "ssl_cafile"),
    ],
    ids=["a key alone", "a key for a certificate", "a key for an authority"],
)
async def test_certificates_that_cannot_be_used_are_wrong_usage(
    certificates: Path, arguments: tuple[str, str], named: str
) -> None:
    option, file = arguments
    done = await run_embedq(
        *("status", "--security-protocol", "SSL", option, file.format(key=certificates / "client.key")),
        environ={"EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1"},
    )

    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"`{named}`" in done.err


async def test_a_protocol_that_does_not_exist_is_wrong_usage_and_the_others_are_named() -> None:
    done = await run_embedq(
        "status", "--security-protocol", "TLS", environ={"EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1"}
    )

    assert done.code == 2
    assert "'SASL_SSL'" in done.err


@pytest.mark.parametrize(
    "command", [("embed",), ("reload",), ("status",), ("topics", "create")], ids=lambda c: c[0]
)
async def test_every_command_has_every_option(command: tuple[str, ...]) -> None:
    done = await run_embedq(*command, "--help", environ={})

    assert done.code == 0
    for name in ("servers", "prefix", "security-protocol", "ssl-cafile", "ssl-certfile", "ssl-keyfile"):
        assert f"--{name} " in done.out
    for name in (
        "sasl-mechanism",
        "sasl-username",
        "sasl-password",
        "sasl-password-file",
        "oauth-token-file",
    ):
        assert f"--{name} " in done.out


SASL = ("--security-protocol", "SASL_PLAINTEXT", "--sasl-username", "u")
OAUTH = ("--security-protocol", "SASL_PLAINTEXT", "--sasl-mechanism", "OAUTHBEARER")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*SASL,), "`sasl_plain_password`: expected a password for PLAIN"),
        (
            (*SASL, "--sasl-password", "hidden", "--sasl-password-file", "{file}"),
            "give either --sasl-password or --sasl-password-file",
        ),
        ((*SASL, "--sasl-password-file", "{empty}"), "is empty"),
        ((*OAUTH,), "expected either it or `oauth_token_file` for OAUTHBEARER, got neither"),
        ((*OAUTH, "--oauth-token-url", "http://issuer/"), "expected a value for `oauth_token_url`"),
        (
            (
                *OAUTH,
                *("--oauth-token-url", "http://issuer/", "--oauth-client-id", "us"),
                *("--oauth-client-secret-file", "{file}"),
            ),
            "expected an https:// address",
        ),
    ],
    ids=["no password", "two", "an empty file", "no token", "no client", "an issuer without TLS"],
)
async def test_secrets_that_cannot_be_used_are_wrong_usage(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("hidden")
    (tmp_path / "empty").write_text("\n")
    done = await run_embedq(
        "status",
        *(argument.format(file=tmp_path / "file", empty=tmp_path / "empty") for argument in arguments),
        environ={"EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1"},
    )

    assert done.code == 2
    assert said in done.err
    assert "hidden" not in done.err
