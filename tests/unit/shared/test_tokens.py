"""Where tokens come from: a file that rotates, an issuer that is asked rarely, and what both say when there is none."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from embedq_shared.kafka import BadOption, OAuthOptions, explain, is_permanent
from embedq_shared.kafka.security.tokens import IssuedToken, TokenRefused, TokenUnavailable
from embedq_shared.secret import Secret
from tests.helpers.http_server import serving

SECRET = "s3cret: with+signs"


class Issuer:
    """A token endpoint that answers what it is told to."""

    def __init__(self) -> None:
        self.code = 200
        self.answer: bytes = b""
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        issuer = self

        class Endpoint(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                issuer.asked.append((self.headers["Authorization"], parse_qs(body)))
                self.send_response(issuer.code)
                for name, value in issuer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(issuer.answer)

            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

        self.endpoint = Endpoint
        self.port = 0
        self.gives("first", 100)

    def gives(self, token: str, life_s: Any) -> None:
        self.answer = json.dumps({"access_token": token, "expires_in": life_s}).encode()

    @property
    def options(self) -> OAuthOptions:
        return OAuthOptions(
            token_url=f"http://127.0.0.1:{self.port}/token",
            client_id="us",
            client_secret=Secret(SECRET),
            scope="kafka",
        )


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    with serving(made.endpoint) as server:
        made.port = server.server_port
        yield made


async def test_a_file_is_read_each_time(tmp_path: Path) -> None:
    provider = OAuthOptions(token_file=str(tmp_path / "token")).provider()
    with pytest.raises(TokenUnavailable, match=r"no token: .*token cannot be read \(No such file") as error:
        await provider.token()
    assert not is_permanent(error.value)
    (tmp_path / "token").write_text("one\n")
    assert await provider.token() == "one"
    (tmp_path / "token").write_text("two\n")
    assert await provider.token() == "two"


async def test_an_issuer_is_asked_once_for_many_connections_and_again_before_the_token_ends(
    issuer: Issuer,
) -> None:
    now = 0.0
    provider = IssuedToken(issuer.options, clock=lambda: now)

    assert set(await asyncio.gather(*(provider.token() for _ in range(5)))) == {"first"}
    issuer.gives("second", 100)
    now = 79.0
    assert await provider.token() == "first"
    now = 81.0
    assert await provider.token() == "second"

    assert len(issuer.asked) == 2
    login, form = issuer.asked[0]
    assert base64.b64decode(login.removeprefix("Basic ")) == b"us:s3cret%3A+with%2Bsigns"
    assert form == {"grant_type": ["client_credentials"], "scope": ["kafka"]}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, TokenRefused),
        (401, TokenRefused),
        (403, TokenRefused),
        (429, TokenUnavailable),
        (503, TokenUnavailable),
    ],
)
async def test_an_issuer_that_refuses_is_told_from_one_that_cannot(
    issuer: Issuer, code: int, kind: type[Exception]
) -> None:
    issuer.code = code
    issuer.answer = json.dumps({"error": "invalid_client", "error_description": SECRET}).encode()
    with pytest.raises(kind) as error:
        await issuer.options.provider().token()
    assert is_permanent(error.value) == (kind is TokenRefused)
    assert f"refuses client us (HTTP {code}, invalid_client)" in explain(error.value)
    assert "s3cret" not in explain(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"access_token": 7}',
        b'{"access_token": ""}',
        b'{"access_token": "a", "expires_in": "soon"}',
        b'{"access_token": "a", "expires_in": -1}',
        b"[" * 100_000,
    ],
)
async def test_an_answer_without_a_token_is_none(issuer: Issuer, answer: bytes) -> None:
    issuer.answer = answer
    with pytest.raises(TokenUnavailable, match="answers with something else"):
        await issuer.options.provider().token()


async def test_our_secret_follows_no_redirect(issuer: Issuer) -> None:
    issuer.code = 307
    issuer.headers = {"Location": "http://127.0.0.1:1/elsewhere"}
    with pytest.raises(TokenUnavailable, match="HTTP 307"):
        await issuer.options.provider().token()
    assert len(issuer.asked) == 1


async def test_an_issuer_that_does_not_answer_is_waited_for() -> None:
    options = OAuthOptions(token_url="http://localhost:1/token", client_id="us", client_secret=Secret(SECRET))
    with pytest.raises(TokenUnavailable, match="http://localhost:1 does not answer") as error:
        await options.provider().token()
    assert not is_permanent(error.value)


@pytest.mark.parametrize(
    "url", ["http://issuer/token", "ftp://localhost/x", "issuer", "https://u:p@issuer/t"]
)
def test_an_address_that_would_show_the_secret_is_refused(url: str) -> None:
    with pytest.raises(BadOption) as error:
        OAuthOptions(token_url=url, client_id="us", client_secret=Secret(SECRET)).provider()
    assert error.value.option == "oauth_token_url"
    assert "u:p" not in str(error.value)


def test_certificates_of_the_issuers_authority_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"oauth_cafile: expected a readable PEM file"):
        OAuthOptions(
            token_url="https://issuer",
            client_id="us",
            client_secret=Secret(SECRET),
            cafile=str(tmp_path / "no"),
        ).provider()
