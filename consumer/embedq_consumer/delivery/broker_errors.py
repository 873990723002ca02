"""What each error of the Kafka protocol and its client means for a record that is sent, and what is done about it.

The one table of this: code asks `meaning_of`, `docs/broker-errors.md` is written from it, and a test holds it against every
class of error that aiokafka has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from embedq_shared.kafka import error_kinds

Scope = Literal["record", "partition", "topic", "cluster", "producer"]
"""What is wrong: everything else goes on as if nothing had happened."""

Action = Literal["refuse", "confirm", "retry"]
"""`refuse`: sending again cannot help. `confirm`: refuse if it is still so after a while, since metadata of a new topic
take a moment to reach each broker. `retry`: again, until the job's deadline."""


class Meaning(msgspec.Struct, frozen=True):
    """What one kind of error means."""

    scope: Scope
    action: Action
    text: str
    """For an operator: what the brokers did. It names no topic, since it goes into results."""


def _table(*groups: tuple[Scope, Action, Mapping[str, str]]) -> Mapping[str, Meaning]:
    return MappingProxyType(
        {
            name: Meaning(scope, action, text)
            for scope, action, texts in groups
            for name, text in texts.items()
        }
    )


def _all(names: str, text: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), text)


_NOT_AN_ANSWER: Final = "gave an answer that belongs to no record sent"

MEANINGS: Final = _table(
    (
        "record",
        "refuse",
        {
            "InvalidRecordError": "refused the record itself, as a compacted topic does one without a key",
            "InvalidTimestampError": "refused the record's timestamp (message.timestamp.before.max.ms, …after.max.ms)",
            "MessageSizeTooLargeError": "refused the record's size (max.message.bytes)",
            "PolicyViolationError": "refused the record by a policy of theirs",
            "RecordListTooLargeError": "refused the batch's size (segment.bytes)",
            "RecordTooLargeError": "were not asked: the record is larger than any request may be",
            "UnsupportedCompressionTypeError": "do not take the record's compression",
            "UnsupportedForMessageFormatError": "keep this topic in a message format that is too old for the record",
        },
    ),
    (
        "topic",
        "refuse",
        {
            "InvalidTopicError": "do not take records for a topic of this name",
            "TopicAuthorizationFailedError": "do not let this service write to the topic (ACL: Write, Describe)",
        },
    ),
    (
        "topic",
        "confirm",
        {"UnknownTopicOrPartitionError": "have no such topic, or not this partition of it"},
    ),
    (
        "partition",
        "retry",
        {
            "BatchFull": "were not asked: more than a batch waits",
            "BrokerNotAvailableError": "say that the partition's leader is not there",
            "CorruptRecordException": "received a damaged batch",
            "Evicted": "gave no answer",
            "KafkaStorageError": "cannot write to the partition's disk",
            "LeaderNotAvailableError": "have no leader for the partition",
            "ListenerNotFound": "have no address of the partition's leader for clients",
            "LogDirNotFound": "cannot find the partition's directory",
            "NotEnoughReplicasAfterAppendError": "wrote to fewer copies than min.insync.replicas",
            "NotEnoughReplicasError": "have fewer copies in sync than min.insync.replicas",
            "NotLeaderForPartitionError": "are changing the partition's leader",
            "ReassignmentInProgress": "are moving the partition",
            "ReplicaNotAvailableError": "miss a copy of the partition",
            "RequestTimedOutError": "did not get the record onto all copies in time",
            "StaleLeaderEpochCodeError": "are changing the partition's leader",
            "UnknownError": "failed in a way that they do not name; their own log says how",
        },
    ),
    (
        "cluster",
        "retry",
        {
            "AuthenticationFailedError": "do not accept who we are",
            "AuthenticationMethodNotSupported": "do not accept how we log in",
            "Cancelled": "were not reached: the connection was closed",
            "ClusterAuthorizationFailedError": "do not let this service write at all (ACL: IdempotentWrite)",
            "CorrelationIdError": "mixed up their answers",
            "IllegalSaslStateError": "do not accept how we log in",
            "IncompatibleBrokerVersion": "are of a version that this client does not speak",
            "KafkaConfigurationError": "were not reached: the client's settings are wrong",
            "KafkaConnectionError": "cannot be reached",
            "KafkaTimeoutError": "did not answer in time",
            "KafkaUnavailableError": "cannot be reached",
            "MetadataEmptyBrokerList": "name no brokers",
            "NoBrokersAvailable": "cannot be reached",
            "NodeNotReadyError": "cannot be reached",
            "NotControllerError": "are changing their controller",
            "OSError": "cannot be reached",
            "QuotaViolationError": "slow this service down by a quota",
            "SaslAuthenticationFailed": "do not accept who we are",
            "SecurityDisabled": "have no security configured",
            "StaleControllerEpochError": "are changing their controller",
            "StaleMetadata": "have changed; their addresses are being asked for",
            "TimeoutError": "did not answer in time",
            "TooManyInFlightRequests": "have not answered earlier requests",
            "UnrecognizedBrokerVersion": "are of a version that this client does not know",
            "UnsupportedSaslMechanismError": "do not accept how we log in",
            "UnsupportedVersionError": "are of a version that does not speak the client's",
        },
    ),
    (
        "producer",
        "retry",
        {
            "ConcurrentTransactions": "still end an earlier transaction",
            "DuplicateSequenceNumber": "have the record already",
            "IllegalOperation": "were not asked: the producer is in another state",
            "InvalidProducerEpoch": "know a newer producer of this name",
            "InvalidProducerIdMapping": "have forgotten this producer",
            "InvalidTransactionTimeout": "do not allow transactions as long as ours",
            "InvalidTxnState": "do not know of this transaction",
            "OperationNotAttempted": "did not try, since another part of the request failed",
            "OutOfOrderSequenceNumber": "miss a record before this one of the same producer",
            "ProducerClosed": "were not asked: the producer was closed",
            "ProducerFenced": "know a newer producer of this name",
            "TransactionCoordinatorFenced": "are changing the transaction's coordinator",
            "TransactionalIdAuthorizationFailed": "do not allow this producer's name (ACL on the transactional id)",
            "UnknownProducerId": "have forgotten this producer",
        },
    ),
    # Answers to questions that a producer never asks: groups, fetches, topics, tokens. If one comes all the same, the
    # partition that it came for is what is wrong as far as anybody can know.
    (
        "partition",
        "retry",
        _all(
            """
            BrokerResponseError CommitFailedError ConsumerStoppedError DelegationTokenAuthDisabled
            DelegationTokenAuthorizationFailed DelegationTokenExpired DelegationTokenNotFound
            DelegationTokenOwnerMismatch DelegationTokenRequestNotAllowed FetchSessionIdNotFound
            GroupAuthorizationFailedError GroupCoordinatorNotAvailableError GroupIdNotFound GroupLoadInProgressError
            IllegalArgumentError IllegalGenerationError IllegalStateError InconsistentGroupProtocolError
            InvalidCommitOffsetSizeError InvalidConfigurationError InvalidFetchRequestError InvalidFetchSessionEpoch
            InvalidGroupIdError InvalidPartitionsError InvalidPrincipalType InvalidReplicationAssignmentError
            InvalidReplicationFactorError InvalidRequestError InvalidRequiredAcksError InvalidSessionTimeoutError
            KafkaError KafkaProtocolError MemberIdRequired NoError NoOffsetForPartitionError NonEmptyGroup
            NotCoordinatorForGroupError OffsetMetadataTooLargeError OffsetOutOfRangeError RebalanceInProgressError
            TopicAlreadyExistsError UnknownMemberIdError UnsupportedCodecError
            """,
            _NOT_AN_ANSWER,
        ),
    ),
)
"""By the class's name, so that the table can name what only some versions of the client have."""


