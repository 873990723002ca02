"""Where Kafka is and how to log in. Needs no Kafka client, so that a wrong option is named before one is imported."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import msgspec

from embedq_shared.secret import Secret

if TYPE_CHECKING:
    import ssl

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

_GSSAPI: Final = "GSSAPI"
"""aiokafka's only where its users install Kerberos, so neither the service nor the command line offers it."""
_TOKEN_PROVIDER: Final = ("aiokafka.abc", "AbstractTokenProvider")
"""What the client asks of a provider's class."""
_FILES: Final = ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
"""Fields that aiokafka has no argument for."""


DEFAULT_MAX_INFLATED_BYTES: Final = 64 * 1024 * 1024
"""Bytes that a compressed batch may inflate to. Sixty-four times what a broker takes in one batch by default. Texts shrink to
a third or a fifth, a job of thousands of equal texts to a hundredth of a job that is allowed: nothing that a sender of jobs
means to send comes near it."""


class BadOption(ValueError):
    """An option that cannot be used; `option` is its field in `KafkaOptions`. Holds no secret."""

    def __init__(self, option: str, expected: str, got: str) -> None:
        super().__init__(f"{option}: expected {expected}, got {got}")
        self.option = option
        self.expected = expected
        self.got = got


_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]*://")
_NO_HOST: Final = re.compile(r"[\s,;/?#@\\]")
"""Characters that no host has, and that betray what else was meant."""
_ADDRESS: Final = "host:port, several separated by commas"
_SHOWN_CHARACTERS: Final = 80


def addresses(servers: str) -> str:
    """Addresses as every client reads them: host:port, separated by commas and nothing else.

    Kafka's clients take much for an address, and then look for a host of that name until their time is over.

    Raises:
        BadOption: there is none, or one is something else.
    """
    found = [address for each in servers.split(",") if (address := each.strip())]
    if not found:
        raise BadOption("servers", _ADDRESS, "nothing")
    for address in found:
        _check_address(address)
    return ",".join(found)


def _check_address(address: str) -> None:
    shown = repr(address[:_SHOWN_CHARACTERS])
    if "@" in address:  # what stands before it may be a password
        raise BadOption("servers", f"{_ADDRESS}, and a login in options of its own", "an address with `@`")
    if scheme := _SCHEME.match(address):
        raise BadOption("servers", f"{_ADDRESS}, without `{scheme[0]}`", shown)
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if _is_ipv6(address) or (address.startswith("[") and not bracketed):
        raise BadOption("servers", f"{_ADDRESS}, and an IPv6 address as [address]:port", shown)
    if not colon:
        raise BadOption("servers", f"{_ADDRESS}, such as localhost:9092", f"{shown}, which has no port")
    if bracketed and not _is_ipv6(host[1:-1]):
        raise BadOption("servers", f"{_ADDRESS}, and only an IPv6 address in brackets", shown)
    if not host or _NO_HOST.search(host) or (":" in host and not bracketed):
        raise BadOption("servers", _ADDRESS, shown)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise BadOption("servers", f"{_ADDRESS}; a port is a number from 1 to 65535", shown)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


class KafkaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where Kafka is and how to log in, the same for service, SDK and command line.

    The names are aiokafka's, plus the three `ssl_…file`s, of which `client_options` makes its `ssl_context`. None leaves
    aiokafka's default.

    Raises:
        BadOption: a value that no client takes, or one that lacks another.
    """

    servers: str
    """host:port, several separated by commas; blanks and empty ones are taken out."""
    security_protocol: SecurityProtocol = "PLAINTEXT"
    ssl_context: Any = None
    """Instead of the files."""
    ssl_cafile: str | None = None
    """Certificates of the authorities to trust (PEM); None: those of the system."""
    ssl_certfile: str | None = None
    """This client's certificate (PEM), where the broker asks for one."""
    ssl_keyfile: str | None = None
    """Its private key (PEM); None: in `ssl_certfile`."""
    sasl_mechanism: str | None = None
    """None: PLAIN."""
    sasl_plain_username: str | None = None
    """Of PLAIN and of both SCRAM mechanisms."""
    sasl_plain_password: str | None = None
    """Kept as a `Secret`."""
    sasl_kerberos_service_name: str | None = None
    sasl_kerberos_domain_name: str | None = None
    sasl_oauth_token_provider: Any = None
    """Of OAUTHBEARER: an `aiokafka.abc.AbstractTokenProvider`."""

    def __post_init__(self) -> None:
        """Check what belongs together, before any client does, whose errors would be of all kinds."""
        msgspec.structs.force_setattr(self, "servers", addresses(self.servers))
        if self.sasl_plain_password is not None:
            msgspec.structs.force_setattr(self, "sasl_plain_password", Secret(self.sasl_plain_password))
        protocols = get_args(SecurityProtocol)
        if self.security_protocol not in protocols:
            raise BadOption(
                "security_protocol", f"one of {', '.join(protocols)}", repr(self.security_protocol)
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise BadOption("ssl_certfile", "the certificate of the key in `ssl_keyfile`", "nothing")
        if self.uses_sasl:
            self._check_sasl()

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def uses_sasl(self) -> bool:
        """Whether a client logs in by a SASL mechanism."""
        return self.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    def _check_sasl(self) -> None:
        mechanism = self.sasl_mechanism or "PLAIN"
        known = (*get_args(SaslMechanism), _GSSAPI)
        if mechanism not in known:
            raise BadOption("sasl_mechanism", f"one of {', '.join(known)}", repr(mechanism))
        if mechanism == "OAUTHBEARER":
            kind = type(self.sasl_oauth_token_provider)
            if not any((each.__module__, each.__name__) == _TOKEN_PROVIDER for each in kind.__mro__):
                raise BadOption(
                    "sasl_oauth_token_provider",
                    "an aiokafka.abc.AbstractTokenProvider for OAUTHBEARER",
                    "nothing" if self.sasl_oauth_token_provider is None else kind.__name__,
                )
        elif mechanism != _GSSAPI:
            for option, what in (
                ("sasl_plain_username", "a user name"),
                ("sasl_plain_password", "a password"),
            ):
                if not getattr(self, option):
                    raise BadOption(option, f"{what} for {mechanism}", "nothing")

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for any aiokafka client. Reads the certificate files, if TLS is on.

        Raises:
            BadOption: a file cannot be read, or is not a certificate or key.
        """
        options = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name not in _FILES and name != "servers" and value is not None
        }
        if self.uses_tls and self.ssl_context is None:
            options["ssl_context"] = self._context()
        return options | {"bootstrap_servers": self.servers}

    def _context(self) -> ssl.SSLContext:
        import ssl  # no help text needs it

        try:
            made = ssl.create_default_context(cafile=self.ssl_cafile)
            if self.ssl_certfile is not None:
                made.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except OSError as error:
            files = {name: value for name in _FILES if (value := getattr(self, name)) is not None}
            # OpenSSL says neither which file it is nor much about why.
            why = error if isinstance(error, ssl.SSLError) else error.strerror
            raise BadOption(
                ", ".join(files) or "security_protocol",
                "readable PEM files, the key belonging to the certificate",
                f"{', '.join(map(str, files.values()))} ({why})",
            ) from error
        return made
