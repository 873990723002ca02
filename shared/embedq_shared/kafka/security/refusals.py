"""Refusals that waiting never heals: a wrong password, a missing right, the wrong certificate or protocol.

aiokafka logs why a connection failed and then raises that none was made, whatever the reason; some refusals it does not even
notice. So after a failure `refusal` connects once more, and looks.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Mapping
from typing import Final

from aiokafka import errors
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator, create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.protocol.admin import SaslAuthenticateRequest, SaslHandShakeRequest
from aiokafka.protocol.metadata import MetadataRequest

from embedq_shared.kafka.security.tokens import TokenRefused

_LOOK_S: Final = 5.0
"""For looking at one broker."""
_PERMANENT: Final = (
    TokenRefused,
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.TransactionalIdAuthorizationFailed,
    errors.DelegationTokenAuthorizationFailed,
    ssl.SSLCertVerificationError,
)
_RIGHTS: Final[Mapping[type[KafkaError], str]] = {
    errors.TopicAuthorizationFailedError: "topic",
    errors.GroupAuthorizationFailedError: "consumer group",
    errors.ClusterAuthorizationFailedError: "cluster",
    errors.TransactionalIdAuthorizationFailed: "transactional id",
}
_EXPIRED, _NOT_YET = 10, 9
"""OpenSSL's codes of a certificate's verification."""
_WRONG_NAME: Final = (62, 64)
_UNTRUSTED: Final = (2, 18, 19, 20, 21)
_SAFE: Final = re.compile(r"[\w .,:;'()/-]+")
_PLAIN_OF: Final = {"SASL_PLAINTEXT": "PLAINTEXT", "SASL_SSL": "SSL"}
_CLOSED: Final = (KafkaConnectionError, ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)


class KafkaRefused(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """Kafka does not let us in, or not do what we must, and will not later: the message says which, without secrets."""

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0]) if self.args else type(self).__name__


def is_permanent(error: BaseException) -> bool:
    """Whether waiting never heals it: who we are, what we may, and how we connect are settings, here or there."""
    return isinstance(error, (KafkaRefused, *_PERMANENT))


def explain(error: BaseException) -> str:
    """An error of Kafka's in one line, in an operator's words where there are any."""
    for kind, what in _RIGHTS.items():
        if isinstance(error, kind):
            return f"this user has no right to {what}{_names(error)}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _names(error: KafkaError) -> str:
    """What an authorization error is about, as far as aiokafka says it."""
    found = error.args[0] if error.args else ""
    names = (
        [found]
        if isinstance(found, str)
        else sorted(map(str, found))
        if isinstance(found, set | list)
        else []
    )
    shown = ", ".join(name for name in names if _SAFE.fullmatch(name))
    return f" {shown}" if shown else ""


def uses_tokens(client: AIOKafkaClient) -> bool:
    """Whether it logs in by OAUTHBEARER."""
    return bool(client._sasl_mechanism == "OAUTHBEARER")


async def refusal(client: AIOKafkaClient) -> KafkaRefused | None:
    """Why no broker lets this client in, if one of them says so; None if one lets it in, or if none answers."""
    for host, port, _ in client.hosts:
        look = _Look(client, host, port)
        try:
            async with asyncio.timeout(_LOOK_S):
                why = await look.why()
        except (OSError, KafkaError, EOFError, ValueError, AssertionError):
            continue
        if why is None:
            return None
        return KafkaRefused(f"the broker at {host}:{port} {_without(why, client._sasl_plain_password)}")
    return None


def _without(text: str, secret: str | None) -> str:
    """`text`, in which a broker may have put anything."""
    plain = "".join(secret) if secret else ""
    return text.replace(plain, "***") if plain else text


class _Look:
    """One look at one broker, with a client's options."""

    def __init__(self, client: AIOKafkaClient, host: str, port: int) -> None:
        self._client = client
        self._host = host
        self._port = port
        self._protocol: str = client._security_protocol
        self._mechanism: str = client._sasl_mechanism

    async def why(self) -> str | None:
        """Why it does not let us in, as the end of a sentence; None if it does.

        Raises:
            OSError, KafkaError, TimeoutError: it does not answer, or this says nothing.
        """
        bare = _PLAIN_OF.get(self._protocol, self._protocol)
        try:
            connection = await self._connect(bare)
        except _CLOSED as error:
            return await self._why_no_connection(error)
        try:
            if bare == self._protocol:
                try:
                    await connection.send(MetadataRequest([]))
                except _CLOSED as error:
                    return await self._why_closed(error)
                return None
            return await self._why_no_login(connection)
        finally:
            connection.close()

    async def _connect(self, protocol: str) -> AIOKafkaConnection:
        """To the first answer. With SASL also through the login."""
        client = self._client
        return await create_conn(
            self._host,
            self._port,
            client_id=client._client_id,
            request_timeout_ms=int(_LOOK_S * 1000),
            security_protocol=protocol,
            ssl_context=client._ssl_context,
            sasl_mechanism=client._sasl_mechanism,
            sasl_plain_username=client._sasl_plain_username,
            sasl_plain_password=client._sasl_plain_password,
            sasl_kerberos_service_name=client._sasl_kerberos_service_name,
            sasl_kerberos_domain_name=client._sasl_kerberos_domain_name,
            sasl_oauth_token_provider=client._sasl_oauth_token_provider,
        )

    # -- TLS ----------------------------------------------------------------------------------------------------------

    async def _why_no_connection(self, error: BaseException) -> str:
        """The connection ended before the first answer."""
        if isinstance(error, ConnectionRefusedError):
            raise error
        if (tls := _tls_error(error)) is not None:
            return tls
        if self._protocol in ("SSL", "SASL_SSL"):
            connection = await self._connect("PLAINTEXT")
            connection.close()
            return f"speaks no TLS there: expected the security protocol {self._protocol.replace('SSL', 'PLAINTEXT')}"
        await self._shake_hands()
        secured = "SSL" if self._protocol == "PLAINTEXT" else "SASL_SSL"
        return f"speaks TLS there: expected the security protocol {secured} or SASL_SSL".replace(
            "SASL_SSL or SASL_SSL", "SASL_SSL"
        )

    async def _shake_hands(self) -> None:
        """Whether anything there speaks TLS. Nothing is sent, and nothing believed."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        _, writer = await asyncio.open_connection(self._host, self._port, ssl=context)
        writer.close()

    # -- SASL -----------------------------------------------------------------------------------------------------------

    async def _why_closed(self, error: BaseException) -> str:
        """It answered, and closed the connection at the first request that needs a login."""
        if (tls := _tls_error(error)) is not None:
            return tls
        connection = await self._connect(self._protocol)
        try:
            answer = await connection.send(SaslHandShakeRequest("PLAIN"))
        finally:
            connection.close()
        if errors.for_code(answer.error_code) is errors.IllegalSaslStateError:
            raise error
        return f"asks for a login by SASL ({', '.join(answer.enabled_mechanisms)}), and this client has none"

    async def _why_no_login(self, connection: AIOKafkaConnection) -> str | None:
        try:
            answer = await connection.send(SaslHandShakeRequest(self._mechanism))
        except _CLOSED as error:
            if (tls := _tls_error(error)) is not None:
                return tls
            raise
        kind = errors.for_code(answer.error_code)
        if kind is errors.IllegalSaslStateError:
            expected = _PLAIN_OF[self._protocol]
            return f"knows no login by SASL there: expected the security protocol {expected}"
        if kind is not errors.NoError or self._mechanism not in answer.enabled_mechanisms:
            offered = ", ".join(answer.enabled_mechanisms)
            return f"does not know the SASL mechanism {self._mechanism}; it offers {offered}"
        if self._mechanism == "OAUTHBEARER":
            return await self._why_no_token(connection)
        try:
            (await self._connect(self._protocol)).close()
        except errors.SaslAuthenticationFailed as error:
            user = self._client._sasl_plain_username
            return f"refuses user {user} or the password ({self._mechanism}: {_said(error)})"
        return None

    async def _why_no_token(self, connection: AIOKafkaConnection) -> str | None:
        """aiokafka takes the broker's "no" for the end of a login, and the next answer for something else."""
        provider = self._client._sasl_oauth_token_provider
        try:
            sent, _ = await OAuthAuthenticator(sasl_oauth_token_provider=provider).step(None)
        except TokenRefused as error:
            return f"cannot be asked: {explain(error)}"
        answer = await connection.send(SaslAuthenticateRequest(sent))
        kind = errors.for_code(answer.error_code)
        if kind is not errors.NoError:
            return f"refuses the token ({_said(kind(answer.error_message))})"
        if answer.sasl_auth_bytes:
            return f"refuses the token ({_status(answer.sasl_auth_bytes)})"
        return None


