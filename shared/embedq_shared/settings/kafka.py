"""Where Kafka is and how to log in, as every program of embedq reads it from its environment."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from embedq_shared.access import BadOption, KafkaOptions, SaslMechanism, SecurityProtocol
from embedq_shared.secret import Secret
from embedq_shared.settings.environment import SettingsError
from embedq_shared.topics import Topics

PREFIX: Final = "EMBEDQ_"
"""Of every setting of the service, and of these in every program."""
OF_THE_LOCAL_STACK: Final = frozenset({"EMBEDQ_CACHE_DIR", "EMBEDQ_KAFKA_VERSION"})
"""The local stack's own variables begin alike and reach the programs that it starts."""

NotEmpty = Annotated[str, Meta(min_length=1)]


class KafkaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each field is the environment variable `EMBEDQ_<FIELD>`; its description is what the pages of settings say."""

    kafka_servers: Annotated[
        NotEmpty, Meta(description="Kafka brokers to ask first: HOST:PORT, separated by commas.")
    ]
    topic_prefix: Annotated[
        NotEmpty, Meta(description="First part of every topic's name: `embed` makes `embed.jobs` and so on.")
    ] = "embed"

    # Kafka's security, as aiokafka names it

    kafka_security_protocol: Annotated[
        SecurityProtocol,
        Meta(description="How the brokers are reached: in the clear or by TLS, with or without SASL."),
    ] = "PLAINTEXT"
    kafka_sasl_mechanism: Annotated[
        SaslMechanism,
        Meta(description="How SASL proves who we are; used by the SASL protocols alone."),
    ] = "PLAIN"
    kafka_sasl_username: Annotated[str, Meta(description="User name for PLAIN and SCRAM.")] = ""
    kafka_sasl_password: Annotated[Secret, Meta(description="Password for PLAIN and SCRAM.")] = Secret("")
    kafka_oauth_token_file: Annotated[
        str,
        Meta(
            description="File that holds a token for OAUTHBEARER; it is read for each connection, since tokens rotate."
        ),
    ] = ""
    kafka_oauth_token_url: Annotated[
        str,
        Meta(
            description="Token endpoint of an issuer that gives tokens for OAUTHBEARER by the client credentials grant; "
            "instead of a file."
        ),
    ] = ""
    kafka_oauth_client_id: Annotated[str, Meta(description="Who we are to the token endpoint.")] = ""
    kafka_oauth_client_secret: Annotated[Secret, Meta(description="Our secret at the token endpoint.")] = (
        Secret("")
    )
    kafka_oauth_scope: Annotated[
        str, Meta(description="Scope to ask the token endpoint for. Empty: its default.")
    ] = ""
    kafka_oauth_cafile: Annotated[
        str,
        Meta(
            description="PEM file of authorities that sign the token endpoint's certificate. Empty: the system's."
        ),
    ] = ""
    kafka_ssl_cafile: Annotated[
        str,
        Meta(description="PEM file of authorities that sign the brokers' certificates. Empty: the system's."),
    ] = ""
    kafka_ssl_certfile: Annotated[
        str, Meta(description="PEM file of this client's certificate. Empty: none is shown.")
    ] = ""
    kafka_ssl_keyfile: Annotated[
        str, Meta(description="PEM file of the certificate's private key. Empty: in the certificate's file.")
    ] = ""

    @property
    def topics(self) -> Topics:
        """The topics below this prefix."""
        return Topics(self.topic_prefix)

    def kafka(self) -> dict[str, Any]:
        """What each aiokafka client needs to reach the brokers. Reads the certificate files, if TLS is on.

        Raises:
            SettingsError: one of the files cannot be used.
        """
        try:
            return self.kafka_options().client_options()
        except BadOption as error:
            raise _bad_kafka_setting(error) from error

    def kafka_options(self) -> KafkaOptions:
        """The same before any file is read.

        Raises:
            SettingsError: what does not fit together.
        """
        sasl = self.kafka_security_protocol.startswith("SASL")
        by_token = sasl and self.kafka_sasl_mechanism == "OAUTHBEARER"
        try:
            return KafkaOptions(
                servers=self.kafka_servers,
                security_protocol=self.kafka_security_protocol,
                ssl_cafile=self.kafka_ssl_cafile or None,
                ssl_certfile=self.kafka_ssl_certfile or None,
                ssl_keyfile=self.kafka_ssl_keyfile or None,
                sasl_mechanism=self.kafka_sasl_mechanism if sasl else None,
                sasl_plain_username=self.kafka_sasl_username if sasl else None,
                sasl_plain_password=self.kafka_sasl_password if sasl else None,
                sasl_oauth_token_provider=self._token_provider() if by_token else None,
            )
        except BadOption as error:
            raise _bad_kafka_setting(error) from error

    def _token_provider(self) -> Any:
        from embedq_shared.kafka import OAuthOptions

        return OAuthOptions(
            token_file=self.kafka_oauth_token_file,
            token_url=self.kafka_oauth_token_url,
            client_id=self.kafka_oauth_client_id,
            client_secret=self.kafka_oauth_client_secret,
            scope=self.kafka_oauth_scope,
            cafile=self.kafka_oauth_cafile,
        ).provider()


def _bad_kafka_setting(error: BadOption) -> SettingsError:
    """An option of the Kafka room by its variable."""
    names = (name.replace("sasl_plain_", "sasl_").upper() for name in error.option.split(", "))
    expected = re.sub(
        r"`([a-z]+_[a-z_]+)`", lambda found: f"{PREFIX}KAFKA_{found[1].upper()}", error.expected
    )
    return SettingsError(
        f"{', '.join(f'{PREFIX}KAFKA_{name}' for name in names)}: expected {expected}, got {error.got}"
    )
