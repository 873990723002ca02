"""The service's settings: one frozen struct, read once from the environment. A name that is mistyped is an error."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from embedq_consumer.engine import LoadOptions, Quantization
from embedq_shared.access import DEFAULT_MAX_INFLATED_BYTES
from embedq_shared.messages import DEFAULT_ALIAS, DEFAULT_MAX_INPUTS, MAX_ID_LENGTH
from embedq_shared.secret import Secret
from embedq_shared.settings.environment import SettingsError, read_settings
from embedq_shared.settings.kafka import OF_THE_LOCAL_STACK, PREFIX, KafkaSettings, NotEmpty
from embedq_shared.topics import DEFAULT_POOL, GROUP, Topics, pool_named
from embedq_shared.user_cache import user_cache

if TYPE_CHECKING:
    from embedq_consumer.cache import CacheOptions, SecretSource
    from embedq_consumer.exactly_once import ExactlyOnceOptions
    from embedq_consumer.intake import AdmissionPolicy, IntakeOptions
    from embedq_consumer.lifecycle.served_models import AliasOptions
    from embedq_consumer.quarantine import Claimant
    from embedq_consumer.shapes import Mappings, RegistryOptions

__all__ = ["PREFIX", "Settings", "SettingsError"]

_GATEWAY: Final = "EMBEDQ_GATEWAY_"
"""The gateway's own settings begin alike, and both may be told by one file."""
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
Port = Annotated[int, Meta(ge=0, le=65535)]


