"""The one room that knows aiokafka's traps: connecting, stopping, unreadable records, committed offsets.

Service and SDK use aiokafka through it. The contract (messages, codec, headers, topics) does not import it, so that
reading a record needs no Kafka client.
"""

from typing import Final

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    IllegalStateError,
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
)
from aiokafka.structs import OffsetAndMetadata

from embedq_shared.access import (
    DEFAULT_MAX_INFLATED_BYTES,
    BadOption,
    KafkaOptions,
    SaslMechanism,
    SecurityProtocol,
)
from embedq_shared.kafka.clients import AIOKafkaAdminClient, AIOKafkaConsumer, AIOKafkaProducer
from embedq_shared.kafka.connecting import BrokerUnreachable, connect, reason, start_client
from embedq_shared.kafka.errors import InvalidRecordError, UnsupportedCompressionTypeError, error_kinds
from embedq_shared.kafka.group_member import (
    FENCED,
    Follower,
    GroupMember,
    GroupMemberOptions,
    Membership,
    ReplacedMember,
)
from embedq_shared.kafka.groups import committed_offsets, delete_before, group_lag
from embedq_shared.kafka.producing import BatchFull, Evicted, PartitionwiseProducer
from embedq_shared.kafka.reading.consumer import BoundedConsumer
from embedq_shared.kafka.reading.record_batches import Unreadable
from embedq_shared.kafka.reading.unreadable import (
    Polled,
    UnreadableRecord,
    poll,
    poll_partition,
    position,
)
from embedq_shared.kafka.requests import TopicFacts
from embedq_shared.kafka.security.refusals import KafkaRefused, explain, is_permanent
from embedq_shared.kafka.security.tokens import OAuthOptions
from embedq_shared.kafka.stopping import stop_client
from embedq_shared.kafka.transactions import (
    FencedMember,
    FencedProducer,
    MemberFenced,
    stable_offsets,
)
from embedq_shared.kafka.whole_partition import MakeConsumer, WholePartition
from embedq_shared.kafka.wire.partitioning import partition_of, partitions_of

__all__ = [
    "DEFAULT_MAX_INFLATED_BYTES",
    "FENCED",
    "TOO_LARGE",
    "AIOKafkaAdminClient",
    "AIOKafkaConsumer",
    "AIOKafkaProducer",
    "BadOption",
    "BatchFull",
    "BoundedConsumer",
    "BrokerUnreachable",
    "ConsumerRebalanceListener",
    "ConsumerRecord",
    "Evicted",
    "FencedMember",
    "FencedProducer",
    "Follower",
    "GroupMember",
    "GroupMemberOptions",
    "IllegalStateError",
    "InvalidRecordError",
    "InvalidTopicError",
    "KafkaConnectionError",
    "KafkaError",
    "KafkaOptions",
    "KafkaRefused",
    "KafkaTimeoutError",
    "MakeConsumer",
    "MemberFenced",
    "Membership",
    "OAuthOptions",
    "OffsetAndMetadata",
    "PartitionwiseProducer",
    "Polled",
    "ReplacedMember",
    "SaslMechanism",
    "SecurityProtocol",
    "TopicAuthorizationFailedError",
    "TopicFacts",
    "TopicPartition",
    "UnknownMemberIdError",
    "UnknownTopicOrPartitionError",
    "Unreadable",
    "UnreadableRecord",
    "UnsupportedCompressionTypeError",
    "WholePartition",
    "committed_offsets",
    "connect",
    "delete_before",
    "error_kinds",
    "explain",
    "group_lag",
    "is_permanent",
    "partition_of",
    "partitions_of",
    "poll",
    "poll_partition",
    "position",
    "reason",
    "stable_offsets",
    "start_client",
    "stop_client",
]

TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
"""What a broker says of a batch, or of a record, that is larger than it takes."""
