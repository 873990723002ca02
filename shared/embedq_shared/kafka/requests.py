"""Requests in newer versions than aiokafka has them, after the Kafka protocol guide (https://kafka.apache.org/protocol).

Brokers from 2.5 on have the first two (KIP-447): offsets in a transaction that name the member that sends them, and committed
offsets that no open transaction can change any more. From 2.8 on they say a topic's id (KIP-516), which another topic of the
same name never has.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable
from io import BytesIO
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)
from aiokafka.structs import OffsetAndMetadata

_UNSTABLE_OFFSET_COMMIT: Final = 88
"""An error code that aiokafka has no class for."""
_NO_ID: Final = bytes(16)
"""What a broker says of a topic that is not there, or that was made before there were ids."""


class _Uuid(AbstractType):  # type: ignore[misc]  # aiokafka has no type information
    """Sixteen bytes."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(16)


class TxnOffsetCommitResponse_v3(Response):  # type: ignore[misc]  # aiokafka has no type information
    """The outcome for each partition."""

    API_KEY = 28
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "errors",
            CompactArray(
                ("topic", CompactString("utf-8")),
                (
                    "partition_errors",
                    CompactArray(("partition", Int32), ("error_code", Int16), ("tags", TaggedFields)),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommitRequest_v3(RequestStruct):  # type: ignore[misc]  # aiokafka has no type information
    """Offsets into a transaction, with the member that sends them."""

    API_KEY = 28
    API_VERSION = 3
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = TxnOffsetCommitResponse_v3
    SCHEMA = Schema(
        ("transactional_id", CompactString("utf-8")),
        ("group_id", CompactString("utf-8")),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation_id", Int32),
        ("member_id", CompactString("utf-8")),
        ("group_instance_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommit(Request[TxnOffsetCommitRequest_v3]):  # type: ignore[misc]  # aiokafka has no type information
    """Builds it."""

    API_KEY = 28

    def __init__(self, *fields: Any) -> None:
        self._fields = fields

    def build(self, request_struct_class: type[TxnOffsetCommitRequest_v3]) -> TxnOffsetCommitRequest_v3:
        """aiokafka: the request in the version that the broker knows."""
        return request_struct_class(*self._fields)


class OffsetFetchResponse_v7(Response):  # type: ignore[misc]  # aiokafka has no type information
    """A group's offset for each partition, -1 where there is none."""

    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class OffsetFetchRequest_v7(RequestStruct):  # type: ignore[misc]  # aiokafka has no type information
    """A group's offsets, or an error where an open transaction may still change one."""

    API_KEY = 9
    API_VERSION = 7
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = OffsetFetchResponse_v7
    SCHEMA = Schema(
        ("group_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                ("partitions", CompactArray(Int32)),
                ("tags", TaggedFields),
            ),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class StableOffsets(Request[OffsetFetchRequest_v7]):  # type: ignore[misc]  # aiokafka has no type information
    """Asks for a group's offsets that no open transaction can change."""

    API_KEY = 9

    def __init__(self, group: str, partitions: Iterable[TopicPartition]) -> None:
        self._group = group
        self._topics: dict[str, list[int]] = defaultdict(list)
        for partition in partitions:
            self._topics[partition.topic].append(partition.partition)

    def build(self, request_struct_class: type[OffsetFetchRequest_v7]) -> OffsetFetchRequest_v7:
        """aiokafka: the request in the version that the broker knows."""
        topics: list[tuple[str, list[int], dict[int, bytes]]] = [
            (topic, numbers, {}) for topic, numbers in self._topics.items()
        ]
        return request_struct_class(self._group, topics, True, {})


class UnstableOffset(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """An open transaction may still change an offset: ask again."""

    retriable = True


def offsets_of(response: Any) -> dict[TopicPartition, OffsetAndMetadata | None]:
    """What the coordinator answered, None where the group never committed.

    Raises:
        KafkaError: it does not say; `UnstableOffset` as long as a transaction is open.
    """
    found: dict[TopicPartition, OffsetAndMetadata | None] = {}
    codes = {response.error_code}
    for topic, answers, _ in response.topics:
        for number, offset, _, metadata, code, _ in answers:
            codes.add(code)
            stored = None if offset < 0 else OffsetAndMetadata(offset, metadata or "")
            found[TopicPartition(topic, number)] = stored
    codes.discard(0)
    for code in sorted(codes):
        raise UnstableOffset if code == _UNSTABLE_OFFSET_COMMIT else for_code(code)()
    return found


class MetadataResponse_v10(Response):  # type: ignore[misc]  # aiokafka has no type information
    """The brokers, and the topics that were asked for."""

    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class MetadataRequest_v10(RequestStruct):  # type: ignore[misc]  # aiokafka has no type information
    """What the brokers know of some topics."""

    API_KEY = 3
    API_VERSION = 10
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = MetadataResponse_v10
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class TopicFacts(msgspec.Struct, frozen=True):
    """What a broker says of a topic that is there: `id` as Kafka's tools print it, "" if it has none."""

    id: str
    partitions: int


class TopicIds(Request[MetadataRequest_v10]):  # type: ignore[misc]  # aiokafka has no type information
    """Asks for the ids of topics, and creates none."""

    API_KEY = 3

    def __init__(self, topics: Iterable[str]) -> None:
        self._topics = list(topics)

    def build(self, request_struct_class: type[MetadataRequest_v10]) -> MetadataRequest_v10:
        """aiokafka: the request in the version that the broker knows."""
        return request_struct_class([(_NO_ID, topic, {}) for topic in self._topics], False, False, False, {})


def topic_ids_of(response: Any) -> dict[str, str]:
    """The id of each topic that is there and has one, as Kafka's tools print it."""
    return {
        name: facts.id
        for name, facts in topics_of(response).items()
        if isinstance(facts, TopicFacts) and facts.id
    }


def topics_of(response: Any) -> dict[str, TopicFacts | KafkaError]:
    """What the broker says of each topic that it was asked for."""
    return {
        name: TopicFacts("" if id == _NO_ID else _printed(id), len(partitions))
        if code == 0
        else for_code(code)()
        for code, name, id, _, partitions, *_ in response.topics
    }


def _printed(id: bytes) -> str:
    return base64.urlsafe_b64encode(id).decode().rstrip("=")
