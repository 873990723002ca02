"""The one room that knows aiokafka's traps: connecting, stopping, unreadable records, committed offsets.

Service and SDK use aiokafka through it. The contract (messages, codec, headers, topics) does not import it, so that
reading a record needs no Kafka client.
"""

from typing import Final

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from embedq_shared.kafka.clients import AIOKafkaAdminClient, AIOKafkaConsumer, AIOKafkaProducer
from embedq_shared.kafka.connecting import BrokerUnreachable, connect, reason
from embedq_shared.kafka.errors import InvalidRecordError, UnsupportedCompressionTypeError, error_kinds
from embedq_shared.kafka.groups import committed_offsets, group_lag
from embedq_shared.kafka.options import KafkaOptions, SecurityProtocol
from embedq_shared.kafka.producing import BatchFull, Evicted, PartitionwiseProducer, partition_of
from embedq_shared.kafka.stopping import stop_client
from embedq_shared.kafka.unreadable import (
    UNREADABLE,
    Polled,
    UnreadableRecord,
    poll,
    poll_partition,
    position,
    step_over,
)

__all__ = [
    "TOO_LARGE",
    "UNREADABLE",
    "AIOKafkaAdminClient",
    "AIOKafkaConsumer",
    "AIOKafkaProducer",
    "BatchFull",
    "BrokerUnreachable",
    "CommitFailedError",
    "ConsumerRebalanceListener",
    "ConsumerRecord",
    "Evicted",
    "IllegalStateError",
    "InvalidRecordError",
    "InvalidTopicError",
    "KafkaConnectionError",
    "KafkaError",
    "KafkaOptions",
    "PartitionwiseProducer",
    "Polled",
    "RoundRobinPartitionAssignor",
    "SecurityProtocol",
    "TopicAuthorizationFailedError",
    "TopicPartition",
    "UnknownTopicOrPartitionError",
    "UnreadableRecord",
    "UnsupportedCompressionTypeError",
    "committed_offsets",
    "connect",
    "error_kinds",
    "group_lag",
    "partition_of",
    "poll",
    "poll_partition",
    "position",
    "reason",
    "step_over",
    "stop_client",
]

TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
"""What a broker says of a batch, or of a record, that is larger than it takes."""
