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
from aiokafka.errors import (
    IllegalStateError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
)
from aiokafka.structs import OffsetAndMetadata

from embedq_shared.kafka.connecting import BrokerUnreachable, connect, reason
from embedq_shared.kafka.group_member import (
    FENCED,
    Follower,
    GroupMember,
    GroupMemberOptions,
    Membership,
    ReplacedMember,
)
from embedq_shared.kafka.groups import committed_offsets, delete_before, group_lag
from embedq_shared.kafka.options import KafkaOptions, SecurityProtocol
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
    "FENCED",
    "TOO_LARGE",
    "UNREADABLE",
    "AIOKafkaAdminClient",
    "AIOKafkaConsumer",
    "AIOKafkaProducer",
    "BrokerUnreachable",
    "ConsumerRebalanceListener",
    "ConsumerRecord",
    "Follower",
    "GroupMember",
    "GroupMemberOptions",
    "IllegalStateError",
    "InvalidTopicError",
    "KafkaError",
    "KafkaOptions",
    "Membership",
    "OffsetAndMetadata",
    "Polled",
    "ReplacedMember",
    "SecurityProtocol",
    "TopicAuthorizationFailedError",
    "TopicPartition",
    "UnknownMemberIdError",
    "UnknownTopicOrPartitionError",
    "UnreadableRecord",
    "committed_offsets",
    "connect",
    "delete_before",
    "group_lag",
    "poll",
    "poll_partition",
    "position",
    "reason",
    "step_over",
    "stop_client",
]

TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
"""What a broker says of a batch, or of a record, that is larger than it takes."""
