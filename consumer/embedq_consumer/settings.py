"""The service's settings: one frozen struct, read once from the environment. A name that is mistyped is an error."""

from __future__ import annotations

import difflib
import re
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

import msgspec
from msgspec import Meta

from embedq_consumer.engine import LoadOptions, Quantization
from embedq_shared.access import (
    DEFAULT_MAX_INFLATED_BYTES,
    BadOption,
    KafkaOptions,
    SaslMechanism,
    SecurityProtocol,
)
from embedq_shared.access.setting_words import plain, wrong
from embedq_shared.messages import DEFAULT_ALIAS, DEFAULT_MAX_INPUTS
from embedq_shared.secret import Secret, read_secret
from embedq_shared.topics import GROUP, Topics
from embedq_shared.user_cache import user_cache

if TYPE_CHECKING:
    from embedq_consumer.cache import CacheOptions, SecretSource
    from embedq_consumer.exactly_once import ExactlyOnceOptions
    from embedq_consumer.intake import AdmissionPolicy, IntakeOptions
    from embedq_consumer.lifecycle.served_model import ModelOptions
    from embedq_consumer.quarantine import Claimant
    from embedq_consumer.shapes import Mappings, RegistryOptions

PREFIX: Final = "EMBEDQ_"
_OTHERS: Final = frozenset({"EMBEDQ_CACHE_DIR", "EMBEDQ_KAFKA_VERSION"})
"""The local stack's own variables begin alike and reach a service that it starts."""
_LARGEST: Final = 1e9
"""Some 30 years in seconds. "inf" reads as a float too, and is not a time to wait."""
_DRY_RUN_S: Final = 180.0
"""Importing transformers takes 5 s on a quiet machine, and the rest of a dry run one."""
_LONGEST_RETRY_S: Final = 24 * 3600.0
"""Of one tier: a record must not be older than the topic's retention, a week, before it is read."""
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

    The properties at the end group fields into the options that each room takes. They import the rooms, and this file does
    not: a wrong setting is named before anything heavy is loaded.
    """

    # Where

    kafka_servers: Annotated[
        NotEmpty, Meta(description="Kafka brokers to ask first: HOST:PORT, separated by commas.")
    ]
    redis_url: Annotated[
        Secret,
        Meta(
            description="Redis for the vector cache, such as `redis://HOST:6379/0`, or with TLS "
            "`rediss://HOST:6379/0`. Empty: no cache."
        ),
    ] = Secret("")
    topic_prefix: Annotated[
        NotEmpty, Meta(description="First part of every topic's name: `embed` makes `embed.jobs` and so on.")
    ] = "embed"
    group: Annotated[NotEmpty, Meta(description="Consumer group. Replicas of one group share the jobs.")] = (
        GROUP
    )
    http_host: Annotated[
        NotEmpty,
        Meta(
            description="Address to serve health and metrics on, to whoever reaches it: the default is this machine alone. "
            "`0.0.0.0` for all addresses, as probes and scrapes from other machines need; the image sets that."
        ),
    ] = "127.0.0.1"
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
            extra={"takes": "auto, cpu, cuda or cuda:N (a GPU is cuda)"},
            description="`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA if there is a device, else the CPU.",
        ),
    ] = "auto"
    devices: Annotated[
        str,
        Meta(
            pattern=rf"^(all|{_DEVICE}(,{_DEVICE})*)?$",
            extra={"takes": "all, or cpu, cuda and cuda:N separated by commas"},
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
            extra={"takes": "integers separated by commas"},
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
    read_ahead_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds of work of a lane that is started: as many jobs as it answers in that time at its best of the "
            "last seconds, 256 at least; a client alone gets half. More is of no use, and a stop, a reload or a partition "
            "that moves waits for it."
        ),
    ] = 2.0
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
    max_inflated_bytes: Annotated[
        int,
        Meta(
            ge=1024 * 1024,
            description="Bytes that a compressed batch of job records may inflate to, above what the largest batch of a "
            "well-meant producer does; a batch over it becomes one dead letter. Each assigned partition may take as much.",
        ),
    ] = DEFAULT_MAX_INFLATED_BYTES
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
        str,
        Meta(
            description="Topics besides `embed.replies` and `embed.results` that a job may name for its reply: shell patterns, "
            "separated by commas, such as `team-*.replies`. Patterns never match internal topics of Kafka, of its companions "
            "or of another embedq; their names must be given in full. Empty: none."
        ),
    ] = ""

    # Records of other shapes

    mappings: Annotated[
        str,
        Meta(
            description="YAML file of mappings, for records of other shapes than embedq's own: rows, change events, events, "
            "lines of batches ([shapes](shapes.md)). Empty: there are no others."
        ),
    ] = ""
    schema_registry_url: Annotated[
        str,
        Meta(
            description="Schema Registry for records in its wire format, such as `https://registry:8081`; several with commas. "
            "Needs the extra `schema-registry`. Empty: none."
        ),
    ] = ""
    schema_registry_username: Annotated[
        str, Meta(description="User name for the Schema Registry. Empty: none is shown.")
    ] = ""
    schema_registry_password: Annotated[Secret, Meta(description="Password for the Schema Registry.")] = (
        Secret("")
    )
    schema_registry_cafile: Annotated[
        str,
        Meta(
            description="PEM file of authorities that sign the Schema Registry's certificate. Empty: the system's."
        ),
    ] = ""

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
    cache_key: Annotated[
        Secret,
        Meta(
            description="Secret that signs cache entries: at least 16 bytes, the same in all replicas that share a Redis. "
            "Empty: made once and kept in the user's cache directory, or in `EMBEDQ_COMPILE_CACHE`."
        ),
    ] = Secret("")
    redis_username: Annotated[
        str, Meta(description="User name for Redis. Empty: the one in the address, or Redis's default user.")
    ] = ""
    redis_password: Annotated[
        Secret, Meta(description="Password for Redis, instead of one in the address.")
    ] = Secret("")
    redis_ssl_cafile: Annotated[
        str,
        Meta(
            description="PEM file of authorities that sign the certificate of a `rediss://` Redis. Empty: the system's."
        ),
    ] = ""
    redis_ssl_certfile: Annotated[
        str, Meta(description="PEM file of the certificate that we show to Redis. Empty: none is shown.")
    ] = ""
    redis_ssl_keyfile: Annotated[
        str, Meta(description="PEM file of that certificate's private key. Empty: in the certificate's file.")
    ] = ""

    # Delivery

    commit_interval_ms: Annotated[
        PositiveFloat,
        Meta(
            description="Milliseconds between two commits of offsets while there is something to commit. "
            "A crash repeats what was answered since the last one."
        ),
    ] = 100.0
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
            description="Milliseconds without a heartbeat after which the group gives a replica's partitions to others. "
            "So long a killed replica's jobs wait, and so long a replica may be frozen without its jobs being repeated.",
        ),
    ] = 10_000
    rebalance_timeout_ms: Annotated[
        int,
        Meta(
            ge=1000,
            description="Milliseconds that the group waits for a replica in a rebalance, which stops nobody; at least the "
            "session timeout. A partition that moves to another replica waits for half of it, and for at most 30 s, "
            "until what is in flight of it is answered.",
        ),
    ] = 60_000
    static_membership: Annotated[
        bool,
        Meta(
            description="`EMBEDQ_REPLICA`, which must be set, is the replica's static name in the group: one that stops and "
            "comes back within the session timeout finds its partitions as they were, and nobody else gets them before."
        ),
    ] = False
    stuck_after_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds after which a job that later ones of its lane have overtaken is a reason not to be ready."
        ),
    ] = 120.0
    stuck_limit_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds after which such a job is answered with an error and copied to the dead letters, so that its "
            "partition is committed on; at least `EMBEDQ_STUCK_AFTER_S`."
        ),
    ] = 900.0
    reply_timeout_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds that a result may wait for a reply address that takes nothing, while other topics and partitions "
            "do; after that its job is dead-lettered. The default leaves time to elect a leader after a broker was lost or has frozen."
        ),
    ] = 30.0
    retry_delays_s: Annotated[
        str,
        Meta(
            pattern=r"^(\d+(\.\d+)?(,\d+(\.\d+)?){0,7})?$",
            description="Seconds that a bulk job waits before it is run again, when its answer would be an error that may heal "
            "(`internal`, `undeliverable`): one number for each tier, separated by commas, each with a topic `embed.retry.1`, "
            "`embed.retry.2`, … After the last one it is answered with the error. Empty: no job is run again.",
        ),
    ] = "30,300"
    bulk_delivery: Annotated[
        Literal["at-least-once", "exactly-once"],
        Meta(
            description="`exactly-once`: results of the bulk lane are published in transactions, together with the offsets that "
            "they answer. Readers that read committed records alone see each once, a little later. Needs Kafka 2.5 or newer."
        ),
    ] = "at-least-once"
    transaction_interval_ms: Annotated[
        PositiveFloat,
        Meta(
            description="Milliseconds between two transactions: what `exactly-once` adds to the time of a bulk job."
        ),
    ] = 100.0
    drain_timeout_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds that a stop, or a reload before its swap, waits for the jobs in flight. "
            "Jobs that a stop leaves unfinished are repeated by another replica."
        ),
    ] = 30.0
    stall_timeout_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds that a loop or a micro-batch may be stuck before `/livez` fails. "
            "A micro-batch or a tokenizer that is stuck for as long also ends the process."
        ),
    ] = 300.0
    load_timeout_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds that loading a model may take. After that it is given up, and the model before serves; "
            "a thread that hangs in it is left behind."
        ),
    ] = 900.0
    leave_timeout_s: Annotated[
        PositiveFloat,
        Meta(
            description="Seconds beyond `EMBEDQ_DRAIN_TIMEOUT_S` that a stop may take, whatever hangs. "
            "After that the process ends by force, with code 1."
        ),
    ] = 15.0

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

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings of this environment.

        Raises:
            SettingsError: naming the variable and what was expected.
        """
        raw: dict[str, str] = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environ.items()
            if name.startswith(PREFIX) and name not in _OTHERS
        }
        hints = get_type_hints(cls, include_extras=True)
        for field in _secrets(cls):
            _read_file(raw, field)
        meant = {name: plain(hints[name], value) if name in hints else value for name, value in raw.items()}
        try:
            return msgspec.convert(meant, cls, strict=False, dec_hook=lambda kind, value: kind(value))
        except msgspec.ValidationError as error:
            raise SettingsError(_explain(str(error), raw)) from None

    def __post_init__(self) -> None:
        if self.rebalance_timeout_ms < self.session_timeout_ms:
            raise ValueError("EMBEDQ_REBALANCE_TIMEOUT_MS: expected at least EMBEDQ_SESSION_TIMEOUT_MS")
        if self.stuck_limit_s < self.stuck_after_s:
            raise ValueError("EMBEDQ_STUCK_LIMIT_S: expected at least EMBEDQ_STUCK_AFTER_S")
        if self.static_membership and not self.replica:
            raise ValueError("EMBEDQ_STATIC_MEMBERSHIP: needs EMBEDQ_REPLICA, the same after each restart")
        if self.fp8_keep and self.quantization != "fp8":
            raise ValueError("EMBEDQ_FP8_KEEP: needs EMBEDQ_QUANTIZATION=fp8")
        if self.devices and self.device != "auto":
            raise ValueError("EMBEDQ_DEVICE: cannot be set together with EMBEDQ_DEVICES")
        if any(delay > _LONGEST_RETRY_S for delay in self.retry_delays):
            raise ValueError(f"EMBEDQ_RETRY_DELAYS_S: expected at most {_LONGEST_RETRY_S:.0f} each")
        self._kafka_options()  # what does not fit together is said now

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

    @property
    def retry_delays(self) -> tuple[float, ...]:
        """Of each retry tier, in seconds."""
        return tuple(float(delay) for delay in self.retry_delays_s.split(",") if delay)

    def named(self) -> Settings:
        """These settings with a replica name that no other process has."""
        if self.replica:
            return self
        return msgspec.structs.replace(self, replica=f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}")

    @property
    def load(self) -> LoadOptions:
        """How models are loaded. Blocks on the file system."""
        return LoadOptions(
            device=self.device,
            threads=self.threads or None,
            quantization=self.quantization,
            keep_bf16=tuple(int(number) for number in self.fp8_keep.split(",") if number),
            deterministic=self.deterministic,
            known_models=Path(self.compile_cache) / "models" if self.compile_cache else None,
            root=self.root,
            dry_run_s=min(_DRY_RUN_S, self.load_timeout_s),
        )

    @property
    def intake(self) -> IntakeOptions:
        """How jobs are polled and their offsets committed."""
        from embedq_consumer.intake import IntakeOptions

        return IntakeOptions(
            group=self.group,
            replica=self.replica,
            static_membership=self.static_membership,
            max_in_flight_jobs=self.max_in_flight_jobs,
            max_in_flight_bytes=self.max_in_flight_bytes,
            read_ahead_s=self.read_ahead_s,
            max_started_texts=self.max_started_texts,
            max_pending_bytes=self.max_pending_bytes,
            max_poll_records=self.max_poll_records,
            max_uncommitted=self.max_uncommitted_jobs,
            bulk_in_order=self.exactly_once is not None,
            max_inflated_bytes=self.max_inflated_bytes,
            commit_interval_s=self.commit_interval_ms / 1000,
            session_timeout_ms=self.session_timeout_ms,
            rebalance_timeout_ms=self.rebalance_timeout_ms,
            stuck_after_s=self.stuck_after_s,
            stuck_limit_s=self.stuck_limit_s,
        )

    def claimant(self) -> Claimant:
        """This process, as commits name it."""
        from embedq_consumer.quarantine import Claimant

        return Claimant(
            owner=uuid.uuid4().hex[:16],
            replica=self.replica,
            # What it started may lie anywhere among what it polled, since clients take turns.
            span=self.max_in_flight_jobs + self.max_poll_records,
        )

    @property
    def exactly_once(self) -> ExactlyOnceOptions | None:
        """How the bulk lane's results go out in transactions; None: they do not."""
        from embedq_consumer.exactly_once import ExactlyOnceOptions

        if self.bulk_delivery == "at-least-once":
            return None
        return ExactlyOnceOptions(
            group=self.group,
            interval_s=self.transaction_interval_ms / 1000,
            reply_timeout_s=self.reply_timeout_s,
        )

    @property
    def cache(self) -> CacheOptions:
        """Where vectors are remembered, and for how long."""
        from embedq_consumer.cache import CacheOptions, RedisOptions

        return CacheOptions(
            redis=RedisOptions(
                url=self.redis_url.reveal(),
                username=self.redis_username,
                password=self.redis_password.reveal(),
                ssl_cafile=self.redis_ssl_cafile,
                ssl_certfile=self.redis_ssl_certfile,
                ssl_keyfile=self.redis_ssl_keyfile,
            ),
            ttl_s=self.cache_ttl_s,
            timeout_s=self.cache_timeout_ms / 1000,
        )

    def cache_secret(self, environ: Mapping[str, str]) -> SecretSource:
        """What signs cache entries; `environ` says where the user's cache directory is."""
        from embedq_consumer.cache import SecretSource

        try:
            kept = (Path(self.compile_cache) if self.compile_cache else user_cache(environ)) / "cache-key"
        except RuntimeError:  # there is no home directory
            kept = None
        return SecretSource(text=self.cache_key.reveal(), kept=kept)

    @property
    def admission(self) -> AdmissionPolicy:
        """Which jobs are accepted."""
        from embedq_consumer.intake import AdmissionPolicy

        return AdmissionPolicy(
            topics=self.topics,
            alias=self.alias,
            max_inputs=self.max_inputs,
            max_text_bytes=self.max_text_bytes,
            max_result_bytes=self.max_result_bytes,
            reply_patterns=self.reply_patterns,
        )

    def read_mappings(self) -> Mappings:
        """How records of other shapes are read. Blocks on the file system.

        Raises:
            SettingsError: the file cannot be used, or needs a Schema Registry that is not set.
        """
        from embedq_consumer.shapes import BadMappings, Mappings, read_mappings

        if not self.mappings:
            return Mappings()
        try:
            found = read_mappings(Path(self.mappings), self.topics)
        except BadMappings as error:
            raise SettingsError(f"EMBEDQ_MAPPINGS: {error}") from None
        if found.registered and not self.schema_registry_url:
            raise SettingsError(
                f"EMBEDQ_SCHEMA_REGISTRY_URL: must be set, since the results of the mapping {found.registered[0]} have a "
                "registered schema"
            )
        return found

    @property
    def schema_registry(self) -> RegistryOptions | None:
        """Where the Schema Registry is; None without one."""
        from embedq_consumer.shapes import RegistryOptions

        if not self.schema_registry_url:
            return None
        return RegistryOptions(
            url=self.schema_registry_url,
            username=self.schema_registry_username,
            password=self.schema_registry_password,
            cafile=self.schema_registry_cafile,
        )

    def served_model(self, batch_tokens: int) -> ModelOptions:
        """The one alias of this replica. `batch_tokens` is the budget in full: `max_batch_tokens`, or the device's own.

        Blocks on the file system.
        """
        from embedq_consumer.lifecycle.served_model import BatchOptions, ModelOptions

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
            load_timeout_s=self.load_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
            attempts=Path(self.compile_cache) / "loads" if self.compile_cache else None,
        )

    def kafka(self) -> dict[str, Any]:
        """What each aiokafka client needs to reach the brokers. Reads the certificate files, if TLS is on.

        Raises:
            SettingsError: one of the files cannot be used.
        """
        try:
            return self._kafka_options().client_options()
        except BadOption as error:
            raise _bad_kafka_setting(error) from error

    def _kafka_options(self) -> KafkaOptions:
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


