"""The one room that knows aiokafka's traps: connecting, stopping, unreadable records, committed offsets.

Service and SDK use aiokafka through it. The contract (messages, codec, headers, topics) does not import it, so that
reading a record needs no Kafka client.
"""

from typing import Final

from aiokafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    ConsumerRecord,
    TopicPartition,
)
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from embedq_shared.kafka.connecting import BrokerUnreachable, connect, reason, start_client
from embedq_shared.kafka.groups import committed_offsets, group_lag
from embedq_shared.kafka.reading.consumer import BoundedConsumer
from embedq_shared.kafka.reading.inflation import DEFAULT_MAX_INFLATED_BYTES
from embedq_shared.kafka.reading.record_batches import Unreadable
from embedq_shared.kafka.reading.unreadable import (
    Polled,
    UnreadableRecord,
    poll,
    poll_partition,
    position,
)
from embedq_shared.kafka.security.options import BadOption, KafkaOptions, SaslMechanism, SecurityProtocol
from embedq_shared.kafka.security.refusals import KafkaRefused, explain, is_permanent
from embedq_shared.kafka.security.tokens import OAuthOptions
from embedq_shared.kafka.stopping import stop_client

__all__ = [
    "DEFAULT_MAX_INFLATED_BYTES",
    "TOO_LARGE",
    "AIOKafkaAdminClient",
    "AIOKafkaConsumer",
    "AIOKafkaProducer",
    "BadOption",
    "BoundedConsumer",
    "BrokerUnreachable",
    "CommitFailedError",
    "ConsumerRebalanceListener",
    "ConsumerRecord",
    "IllegalStateError",
    "InvalidTopicError",
    "KafkaError",
    "KafkaOptions",
    "KafkaRefused",
    "OAuthOptions",
    "Polled",
    "RoundRobinPartitionAssignor",
    "SaslMechanism",
    "SecurityProtocol",
    "TopicAuthorizationFailedError",
    "TopicPartition",
    "UnknownTopicOrPartitionError",
    "Unreadable",
    "UnreadableRecord",
    "committed_offsets",
    "connect",
    "explain",
    "group_lag",
    "is_permanent",
    "poll",
    "poll_partition",
    "position",
    "reason",
    "start_client",
    "stop_client",
]

TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
"""What a broker says of a batch, or of a record, that is larger than it takes."""
