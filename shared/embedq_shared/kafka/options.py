"""Where Kafka is and how to log in."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from aiokafka.helpers import create_ssl_context

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]


class KafkaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where Kafka is and how to log in, the same for service, SDK and command line.

    The names are aiokafka's, plus the three `ssl_…file`s, of which `client_options` makes its `ssl_context`. None leaves
    aiokafka's default.
    """

    servers: str
    """host:port, several separated by commas."""
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
    sasl_plain_username: str | None = None
    sasl_plain_password: str | None = None
    sasl_kerberos_service_name: str | None = None
    sasl_kerberos_domain_name: str | None = None
    sasl_oauth_token_provider: Any = None

    def __repr__(self) -> str:
        """Without the password."""
        return f"KafkaOptions(servers={self.servers!r}, security_protocol={self.security_protocol!r}, …)"

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for any aiokafka client. Reads the certificate files, if TLS is on.

        Raises:
            OSError: a file cannot be read, or is not a certificate or key (`ssl.SSLError`).
        """
        options = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name not in _FILES and name != "servers" and value is not None
        }
        if self.security_protocol.endswith("SSL") and self.ssl_context is None:
            options["ssl_context"] = create_ssl_context(
                cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
            )
        return options | {"bootstrap_servers": self.servers}


_FILES: Final = frozenset({"ssl_cafile", "ssl_certfile", "ssl_keyfile"})
"""Fields that aiokafka has no argument for."""