def _secrets(kind: type[msgspec.Struct]) -> list[str]:
    """The fields that hold secrets, each of which may be in a file of its own."""
    hints = get_type_hints(kind)
    return [name for name in kind.__struct_fields__ if hints[name] is Secret]


def _read_file(raw: dict[str, str], field: str) -> None:
    """Put what the file of `EMBEDQ_<FIELD>_FILE` holds where the variable itself would be."""
    path = raw.pop(f"{field}_file", None)
    if path is None:
        return
    name = f"{PREFIX}{field.upper()}"
    if field in raw:
        raise SettingsError(f"{name}: cannot be set together with {name}_FILE")
    try:
        raw[field] = read_secret(path)
    except ValueError as error:
        raise SettingsError(f"{name}_FILE: expected a file with one secret; {path} {error}") from None


def _explain(message: str, raw: Mapping[str, str]) -> str:
    """msgspec's sentence in plain words, after the variable's name."""
    if unknown := re.match(r"Object contains unknown field `(.*)`", message):
        close = difflib.get_close_matches(unknown[1], Settings.__struct_fields__, n=1)
        hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
        return f"unknown setting {PREFIX}{unknown[1].upper()}{hint}"
    if missing := re.match(r"Object missing required field `(\w+)`", message):
        return f"{PREFIX}{missing[1].upper()} must be set"
    if at := re.search(r" - at `\$\.(\w+)`$", message):
        return f"{PREFIX}{at[1].upper()}: {wrong(Settings, at[1], raw)}"
    return message
