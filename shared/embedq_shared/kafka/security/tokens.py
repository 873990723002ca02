"""Where a client's OAUTHBEARER token comes from: a file that somebody renews, or an issuer that is asked for it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, Final, NoReturn

import msgspec
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaError

from embedq_shared.access import BadOption
from embedq_shared.secret import Secret, read_secret

_REQUEST_S: Final = 10.0
_MOST_BYTES: Final = 256 * 1024
"""Of an issuer's answer."""
_RENEW_AT: Final = 0.8
"""The part of a token's life after which the next connection asks for a new one."""
_LIFE_S: Final = 300.0
"""Of a token whose issuer does not say (RFC 6749 recommends that it does)."""
_REFUSALS: Final = (400, 401, 403)
"""HTTP codes by which an issuer says that asking again will not help."""
_ERROR_CODE: Final = re.compile(r"[a-z_]{1,40}")
"""An error's name by RFC 6749. Nothing else of an answer is shown: it might repeat what was sent."""
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class TokenUnavailable(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """No token for now: its file is not there yet, or its issuer does not answer. A later connection may get one."""


class TokenRefused(KafkaError):  # type: ignore[misc]
    """The issuer gives no token to this client, however often it is asked."""


class OAuthOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where tokens come from: `token_file` or `token_url`. Empty: not set."""

    token_file: str = ""
    """Its content is the token; read for each connection, since tokens rotate."""
    token_url: str = ""
    """An issuer's token endpoint, asked by the client credentials grant."""
    client_id: str = ""
    client_secret: Secret = Secret("")
    scope: str = ""
    cafile: str = ""
    """Certificates of the authorities to trust (PEM) when the issuer is asked."""

    def provider(self) -> AbstractTokenProvider:
        """What aiokafka asks for a token at each connection. Reads `cafile`.

        Raises:
            BadOption: with one of this struct's fields, after `oauth_`.
        """
        if bool(self.token_file) == bool(self.token_url):
            got = "both" if self.token_file else "neither"
            raise BadOption("oauth_token_url", "either it or `oauth_token_file` for OAUTHBEARER", got)
        if self.token_file:
            return FileToken(self.token_file)
        for field in ("client_id", "client_secret"):
            if not getattr(self, field):
                raise BadOption(f"oauth_{field}", "a value for `oauth_token_url`", "nothing")
        return IssuedToken(self)


class FileToken(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no type information
    """The content of a file, as of now."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def token(self) -> str:
        """The token.

        Raises:
            TokenUnavailable: the file cannot be read.
        """
        try:
            found = await asyncio.to_thread(read_secret, self._path)
        except ValueError as error:
            raise TokenUnavailable(f"no token: {self._path} {error}") from None
        return found.reveal().strip()


class IssuedToken(AbstractTokenProvider):  # type: ignore[misc]
    """A token of an issuer, kept for most of its life: many connections, one request.

    Raises:
        BadOption: the address is neither HTTPS nor this machine's, or the certificates cannot be read.
    """

    def __init__(self, options: OAuthOptions, clock: Callable[[], float] = time.monotonic) -> None:
        parts = urllib.parse.urlsplit(options.token_url)
        if not parts.hostname or not (
            parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
        ):
            raise BadOption("oauth_token_url", "an https:// address", f"one with {parts.scheme or 'no'}://")
        if parts.username or parts.password:
            raise BadOption("oauth_token_url", "an address without a user name", "one with it")
        self._options = options
        self._where = f"{parts.scheme}://{parts.netloc}"
        self._clock = clock
        self._context = None
        if parts.scheme == "https":
            try:
                self._context = ssl.create_default_context(cafile=options.cafile or None)
            except OSError as error:
                raise BadOption(
                    "oauth_cafile", "a readable PEM file", f"{options.cafile} ({error.strerror})"
                ) from error
        self._asking = asyncio.Lock()
        self._token = Secret("")
        self._until = 0.0

    async def token(self) -> str:
        """A token that is good for a while.

        Raises:
            TokenRefused: the issuer knows us, and says no.
            TokenUnavailable: it does not answer, or not with a token.
        """
        async with self._asking:
            if self._clock() >= self._until:
                self._token, life_s = await asyncio.to_thread(self._ask)
                self._until = self._clock() + _RENEW_AT * life_s
            return self._token.reveal()

    def _ask(self) -> tuple[Secret, float]:
        options = self._options
        form = {"grant_type": "client_credentials"} | ({"scope": options.scope} if options.scope else {})
        # RFC 6749, 2.3.1: both are form-encoded before they are put together.
        pair = ":".join(
            urllib.parse.quote_plus(part.encode()) for part in (options.client_id, options.client_secret)
        )
        request = urllib.request.Request(
            options.token_url,
            data=urllib.parse.urlencode(form).encode(),
            headers={
                "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
                "Accept": "application/json",
            },
        )
        opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=self._context), _NoRedirect()
        )
        try:
            with opener.open(request, timeout=_REQUEST_S) as answer:
                found = answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise TokenUnavailable(f"no token: {self._where} does not answer ({why})") from None
        return self._read(found)

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        code = ""
        try:
            answer = json.loads(error.read(_MOST_BYTES))
            if isinstance(answer, dict) and _ERROR_CODE.fullmatch(str(answer.get("error"))):
                code = f", {answer['error']}"
        except (OSError, ValueError, RecursionError, HTTPException):
            pass
        kind = TokenRefused if error.code in _REFUSALS else TokenUnavailable
        raise kind(
            f"no token: {self._where} refuses client {self._options.client_id} (HTTP {error.code}{code})"
        ) from None

    def _read(self, answer: bytes) -> tuple[Secret, float]:
        try:
            found: dict[str, Any] = json.loads(answer)
            token, life_s = found["access_token"], float(found.get("expires_in", _LIFE_S))
            if not isinstance(token, str) or not token or not 0 < life_s < float("inf"):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TokenUnavailable(f"no token: {self._where} answers with something else") from None
        return Secret(token), life_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Our secret goes where the setting says, and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the answer itself is the error."""