# More than 300 lines: a field for each environment variable, with its description.
class Settings(KafkaSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each field is the environment variable `EMBEDQ_<FIELD>`; its description is what the page of settings says.

    The properties at the end group fields into the options that each room takes. They import the rooms, and this file does
    not: a wrong setting is named before anything heavy is loaded.
    """

    # Where

    redis_url: Annotated[
        Secret,
        Meta(
            description="Redis for the vector cache, such as `redis://HOST:6379/0`, or with TLS "
            "`rediss://HOST:6379/0`. Empty: no cache."
        ),
    ] = Secret("")
    pool: Annotated[
        str,
        Meta(
            pattern=r"^(?!bulk$)[A-Za-z0-9_-]{0,64}(?!\n)$",
            extra={"takes": "letters, digits, `_` and `-`, at most 64, not `bulk`"},
            description="The pool of this replica: those of one pool serve the same aliases, and read job topics of their own, "
            "`embed.jobs.POOL` and `embed.jobs.POOL.bulk`. `default`: `embed.jobs` and `embed.jobs.bulk`.",
        ),
    ] = DEFAULT_POOL
    group: Annotated[
        NotEmpty,
        Meta(
            description="Consumer group. Replicas of one group share the jobs. In another pool than the default one the pool's name is "
            "added: `embedq.POOL`."
        ),
    ] = GROUP
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
    event_loop: Annotated[
        Literal["asyncio", "uvloop"],
        Meta(description="The event loop: Python's own, or uvloop, where that package is installed."),
    ] = "asyncio"
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
    aliases: Annotated[
        str,
        Meta(
            description="More aliases that this replica serves beside `EMBEDQ_ALIAS`, separated by commas: `NAME=DIRECTORY`, the model "
            "to begin with as long as no command names another one, or `NAME` alone for `EMBEDQ_MODEL`. The same in all replicas of a "
            "group. A model that several aliases have is in memory once."
        ),
    ] = ""
    kept_models: Annotated[
        int,
        Meta(
            ge=0,
            description="Models that stay in memory after the last alias has left them, so that going back to one costs no load. The "
            "least recently used goes first: when there are more, and when a load needs its memory.",
        ),
    ] = 0
    pinned_models: Annotated[
        str,
        Meta(
            description="Models that stay in memory in any case once an alias has served them: directories as commands name them, "
            "separated by commas."
        ),
    ] = ""
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
            description="`fp8` halves the memory of the weights; it needs a GPU of compute capability 9.0 or above. `bf16` is for a "
            "CPU with instructions for it, such as AMX, where a GPU's models run in bf16 anyway. Both change the vectors, and so "
            "the model version."
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
            description="Tokens that a micro-batch may hold. 0: 16384 on a GPU, on a CPU 256 for each thread, from 1024 to 4096, which keeps "
            "the device busy without delaying the texts that come next. Lowered where the device has too little memory.",
        ),
    ] = 0
    max_batch_items: Annotated[PositiveInt, Meta(description="Texts that a micro-batch may hold.")] = 1024
    max_wait_ms: Annotated[
        NotNegative,
        Meta(
            description="Milliseconds that a text waits at most for others to fill its micro-batch; not at all while the device "
            "is idle and no others are at the tokenizer."
        ),
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
    cache_warm_texts: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="Texts of interactive jobs that are kept in this process's memory, those used most, so that the cache has "
            "their vectors of a new model before it serves. They are written nowhere; 10,000 take some 20 MB. 0: none is kept, "
            "and the cache is not warmed.",
        ),
    ] = 0
    cache_warm_s: Annotated[
        PositiveFloat,
        Meta(description="Seconds of a reload that may go into that, beside the model that serves."),
    ] = 30.0
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
            description="Seconds that a stop, or a reload before its swap, waits for the jobs in flight; a reload lets them run down "
            "for as long before that, while others come and go. Jobs that a stop leaves unfinished are repeated by another replica."
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

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings of this environment.

        Raises:
            SettingsError: naming the variable and what was expected.
        """
        return read_settings(cls, PREFIX, environ, ours=_is_ours)

    def __post_init__(self) -> None:
        if self.rebalance_timeout_ms < self.session_timeout_ms:
            raise ValueError("EMBEDQ_REBALANCE_TIMEOUT_MS: expected at least EMBEDQ_SESSION_TIMEOUT_MS")
        if self.stuck_limit_s < self.stuck_after_s:
            raise ValueError("EMBEDQ_STUCK_LIMIT_S: expected at least EMBEDQ_STUCK_AFTER_S")
        if self.static_membership and not self.replica:
            raise ValueError("EMBEDQ_STATIC_MEMBERSHIP: needs EMBEDQ_REPLICA, the same after each restart")
        if self.cache_warm_texts and not self.redis_url:
            raise ValueError("EMBEDQ_CACHE_WARM_TEXTS: needs EMBEDQ_REDIS_URL")
        if self.fp8_keep and self.quantization != "fp8":
            raise ValueError("EMBEDQ_FP8_KEEP: needs EMBEDQ_QUANTIZATION=fp8")
        if self.devices and self.device != "auto":
            raise ValueError("EMBEDQ_DEVICE: cannot be set together with EMBEDQ_DEVICES")
        if any(delay > _LONGEST_RETRY_S for delay in self.retry_delays):
            raise ValueError(f"EMBEDQ_RETRY_DELAYS_S: expected at most {_LONGEST_RETRY_S:.0f} each")
        if self.topics.pool is not None and DEFAULT_ALIAS in (self.alias, *self.further_aliases):
            raise ValueError(
                f"EMBEDQ_ALIAS: expected no alias {DEFAULT_ALIAS} with EMBEDQ_POOL, since jobs that name no model go to the default pool"
            )
        self._check_aliases()
        self.kafka_options()  # what does not fit together is said now

    def _check_aliases(self) -> None:
        names = [part.partition("=")[0].strip() for part in _parts(self.aliases)]
        if "" in names or any(
            "=" in part and not part.partition("=")[2].strip() for part in _parts(self.aliases)
        ):
            raise ValueError("EMBEDQ_ALIASES: expected NAME or NAME=DIRECTORY, separated by commas")
        if len({self.alias, *names}) <= len(names):
            raise ValueError("EMBEDQ_ALIASES: expected each name once, and not that of EMBEDQ_ALIAS")
        if any(len(name) > MAX_ID_LENGTH for name in names):
            raise ValueError(f"EMBEDQ_ALIASES: expected names of at most {MAX_ID_LENGTH} characters")

    @property
    def topics(self) -> Topics:
        """The topics below this prefix, as this pool has them."""
        return Topics(self.topic_prefix, pool_named(self.pool))

    @property
    def consumer_group(self) -> str:
        """The group that reads this pool's lanes."""
        return self.topics.group(self.group)

    @property
    def further_aliases(self) -> dict[str, Path]:
        """The aliases beside the first, and the directory with which each begins."""
        pairs = [part.partition("=") for part in _parts(self.aliases)]
        return {name.strip(): Path(path.strip() or self.model) for name, _, path in pairs}

    @property
    def root(self) -> Path:
        """The directory below which every model of a command must lie, with links resolved."""
        return Path(self.model_root).resolve() if self.model_root else Path(self.model).resolve().parent

    @property
    def reply_patterns(self) -> tuple[str, ...]:
        """The shell patterns of allowed reply topics."""
        return tuple(_parts(self.reply_topics))

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
            group=self.consumer_group,
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
            group=self.consumer_group,
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

    def served_models(self, batch_tokens: int, *, late: bool = False) -> AliasOptions:
        """The aliases of this replica. `batch_tokens` is the budget in full: `max_batch_tokens`, or the device's own; `late`:
        the device is a CPU, for which micro-batches are formed at the last moment.

        Blocks on the file system.
        """
        from embedq_consumer.lifecycle.served_model import BatchOptions, ModelOptions
        from embedq_consumer.lifecycle.served_models import AliasOptions
        from embedq_consumer.lifecycle.warming.cache_warmer import WarmOptions

        first = ModelOptions(
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
                late=late,
            ),
            drain_timeout_s=self.drain_timeout_s,
            load_timeout_s=self.load_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
            attempts=Path(self.compile_cache) / "loads" if self.compile_cache else None,
            warming=WarmOptions(texts=self.cache_warm_texts, seconds=self.cache_warm_s)
            if self.cache_warm_texts
            else None,
        )
        others = [
            msgspec.structs.replace(first, alias=alias, first=False, configured=path.resolve())
            for alias, path in self.further_aliases.items()
        ]
        return AliasOptions(
            aliases=[first, *others],
            kept_models=self.kept_models,
            pinned=frozenset((self.root / path).resolve() for path in _parts(self.pinned_models)),
        )


def _parts(listed: str) -> list[str]:
    return [part.strip() for part in listed.split(",") if part.strip()]


def _is_ours(name: str) -> bool:
    return name not in OF_THE_LOCAL_STACK and not name.startswith(_GATEWAY)
