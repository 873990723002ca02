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

from embedq_shared.messages import DEFAULT_ALIAS, DEFAULT_MAX_INPUTS
from embedq_shared.topics import GROUP, Topics

PREFIX: Final = "EMBEDQ_"
# The local stack's own variables begin alike and reach a service that it starts.
_OTHERS: Final = frozenset({"EMBEDQ_CACHE_DIR", "EMBEDQ_KAFKA_VERSION"})

_LARGEST: Final = 1e9  # "inf" reads as a float too, and is no time to wait

_DEVICE: Final = r"(cpu|cuda(:\d+)?)"

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
NotEmpty = Annotated[str, Meta(min_length=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class SettingsError(Exception):
    """A setting is missing, mistyped or out of range; the message names the variable."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each field is the environment variable `EMBEDQ_<FIELD>`. Sizes in bytes or tokens, times as the name says."""

    # Where
    kafka_servers: NotEmpty
    redis_url: str = ""  # empty: no cache
    topic_prefix: NotEmpty = "embed"
    group: NotEmpty = GROUP
    http_host: str = "0.0.0.0"
    http_port: Port = 9464
    replica: Annotated[str, Meta(max_length=256)] = ""  # empty: host name and a random suffix
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # What
    model: NotEmpty  # a directory in Hugging Face / sentence-transformers layout
    model_root: str = ""  # reloads stay below it; empty: the parent of `model`
    alias: NotEmpty = DEFAULT_ALIAS
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    # One replica for each, below one command: "all" GPUs, or some with commas, one of them more than once if need be.
    devices: Annotated[str, Meta(pattern=rf"^(all|{_DEVICE}(,{_DEVICE})*)?$")] = ""
    quantization: Literal["none", "fp8"] = (
        "none"  # fp8: half the memory, other vectors, another model version
    )
    # Layers that fp8 leaves in bf16: numbers with commas, negative ones from the end.
    fp8_keep: Annotated[str, Meta(pattern=r"^(-?\d+(,-?\d+)*)?$")] = ""
    deterministic: bool = (
        False  # bit-equal vectors whatever the batch, for some throughput; another model version
    )
    threads: Annotated[int, Meta(ge=0)] = 0  # CPU threads of the model; 0: PyTorch's choice
    compile_cache: str = ""  # what the next start need not do again; empty: below the user's cache directory

    # Micro-batches
    max_batch_tokens: Annotated[int, Meta(ge=0)] = 0  # 0: by device
    max_batch_items: PositiveInt = 1024
    max_wait_ms: NotNegative = 2.0  # how long a text waits for others to fill its micro-batch
    bulk_max_wait_s: NotNegative = 5.0  # a bulk text that waited longer goes first

    # Bounds
    max_in_flight_jobs: PositiveInt = 2048  # a lane
    max_in_flight_bytes: PositiveInt = 32 * 1024 * 1024  # a lane
    max_pending_bytes: PositiveInt = 256 * 1024 * 1024  # results that are being made
    max_poll_records: PositiveInt = 512
    max_inputs: PositiveInt = DEFAULT_MAX_INPUTS
    max_text_bytes: PositiveInt = 1_000_000
    max_result_bytes: Annotated[int, Meta(ge=4096)] = 900_000
    reply_topics: NotEmpty = "*"  # shell patterns, separated by commas

    # Cache
    cache_ttl_s: PositiveFloat = 7 * 24 * 3600.0
    cache_timeout_ms: PositiveFloat = 50.0

    # Delivery
    commit_interval_ms: PositiveFloat = 500.0
    max_uncommitted_jobs: PositiveInt = 2048  # a partition: what a crash repeats at most
    session_timeout_ms: Annotated[int, Meta(ge=1000)] = 45_000
    rebalance_timeout_ms: Annotated[int, Meta(ge=1000)] = 60_000
    publish_timeout_s: PositiveFloat = 60.0  # a broker that takes no result for so long ends the process
    drain_timeout_s: PositiveFloat = 30.0
    stall_timeout_s: PositiveFloat = 300.0  # a loop or micro-batch that is stuck for so long fails liveness

    # Kafka's security, as aiokafka names it
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    kafka_sasl_username: str = ""
    kafka_sasl_password: str = ""
    kafka_ssl_cafile: str = ""
    kafka_ssl_certfile: str = ""
    kafka_ssl_keyfile: str = ""

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
            raise ValueError("EMBEDQ_DEVICE: cannot be set beside EMBEDQ_DEVICES")

    @property
    def topics(self) -> Topics:
        """The topics below this prefix."""
        return Topics(self.topic_prefix)

    @property
    def root(self) -> Path:
        """The directory below which every model must lie, with links resolved."""
        return Path(self.model_root).resolve() if self.model_root else Path(self.model).resolve().parent

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers that `fp8_keep` names."""
        return tuple(int(number) for number in self.fp8_keep.split(",") if number)

    @property
    def reply_patterns(self) -> tuple[str, ...]:
        """The shell patterns of allowed reply topics."""
        return tuple(pattern.strip() for pattern in self.reply_topics.split(",") if pattern.strip())

    def named(self) -> Settings:
        """These settings with a replica name that no other process has."""
        if self.replica:
            return self
        return msgspec.structs.replace(self, replica=f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}")

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
    """msgspec's sentence with the variable's name in front."""
    if unknown := re.match(r"Object contains unknown field `(.*)`", message):
        close = difflib.get_close_matches(unknown[1], Settings.__struct_fields__, n=1)
        hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
        return f"{PREFIX}{unknown[1].upper()} is no setting{hint}"
    if missing := re.match(r"Object missing required field `(\w+)`", message):
        return f"{PREFIX}{missing[1].upper()} must be set"
    if at := re.match(r"(.*) - at `\$\.(\w+)`", message):
        if at[1].startswith("Invalid enum value"):
            allowed = ", ".join(get_args(get_type_hints(Settings)[at[2]]))
            return f"{PREFIX}{at[2].upper()}: expected one of {allowed}"
        return f"{PREFIX}{at[2].upper()}: {at[1][0].lower()}{at[1][1:]}"
    return message