def meaning_of(error: BaseException) -> Meaning:
    """What an error means for the record that failed by it: that of its class, or of the nearest one above."""
    for kind in type(error).__mro__:
        if (found := MEANINGS.get(kind.__name__)) is not None:
            return found
    raise error  # not the brokers' doing: a bug of ours


def name_of(error: BaseException) -> str:
    """How the protocol calls an error: NOT_ENOUGH_REPLICAS; the class's name where the protocol has none."""
    message = getattr(error, "message", None)
    return message if isinstance(message, str) and message else type(error).__name__


def page() -> str:
    """The table as a page, for `docs/broker-errors.md`."""
    lines = [_HEAD]
    for scope, what in _SCOPES.items():
        lines += [
            f"## {scope.capitalize()}",
            "",
            what,
            "",
            "| error | | what the brokers did |",
            "|---|---|---|",
        ]
        for name, number, meaning in _rows(scope):
            lines.append(f"| `{name}`{number} | {_ACTIONS[meaning.action]} | {meaning.text} |")
        if scope == "partition":
            lines += ["", _OTHERS + ", ".join(f"`{name}`" for name in _never()) + "."]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(scope: Scope) -> Iterable[tuple[str, str, Meaning]]:
    numbers = {kind.__name__: getattr(kind, "errno", None) for kind in error_kinds()}
    for name, meaning in sorted(MEANINGS.items()):
        if meaning.scope == scope and meaning.text != _NOT_AN_ANSWER:
            number = numbers.get(name)
            yield name, f" ({number})" if isinstance(number, int) else "", meaning


def _never() -> list[str]:
    return sorted(name for name, meaning in MEANINGS.items() if meaning.text == _NOT_AN_ANSWER)


_ACTIONS: Final[Mapping[Action, str]] = {
    "refuse": "refused",
    "confirm": "refused if it stays so for 2 s",
    "retry": "sent again",
}
_OTHERS: Final = (
    "Errors of groups, fetches, topics and tokens answer no record sent. Should one come all the same, it counts as the "
    "partition's: "
)
_SCOPES: Final[Mapping[Scope, str]] = {
    "record": "The record is refused, and the next one may be taken. If it shared a batch, each record of the batch is first sent "
    "alone, since the brokers refuse a batch for the sake of one record.",
    "partition": "The partition is set apart on a connection of its own and tried again. After `EMBEDQ_REPLY_TIMEOUT_S` its jobs are "
    "dead-lettered, as long as the brokers take records for other partitions.",
    "topic": "All partitions of the topic are meant. Jobs that name it are dead-lettered; for embedq's own topics the service waits, and "
    "is not ready.",
    "cluster": "Nothing is wrong with what is sent. Where other records get through, it counts as the partition's; where none does, Kafka "
    "is away: the service waits, and is not ready.",
    "producer": "Nothing is wrong with what is sent, nor with where to: it is sent again through another producer.",
}
_HEAD: Final = """\
# What each of Kafka's errors means

Written from [`broker_errors.py`](../consumer/embedq_consumer/delivery/broker_errors.py) by `make docs`; numbers are the protocol's.
A result that cannot be delivered becomes an error on `embed.results`, where that works, and its job goes to `embed.dlq`; the
offset is committed after that. `embedq-error-message` there names the error as it stands here.
"""
