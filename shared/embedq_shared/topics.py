"""Names on the broker: topics, the consumer group, headers and content types."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Final, Literal

import msgspec

GROUP: Final = "embedq"
"""The one consumer group, for both lanes; that of another pool than the default one has the pool's name behind it."""

DEFAULT_POOL: Final = "default"
"""What people call the pool whose names have no pool in them; records name no pool for it."""
POOL_NAME: Final = r"^(?!(bulk|default)$)[A-Za-z0-9_-]{1,64}(?!\n)$"
"""Of any other pool. No dot, so that its topics are no other pool's, and not `bulk`, which is the default pool's lane."""

DEFAULT_PARTITIONS: Final = 8
"""Of the job, result and dead letter topics: replicas that can share a lane. More can be added later, but not taken away."""
DEFAULT_REPLY_PARTITIONS: Final = 64
"""Client instances spread over them, and each reads all of its partition."""
DEFAULT_RETRY_TIERS: Final = 2
"""As many as the service's setting `EMBEDQ_RETRY_DELAYS_S` has by default."""
MAX_RETRY_TIERS: Final = 8
"""The service looks for no more."""

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
MSGPACK_TYPES: Final = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})

# A job's headers, by family: ours, Spring Kafka's, SmallRye's. Each field is looked up by itself, in this order.
CORRELATION: Final = ("correlation-id", "kafka_correlationId", "REPLY_CORRELATION_ID")
REPLY_TOPIC: Final = ("reply-topic", "kafka_replyTopic", "REPLY_TOPIC")
REPLY_PARTITION: Final = ("reply-partition", "kafka_replyPartition", "REPLY_PARTITION")
DEADLINE: Final = "deadline"
CLIENT: Final = "client-id"
CONTENT_TYPE: Final = "content-type"
TRACE: Final = ("traceparent", "tracestate")

# A result's own headers, in addition to the echoed ones.
STATUS: Final = "embedq-status"
MODEL_VERSION: Final = "embedq-model-version"

Lane = Literal["interactive", "bulk"]
LANES: Final[tuple[Lane, Lane]] = ("interactive", "bulk")
"""Both lanes, in the order of `Topics.lanes`."""

MAX_TOPIC_LENGTH: Final = 249
_TOPIC_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


def is_topic_name(name: str) -> bool:
    """Whether Kafka would take `name` for a topic."""
    return _TOPIC_NAME.fullmatch(name) is not None and name not in {".", ".."}


# Names by which programs around Kafka keep state in topics: Kafka itself, Schema Registry and other companies' tools by a
# leading underscore, Connect by default and by custom, MirrorMaker, Kafka Streams, and embedq below any prefix.
_RESERVED: Final = re.compile(
    r"_.*"
    r"|connect-.*|.*[.-](configs|offsets|status)"
    r"|.*\.internal"
    r"|.*-(changelog|repartition)"
    r"|.*\.(jobs|jobs\.bulk|jobs\.[A-Za-z0-9_-]+\.bulk|control|dlq|retry|retry\..*)"
)
_POOL_NAME: Final = re.compile(POOL_NAME)


def is_reserved(name: str) -> bool:
    """Whether a topic of this name is likely to hold state that a stray record would damage.

    No pattern allows replies there; only whoever writes the name in full does.
    """
    return _RESERVED.fullmatch(name) is not None


def pool_named(name: str) -> str | None:
    """The pool that people mean by a name; None for the default one.

    Raises:
        ValueError: no pool can have this name; the message says what was expected.
    """
    if name in ("", DEFAULT_POOL):
        return None
    if _POOL_NAME.search(name) is None:
        raise ValueError(f"1 to 64 letters, digits, '_' and '-', not bulk; or {DEFAULT_POOL}")
    return name


class Topics(msgspec.Struct, frozen=True):
    """The topics below one prefix, `embed` unless set otherwise, and the group, as one pool of replicas has them. The one place that
    knows these names.

    Lanes, retry topics and group are each pool's own; all others are shared. The default pool is None.
    """

    prefix: str = "embed"
    pool: str | None = None

    def group(self, service: str = GROUP) -> str:
        """The pool's consumer group; `service` is the default pool's."""
        return service if self.pool is None else f"{service}.{self.pool}"

    @property
    def jobs(self) -> str:
        """Interactive jobs."""
        return f"{self.prefix}.jobs" if self.pool is None else f"{self.prefix}.jobs.{self.pool}"

    @property
    def bulk(self) -> str:
        """Bulk jobs: they wait while there are interactive ones."""
        return f"{self.jobs}.bulk"

    @property
    def results(self) -> str:
        """Results of jobs without a reply address."""
        return f"{self.prefix}.results"

    @property
    def replies(self) -> str:
        """Replies to clients, each of which reads one partition."""
        return f"{self.prefix}.replies"

    @property
    def control(self) -> str:
        """The desired model of each alias; one partition, compacted."""
        return f"{self.prefix}.control"

    @property
    def status(self) -> str:
        """The status of each replica; compacted, keyed by replica."""
        return f"{self.prefix}.status"

    @property
    def dead_letters(self) -> str:
        """Records that no result could answer completely, of all pools."""
        return f"{self.prefix}.dlq"

    def retry(self, tier: int) -> str:
        """Bulk jobs that wait to be run again; tiers are numbered from 1."""
        own = "" if self.pool is None else f".{self.pool}"
        return f"{self.prefix}.retry{own}.{tier}"

    def retries_among(self, names: Collection[str]) -> list[str]:
        """The retry topics among the names of topics, by their tiers."""
        return [name for tier in range(1, MAX_RETRY_TIERS + 1) if (name := self.retry(tier)) in names]

    @property
    def lanes(self) -> tuple[str, str]:
        """Both job topics, interactive first."""
        return (self.jobs, self.bulk)

    def lane(self, lane: Lane) -> str:
        """The job topic of a lane."""
        return self.bulk if lane == "bulk" else self.jobs

    def of(self, pool: str | None) -> Topics:
        """The same as another pool has them."""
        return Topics(self.prefix, pool)

    def pools_among(self, names: Iterable[str]) -> list[str]:
        """The pools, without the default one, both of whose lanes are among the names of topics, sorted."""
        known, begin = frozenset(names), f"{self.prefix}.jobs."
        found = {name.removeprefix(begin) for name in known if name.startswith(begin)}
        return sorted(
            pool for pool in found if _POOL_NAME.search(pool) and known.issuperset(self.of(pool).lanes)
        )

    def is_internal(self, topic: str) -> bool:
        """Whether a result there could loop or do damage: Kafka's own topics, and embedq's that are not for results, of any pool."""
        jobs, retry = f"{self.prefix}.jobs", f"{self.prefix}.retry"
        ours = {jobs, self.control, self.status, self.dead_letters, retry}
        return topic in ours or topic.startswith(("__", f"{jobs}.", f"{retry}."))
