"""Where Kafka is and how to log in, without a Kafka client: for settings and the command line, which only read it."""

from embedq_shared.access.options import (
    DEFAULT_MAX_INFLATED_BYTES,
    BadOption,
    KafkaOptions,
    SaslMechanism,
    SecurityProtocol,
)

__all__ = [
    "DEFAULT_MAX_INFLATED_BYTES",
    "BadOption",
    "KafkaOptions",
    "SaslMechanism",
    "SecurityProtocol",
    "addresses",
]
