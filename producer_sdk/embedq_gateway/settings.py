"""The gateway's settings: one frozen struct, read once from the environment. A name that is mistyped is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from embedq_shared.messages import DEFAULT_ALIAS, DEFAULT_MAX_INPUTS
from embedq_shared.settings.environment import SettingsError, read_settings
from embedq_shared.settings.kafka import OF_THE_LOCAL_STACK, KafkaSettings, NotEmpty
from embedq_shared.settings.kafka import PREFIX as KAFKA_PREFIX
from embedq_shared.topics import GROUP

__all__ = ["PREFIX", "GatewaySettings", "SettingsError", "kafka_settings"]

PREFIX: Final = "EMBEDQ_GATEWAY_"
_LONGEST_S: Final = 86_400.0
"""A day: whoever waits longer for an answer over HTTP waits in vain."""

Seconds = Annotated[float, Meta(gt=0, le=_LONGEST_S)]
PositiveInt = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each field is the environment variable `EMBEDQ_GATEWAY_<FIELD>`; its description is what the page of settings says.

    Where Kafka is and how to log in there is told as to the service: `EMBEDQ_KAFKA_…` and `EMBEDQ_TOPIC_PREFIX`.
    """

    # Where

    host: Annotated[
        NotEmpty, Meta(description="Address to listen on: the default is this machine alone.")
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port to listen on. 0: any free one; the log says which.")] = 8080
    workers: Annotated[
        PositiveInt,
        Meta(
            description="Processes that share the port. Each has a client of its own, and reads one reply partition."
        ),
    ] = 1
    tls_certfile: Annotated[
        str,
        Meta(description="PEM file of the certificate, with those of its authorities. Empty: no TLS."),
    ] = ""
    tls_keyfile: Annotated[
        str, Meta(description="PEM file of the certificate's private key. Empty: in the certificate's file.")
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least severe events that are logged.")
    ] = "info"
    access_log: Annotated[
        bool, Meta(description="Log a line for each request: never its texts, vectors or keys.")
    ] = True

    # Who may come in

    keys_file: Annotated[
        str,
        Meta(
            description="File of API keys, as `embedq gateway keys add` writes it; a change is in force a second later. "
            "Empty: no keys, and whoever reaches the address may do everything."
        ),
    ] = ""
    allow_anonymous: Annotated[
        bool,
        Meta(
            description="Without keys, serve an address that others than this machine reach, and pages of any name that points at it."
        ),
    ] = False
    max_connections: Annotated[
        PositiveInt,
        Meta(
            description="Connections of this process; one more closes the one that has been idle for longest, or is refused."
        ),
    ] = 4096
    max_head_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            description="Bytes that a request's line and headers may have; more is answered with 431.",
        ),
    ] = 32 * 1024
    head_timeout_s: Annotated[
        Seconds, Meta(description="Seconds from a request's first byte to the end of its headers.")
    ] = 10.0
    body_bytes_per_s: Annotated[
        PositiveInt,
        Meta(
            description="Bytes a second at which a body must come on average, after `EMBEDQ_GATEWAY_HEAD_TIMEOUT_S`."
        ),
    ] = 1024
    idle_timeout_s: Annotated[
        Seconds,
        Meta(
            description="Seconds that a connection may be idle. Longer than clients keep one, so that it is they who close it."
        ),
    ] = 75.0

    # Requests

    default_alias: Annotated[
        NotEmpty,
        Meta(
            description="The model of requests that name none, and the one that must be served for `/readyz` to say so."
        ),
    ] = DEFAULT_ALIAS
    timeout_s: Annotated[
        Seconds,
        Meta(
            description="Seconds that a request has without a header `x-request-timeout`. It is its job's deadline, too."
        ),
    ] = 60.0
    max_timeout_s: Annotated[
        Seconds, Meta(description="Seconds that a request has at most, whatever its header asks for.")
    ] = 600.0
    max_inputs: Annotated[
        PositiveInt,
        Meta(
            description="Texts that a request may have; the service's `EMBEDQ_MAX_INPUTS`, if that is smaller."
        ),
    ] = DEFAULT_MAX_INPUTS
    max_body_bytes: Annotated[
        PositiveInt, Meta(description="Bytes that the body of a request may have; more is answered with 413.")
    ] = 16 * 1024 * 1024
    max_held_bytes: Annotated[
        PositiveInt,
        Meta(
            description="Bytes of bodies that the requests of this process may hold until they are answered; more is answered with 503."
        ),
    ] = 512 * 1024 * 1024
    max_in_flight_texts: Annotated[
        PositiveInt,
        Meta(
            description="Texts of this process that may be under way at once. Further requests wait, and get 503 when their "
            "time is over."
        ),
    ] = 16_384

    # Files and batches

    files: Annotated[
        str,
        Meta(
            description="Where `/v1/files` and `/v1/batches` keep what they need: a directory, or `s3://BUCKET/PREFIX`, the same "
            "for all gateways that share their batches. Empty: there are no files and no batches."
        ),
    ] = ""
    files_keep_days: Annotated[
        int, Meta(ge=1, le=3650, description="Days that a file, and an ended batch, is kept.")
    ] = 30
    max_file_bytes: Annotated[PositiveInt, Meta(description="Bytes that an uploaded file may have.")] = (
        200 * 1024 * 1024
    )
    max_batch_requests: Annotated[PositiveInt, Meta(description="Lines that a batch may have.")] = 50_000
    batches_at_once: Annotated[PositiveInt, Meta(description="Batches that this process runs at a time.")] = 4
    batch_in_flight_texts: Annotated[
        PositiveInt,
        Meta(
            description="Texts of one batch that may be under way at once. If the gateway is killed, they are computed again."
        ),
    ] = 1024
    batch_lease_s: Annotated[
        Seconds,
        Meta(
            description="Seconds without a sign of life after which another gateway goes on with a batch; the same for all that "
            "share them."
        ),
    ] = 15.0

    join_texts: Annotated[
        PositiveInt,
        Meta(
            description="Texts that small requests of one moment may share a job with, if they ask for the same with the same key. "
            "Nobody is waited for. 1: each request is a job of its own."
        ),
    ] = 32

    # Operating

    group: Annotated[
        NotEmpty,
        Meta(
            description="The service's consumer group, its `EMBEDQ_GROUP`: whose lag the console shows, with that of every pool."
        ),
    ] = GROUP

    # Leaving

    drain_delay_s: Annotated[
        float,
        Meta(
            ge=0,
            le=_LONGEST_S,
            description="Seconds after SIGTERM in which requests are still accepted while `/readyz` fails and answers close their "
            "connections, so that load balancers turn away first.",
        ),
    ] = 1.0
    drain_timeout_s: Annotated[
        Seconds,
        Meta(description="Seconds that a stop waits for the requests that were accepted; then it ends them."),
    ] = 60.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> GatewaySettings:
        """The settings of this environment.

        Raises:
            SettingsError: naming the variable and what was expected.
        """
        return read_settings(cls, PREFIX, environ)

    def __post_init__(self) -> None:
        if self.tls_keyfile and not self.tls_certfile:
            raise ValueError(f"{PREFIX}TLS_KEYFILE: needs {PREFIX}TLS_CERTFILE")
        if self.max_body_bytes > self.max_held_bytes:
            raise ValueError(f"{PREFIX}MAX_BODY_BYTES: expected at most {PREFIX}MAX_HELD_BYTES")
        if self.timeout_s > self.max_timeout_s:
            raise ValueError(f"{PREFIX}TIMEOUT_S: expected at most {PREFIX}MAX_TIMEOUT_S")


def kafka_settings(environ: Mapping[str, str]) -> KafkaSettings:
    """Where Kafka is: `EMBEDQ_KAFKA_…` and `EMBEDQ_TOPIC_PREFIX`. Other variables are the service's.

    Raises:
        SettingsError: naming the variable and what was expected.
    """

    def is_kafkas(name: str) -> bool:
        known = name.startswith(f"{KAFKA_PREFIX}KAFKA_") or name == f"{KAFKA_PREFIX}TOPIC_PREFIX"
        return known and name not in OF_THE_LOCAL_STACK

    found = read_settings(KafkaSettings, KAFKA_PREFIX, environ, ours=is_kafkas)
    found.kafka_options()  # what does not fit together is said now
    return found
