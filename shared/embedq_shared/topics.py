"""Names on the broker: topics, the consumer group, headers and content types."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

GROUP: Final = "embedq"
"""The one consumer group, for both lanes."""

DEFAULT_PARTITIONS: Final = 8
"""Of the job, result and dead letter topics: replicas that can share a lane. More can be added later, but not taken away."""
DEFAULT_REPLY_PARTITIONS: Final = 64
"""Client instances spread over them, and each reads all of its partition."""
DEFAULT_RETRY_TIERS: Final = 2
"""As many as the service's setting `EMBEDQ_RETRY_DELAYS_S` has by default."""
MAX_RETRY_TIERS: Final = 8
"""As many retry topics are looked for: with delays that double it is a span from a minute to hours."""

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
MSGPACK_TYPES: Final = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})

# A job's headers, by family: ours, Spring Kafka's, SmallRye's. Each field is looked up by itself, in this order.
CORRELATION: Final = ("correlation-id", "kafka_correlationId", "REPLY_CORRELATION_ID")
REPLY_TOPIC: Final = ("reply-topic", "kafka_replyTopic", "REPLY_TOPIC")
REPLY_PARTITION: Final = ("reply-partition", "kafka_replyPartition", "REPLY_PARTITION")
DEADLINE: Final = "deadline"
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
    r"|.*\.(jobs|jobs\.bulk|control|dlq|retry|retry\..*)"
)


def is_reserved(name: str) -> bool:
    """Whether a topic of this name is likely to hold state that a stray record would damage.

    No pattern allows replies there; only whoever writes the name in full does.
    """
    return _RESERVED.fullmatch(name) is not None


class Topics(msgspec.Struct, frozen=True):
    """The topics below one prefix, `embed` unless set otherwise."""

    prefix: str = "embed"

    @property
    def jobs(self) -> str:
        """Interactive jobs."""
        return f"{self.prefix}.jobs"

    @property
    def bulk(self) -> str:
        """Bulk jobs: they wait while there are interactive ones."""
        return f"{self.prefix}.jobs.bulk"

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
        """Records that no result could answer completely."""
        return f"{self.prefix}.dlq"

    def retry(self, tier: int) -> str:
        """Bulk jobs that wait to be run again; tiers are numbered from 1."""
        return f"{self.prefix}.retry.{tier}"

    @property
    def lanes(self) -> tuple[str, str]:
        """Both job topics, interactive first."""
        return (self.jobs, self.bulk)

    def is_internal(self, topic: str) -> bool:
        """Whether a result there could loop or do damage: Kafka's own topics, and embedq's that are not for results."""
        retry = f"{self.prefix}.retry"
        ours = {self.jobs, self.bulk, self.control, self.status, self.dead_letters, retry}
        return topic in ours or topic.startswith(("__", f"{retry}."))