def _tls_error(error: BaseException) -> str | None:
    """What TLS says of a connection that ended; None if it ended for another reason."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLError):
        found = found.__cause__
    if isinstance(found, ssl.SSLCertVerificationError):
        code = found.verify_code
        if code == _EXPIRED:
            return "has a certificate that has expired"
        if code == _NOT_YET:
            return "has a certificate that is not valid yet"
        if code in _WRONG_NAME:
            return "has a certificate for another name"
        if code in _UNTRUSTED:
            return "has a certificate of an authority that is not among the trusted ones (the CA file)"
        return f"has a certificate that is not valid ({found.verify_message})"
    if found is None or "ALERT" not in (found.reason or ""):
        return None
    if "CERTIFICATE_REQUIRED" in (found.reason or ""):
        return "asks for a client's certificate, and this client has none"
    alert = (found.reason or "").partition("ALERT_")[2].replace("_", " ").lower()
    return (
        f"refuses this client's certificate ({alert}): it has expired, or its authority is not trusted there"
    )


def _said(error: BaseException) -> str:
    """What a broker says, as far as it is harmless to show."""
    text = str(error.args[0]) if error.args else type(error).__name__
    return text if _SAFE.fullmatch(text) else type(error).__name__


def _status(answer: bytes) -> str:
    """Of the answer that a broker gives to a token that it does not like (RFC 7628)."""
    try:
        status = json.loads(answer)["status"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "no reason given"
    return status if isinstance(status, str) and _SAFE.fullmatch(status) else "no reason given"
