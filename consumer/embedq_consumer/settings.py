"""The service's settings: one frozen struct, read once from the environment. A name that is mistyped is an error."""

from __future__ import annotations

import difflib
import re
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from embedq_consumer.cache import CacheOptions
from embedq_consumer.engine import LoadOptions, Quantization
from embedq_consumer.intake import AdmissionPolicy, IntakeOptions
from embedq_consumer.lifecycle.served_model import BatchOptions, ModelOptions
from embedq_shared.messages import DEFAULT_ALIAS, DEFAULT_MAX_INPUTS
from embedq_shared.topics import GROUP, Topics

PREFIX: Final = "EMBEDQ_"
_OTHERS: Final = frozenset({"EMBEDQ_CACHE_DIR", "EMBEDQ_KAFKA_VERSION"})
"""The local stack's own variables begin alike and reach a service that it starts."""
_LARGEST: Final = 1e9
"""Some 30 years in seconds. "inf" reads as a float too, and is not a time to wait."""
_DEVICE: Final = r"(cpu|cuda(:\d+)?)"

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
NotEmpty = Annotated[str, Meta(min_length=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class SettingsError(Exception):
    """A setting is missing, mistyped or out of range; the message names the variable."""


# More than 300 lines: a field for each environment variable, with its description.
class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each field is the environment variable `EMBEDQ_<FIELD>`; its description is what the page of settings says.

    The properties at the end group fields into the options that each room takes.
    """

    # Where

    kafka_servers: Annotated[
        NotEmpty, Meta(description="Kafka brokers to ask first: HOST:PORT, separated by commas.")
    ]
    redis_url: Annotated[
        str, Meta(description="Redis for the vector cache, such as `redis://HOST:6379/0`. Empty: no cache.")
    ] = ""
    topic_prefix: Annotated[
        NotEmpty, Meta(description="First part of every topic's name: `embed` makes `embed.jobs` and so on.")
    ] = "embed"
    group: Annotated[NotEmpty, Meta(description="Consumer group. Replicas of one group share the jobs.")] = (
        GROUP
    )
    http_host: Annotated[str, Meta(description="Address to serve health and metrics on.")] = "0.0.0.0"
    http_port: Annotated[
        Port,
        Meta(description="Port of `/livez`, `/readyz` and `/metrics`. 0: any free one; the log says which."),
    ] = 9464
    replica: Annotated[
        str,
        Meta(
            max_length=256,
            description="Name of this replica in statuses and logs. Empty: the host name and a random suffix.",
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least severe events that are logged.")
    ] = "info"

    # What

    model: Annotated[
        NotEmpty,
        Meta(
            description="The model to begin with, as long as no command names another one: "
            "a directory in Hugging Face or sentence-transformers layout."
        ),
    ]
    model_root: Annotated[
        str,
        Meta(
            description="Directory below which reloads may load models. Empty: the parent of `EMBEDQ_MODEL`."
        ),
    ] = ""
    alias: Annotated[
        NotEmpty,
        Meta(description="Model name that jobs use in `model`; jobs that name another one are refused."),
    ] = DEFAULT_ALIAS
    device: Annotated[
        str,
        Meta(
            pattern=r"^(auto|cpu|cuda(:\d+)?)$",
            description="`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA if there is a device, else the CPU.",
        ),
    ] = "auto"
    devices: Annotated[
        str,
        Meta(
            pattern=rf"^(all|{_DEVICE}(,{_DEVICE})*)?$",
            description="Devices that get a replica each, from one command: `all` GPUs, or names separated by commas; "
            "a device that is named twice gets two replicas. Replaces `EMBEDQ_DEVICE`. Empty: one replica.",
        ),
    ] = ""
    quantization: Annotated[
        Quantization,
        Meta(
            description="`fp8` halves the memory of the weights and changes the vectors, and so the model version. "
            "Needs a GPU of compute capability 9.0 or above."
        ),
    ] = "none"
    fp8_keep: Annotated[
        str,
        Meta(
            pattern=r"^(-?\d+(,-?\d+)*)?$",
            description="Layers that `fp8` leaves in bf16: numbers separated by commas, negative ones from the end.",
        ),
    ] = ""
    deterministic: Annotated[
        bool,
        Meta(
            description="A text's vector is bit-equal whatever else is in its micro-batch. "
            "Costs some throughput, and is another model version."
        ),
    ] = False
    threads: Annotated[
        int, Meta(ge=0, description="CPU threads of the model. 0: PyTorch's choice, usually one per core.")
    ] = 0
    compile_cache: Annotated[
        str,
        Meta(
            description="Directory of what the next start need not do again: compiled kernels and model facts. "
            "Empty: below the user's cache directory."
        ),
    ] = ""

    # Micro-batches

    max_batch_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="Tokens that a micro-batch may hold. 0: 2048 on a CPU and 16384 on a GPU, which keeps the device busy "
            "without delaying the texts that come next. Lowered where the device has too little memory.",
        ),
    ] = 0
    max_batch_items: Annotated[PositiveInt, Meta(description="Texts that a micro-batch may hold.")] = 1024
    max_wait_ms: Annotated[
        NotNegative,
        Meta(description="Milliseconds that a text waits at most for others to fill its micro-batch."),
    ] = 2.0
    bulk_max_wait_s: Annotated[
        NotNegative,
        Meta(description="Seconds after which a waiting bulk text gets its share before interactive ones."),
    ] = 5.0

    # Bounds

    max_in_flight_jobs: Annotated[
        PositiveInt,
        Meta(
            description="Jobs of a lane that are polled and not answered; polling of that lane pauses at this number. "
            "Most of them wait, undecoded, so that jobs of other clients behind them are seen."
        ),
    ] = 32_768
    max_in_flight_bytes: Annotated[
        PositiveInt,
        Meta(
            description="Bytes of memory that the records of a lane's jobs may take while they are not answered; "
            "polling of that lane pauses there."
        ),
    ] = 64 * 1024 * 1024
    max_started_texts: Annotated[
        PositiveInt,
        Meta(
            description="Texts of a lane's jobs that are started, past the queue of polled jobs. "
            "A client may start more while it has less under way than is left free: one alone gets half."
        ),
    ] = 8192
    max_pending_bytes: Annotated[
        PositiveInt,
        Meta(
            description="Bytes that the results of started jobs may take, shared by clients as `max_started_texts` is; "
            "one job may exceed it."
        ),
    ] = 512 * 1024 * 1024
    max_poll_records: Annotated[PositiveInt, Meta(description="Records of one poll.")] = 512
    max_inputs: Annotated[PositiveInt, Meta(description="Texts that a job may hold.")] = DEFAULT_MAX_INPUTS
    max_text_bytes: Annotated[PositiveInt, Meta(description="Bytes of UTF-8 that a text may hold.")] = (
        1_000_000
    )
    max_result_bytes: Annotated[
        int,
        Meta(
            ge=4096,
            description="Bytes of a result record; a larger result is published in parts. "
            "The default stays below Kafka's own limit of 1 MiB for a record.",
        ),
    ] = 900_000
    reply_topics: Annotated[
        NotEmpty,
        Meta(description="Topics that a job may name for its reply: shell patterns, separated by commas."),
    ] = "*"

    # Cache

    cache_ttl_s: Annotated[
        PositiveFloat, Meta(description="Seconds that a vector stays in the cache; the default is a week.")
    ] = 7 * 24 * 3600.0
    cache_timeout_ms: Annotated[
        PositiveFloat,
        Meta(
            description="Milliseconds to wait for Redis; after that the texts are computed as if not cached."
        ),
    ] = 50.0

    # Delivery

    commit_interval_ms: Annotated[
        PositiveFloat, Meta(description="Milliseconds between two commits of offsets.")
    ] = 500.0
    max_uncommitted_jobs: Annotated[
        PositiveInt,
        Meta(
            description="Jobs of a partition that may be started and not committed: a crash repeats these at most."
        ),
    ] = 2048
    session_timeout_ms: Annotated[
        int,
        Meta(
            ge=1000,
            description="Milliseconds without a heartbeat after which the group gives a replica's partitions to others.",
        ),
    ] = 45_000
    rebalance_timeout_ms: Annotated[
        int,
        Meta(
            ge=1000,
            description="Milliseconds that a replica has to drain for a rebalance; at least the session timeout.",
        ),
    ] = 60_000
    publish_timeout_s: Annotated[
        PositiveFloat,
        Meta(description="Seconds without an acknowledged result after which the process ends."),
    ] = 60.0
    drain_timeout_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds that a stop, or a reload before its swap, waits for the jobs in flight. "
            "Jobs that a stop leaves unfinished are repeated by another replica."
        ),
    ] = 30.0
    stall_timeout_s: Annotated[
        PositiveFloat,
        Meta(description="Seconds that a loop or a micro-batch may be stuck before `/livez` fails."),
    ] = 300.0

    # Kafka's security, as aiokafka names it

    kafka_security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"],
        Meta(description="How the brokers are reached: in the clear or by TLS, with or without SASL."),
    ] = "PLAINTEXT"
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"],
        Meta(description="How SASL proves who we are; used by the SASL protocols alone."),
    ] = "PLAIN"
    kafka_sasl_username: Annotated[str, Meta(description="User name for SASL.")] = ""
    kafka_sasl_password: Annotated[str, Meta(description="Password for SASL.")] = ""
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

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings of this environment.

        Raises:
            SettingsError: naming the variable and what was expected.
        """
        raw = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environ.items()
            if name.startswith(PREFIX) and name not in _OTHERS
        }
        try:
            return msgspec.convert(raw, cls, strict=False)
        except msgspec.ValidationError as error:
            raise SettingsError(_explain(str(error))) from None

    def __post_init__(self) -> None:
        if self.rebalance_timeout_ms < self.session_timeout_ms:
            raise ValueError("EMBEDQ_REBALANCE_TIMEOUT_MS: expected at least EMBEDQ_SESSION_TIMEOUT_MS")
        if self.fp8_keep and self.quantization != "fp8":
            raise ValueError("EMBEDQ_FP8_KEEP: needs EMBEDQ_QUANTIZATION=fp8")
        if self.devices and self.device != "auto":
            raise ValueError("EMBEDQ_DEVICE: cannot be set together with EMBEDQ_DEVICES")

    @property
    def topics(self) -> Topics:
        """The topics below this prefix."""
        return Topics(self.topic_prefix)

    @property
    def root(self) -> Path:
        """The directory below which every model of a command must lie, with links resolved."""
        return Path(self.model_root).resolve() if self.model_root else Path(self.model).resolve().parent

    @property
    def reply_patterns(self) -> tuple[str, ...]:
        """The shell patterns of allowed reply topics."""
        return tuple(pattern.strip() for pattern in self.reply_topics.split(",") if pattern.strip())

    def named(self) -> Settings:
        """These settings with a replica name that no other process has."""
        if self.replica:
            return self
        return msgspec.structs.replace(self, replica=f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}")

    @property
    def load(self) -> LoadOptions:
        """How models are loaded."""
        return LoadOptions(
            device=self.device,
            threads=self.threads or None,
            quantization=self.quantization,
            keep_bf16=tuple(int(number) for number in self.fp8_keep.split(",") if number),
            deterministic=self.deterministic,
            known_models=Path(self.compile_cache) / "models" if self.compile_cache else None,
        )

    @property
    def intake(self) -> IntakeOptions:
        """How jobs are polled and their offsets committed."""
        return IntakeOptions(
            group=self.group,
            max_in_flight_jobs=self.max_in_flight_jobs,
            max_in_flight_bytes=self.max_in_flight_bytes,
            max_started_texts=self.max_started_texts,
            max_pending_bytes=self.max_pending_bytes,
            max_poll_records=self.max_poll_records,
            max_uncommitted=self.max_uncommitted_jobs,
            commit_interval_s=self.commit_interval_ms / 1000,
            session_timeout_ms=self.session_timeout_ms,
            rebalance_timeout_ms=self.rebalance_timeout_ms,
        )

    @property
    def cache(self) -> CacheOptions:
        """Where vectors are remembered, and for how long."""
        return CacheOptions(
            url=self.redis_url, ttl_s=self.cache_ttl_s, timeout_s=self.cache_timeout_ms / 1000
        )

    @property
    def admission(self) -> AdmissionPolicy:
        """Which jobs are accepted."""
        return AdmissionPolicy(
            topics=self.topics,
            alias=self.alias,
            max_inputs=self.max_inputs,
            max_text_bytes=self.max_text_bytes,
            max_result_bytes=self.max_result_bytes,
            reply_patterns=self.reply_patterns,
        )

    def served_model(self, batch_tokens: int) -> ModelOptions:
        """The one alias of this replica. `batch_tokens` is the budget in full: `max_batch_tokens`, or the device's own.

        Blocks on the file system.
        """
        return ModelOptions(
            alias=self.alias,
            replica=self.replica,
            topics=self.topics,
            configured=Path(self.model).resolve(),
            root=self.root,
            batches=BatchOptions(
                max_tokens=batch_tokens,
                max_items=self.max_batch_items,
                max_wait_s=self.max_wait_ms / 1000,
                bulk_max_wait_s=self.bulk_max_wait_s,
            ),
            drain_timeout_s=self.drain_timeout_s,
        )

    def kafka(self) -> dict[str, Any]:
        """What each aiokafka client needs to reach the brokers."""
        from embedq_shared.kafka import KafkaOptions  # here, so that the supervisor loads no Kafka client

        sasl = self.kafka_security_protocol.startswith("SASL")
        return KafkaOptions(
            servers=self.kafka_servers,
            security_protocol=self.kafka_security_protocol,
            ssl_cafile=self.kafka_ssl_cafile or None,
            ssl_certfile=self.kafka_ssl_certfile or None,
            ssl_keyfile=self.kafka_ssl_keyfile or None,
            sasl_mechanism=self.kafka_sasl_mechanism if sasl else None,
            sasl_plain_username=self.kafka_sasl_username if sasl else None,
            sasl_plain_password=self.kafka_sasl_password if sasl else None,
        ).client_options()


def _explain(message: str) -> str:
    """msgspec's sentence after the variable's name."""
    if unknown := re.match(r"Object contains unknown field `(.*)`", message):
        close = difflib.get_close_matches(unknown[1], Settings.__struct_fields__, n=1)
        hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
        return f"unknown setting {PREFIX}{unknown[1].upper()}{hint}"
    if missing := re.match(r"Object missing required field `(\w+)`", message):
        return f"{PREFIX}{missing[1].upper()} must be set"
    if at := re.match(r"(.*) - at `\$\.(\w+)`", message):
        if at[1].startswith("Invalid enum value"):
            allowed = ", ".join(get_args(get_type_hints(Settings)[at[2]]))
            return f"{PREFIX}{at[2].upper()}: expected one of {allowed}"
        return f"{PREFIX}{at[2].upper()}: {at[1][0].lower()}{at[1][1:]}"
    return message
