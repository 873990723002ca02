"""Creating embedq's topics, and saying how existing ones differ from what embedq wants."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from embedq_sdk.admin.commands import checked_pool
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.job_options import checked_count, checked_timeout
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_shared.kafka import AIOKafkaAdminClient, KafkaError, is_permanent
from embedq_shared.topics import (
    DEFAULT_PARTITIONS,
    DEFAULT_REPLY_PARTITIONS,
    DEFAULT_RETRY_TIERS,
    MAX_RETRY_TIERS,
    Topics,
    is_topic_name,
)

_MINUTE: Final = 60_000
_DAY: Final = 24 * 60 * _MINUTE
_PAUSE_S: Final = 0.1

_MOST_COPIES: Final = 3
"""Copies of each topic if the cluster has as many brokers: one broker can fail while another is being restarted."""


class TopicSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One topic as embedq wants it."""

    name: str
    partitions: int
    config: Mapping[str, str]


class TopicReport(msgspec.Struct, kw_only=True):
    """One topic after `create_topics`. `differences` has a sentence for each thing that is not as embedq wants it."""

    name: str
    partitions: int
    created: bool
    differences: list[str] = []


def wanted_topics(
    prefix: str,
    *,
    partitions: int,
    reply_partitions: int,
    retry_tiers: int = DEFAULT_RETRY_TIERS,
    pool: str | None = None,
) -> list[TopicSpec]:
    """Every topic of the wire contract, with its configuration; of another pool than the default one those that are its own."""
    topics = Topics(prefix, pool)
    # Kafka deletes by a record's timestamp, read or not. A producer may give one of last year (a connector's, or a clock
    # that is wrong), and such a record would be gone within minutes: so the broker's own clock counts.
    by_age = {"cleanup.policy": "delete", "message.timestamp.type": "LogAppendTime"}
    # Many clients share the reply topic and old replies are never read: small segments let Kafka delete them soon.
    short = by_age | {
        "retention.ms": str(15 * _MINUTE),
        "segment.ms": str(5 * _MINUTE),
        "segment.bytes": str(128 << 20),
    }
    week = by_age | {"retention.ms": str(7 * _DAY)}
    # Only closed segments are compacted, so these are closed often.
    compacted = {
        "cleanup.policy": "compact",
        "segment.ms": str(10 * _MINUTE),
        "min.cleanable.dirty.ratio": "0.1",
        "delete.retention.ms": str(_DAY),
    }
    # A dead letter keeps its record's timestamp: retention by time would delete old ones at once.
    forever = {"cleanup.policy": "delete", "retention.ms": "-1"}
    shared = (
        (topics.results, partitions, week),
        (topics.replies, reply_partitions, short),
        (topics.control, 1, compacted),
        (topics.status, 1, compacted),
        (topics.dead_letters, partitions, forever),
    )
    return [
        TopicSpec(name=name, partitions=count, config=config)
        for name, count, config in (
            (topics.jobs, partitions, week),
            (topics.bulk, partitions, week),
            *(shared if pool is None else ()),
            *((topics.retry(tier), partitions, week) for tier in range(1, retry_tiers + 1)),
        )
    ]


async def create_topics(
    servers: str | list[str],
    *,
    prefix: str = "embed",
    partitions: int = DEFAULT_PARTITIONS,
    reply_partitions: int = DEFAULT_REPLY_PARTITIONS,
    replication: int | None = None,
    retry_tiers: int = DEFAULT_RETRY_TIERS,
    pool: str | None = None,
    timeout: float = 30.0,
    connect_timeout: float = 10.0,
    **security: Any,
) -> list[TopicReport]:
    """Create the topics that are missing, and report on all. Existing topics are never changed, so run it at any time.

    Args:
        partitions: of the job, retry, result and dead letter topics; no more replicas than this can share a lane.
        reply_partitions: of the reply topic; client instances spread over them.
        replication: copies of each topic. Default: 3, or one on each broker if there are fewer.
        retry_tiers: retry topics, 0 to 8: as many as the service's setting `EMBEDQ_RETRY_DELAYS_S` has delays.
        pool: the topics that this pool has for itself; those that pools share are the default pool's. Default: the default pool's.
        timeout: seconds for creating and describing.
        security: as for `EmbedClient`.

    Raises:
        InvalidArgument, KafkaUnavailable: none or only some of the topics were created.
    """
    if not isinstance(prefix, str) or not is_topic_name(f"{prefix}.jobs.bulk"):
        raise InvalidArgument(argument="prefix", expected="a prefix of topic names", got=repr(prefix))
    specs = wanted_topics(
        prefix,
        partitions=checked_count("partitions", partitions),
        reply_partitions=checked_count("reply_partitions", reply_partitions),
        retry_tiers=_checked_tiers(retry_tiers),
        pool=checked_pool(pool),
    )
    if replication is not None:
        checked_count("replication", replication)
    timeout = checked_timeout("timeout", timeout)
    connection = KafkaConnection.of(servers, security)
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    async with connection.client(
        connection.admin, checked_timeout("connect_timeout", connect_timeout)
    ) as admin:
        try:
            async with asyncio.timeout_at(end):
                existing = set(await admin.list_topics())
                copies = replication or min(_MOST_COPIES, len((await admin.describe_cluster())["brokers"]))
                missing = [spec for spec in specs if spec.name not in existing]
                while missing:
                    missing = await _create(admin, missing, copies)
                    if missing:
                        await asyncio.sleep(_PAUSE_S)
                return await _describe(admin, specs, existing)
        except TimeoutError:
            raise connection.unavailable(f"creating the topics took more than {timeout:g} s") from None
        except (KafkaError, OSError) as error:
            raise connection.failed(error, "creating the topics") from error


def _checked_tiers(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_RETRY_TIERS:
        raise InvalidArgument(
            argument="retry_tiers", expected=f"a number from 0 to {MAX_RETRY_TIERS}", got=repr(count)
        )
    return count


async def _create(admin: AIOKafkaAdminClient, specs: list[TopicSpec], copies: int) -> list[TopicSpec]:
    """Create topics; returns those to ask for again, since the brokers were not ready."""
    new = [NewTopic(spec.name, spec.partitions, copies, topic_configs=dict(spec.config)) for spec in specs]
    try:
        answer = await admin.create_topics(new)
    except AttributeError:
        return specs  # aiokafka's metadata has no controller yet
    again: list[TopicSpec] = []
    by_name = {spec.name: spec for spec in specs}
    for name, code, *rest in answer.topic_errors:
        error = for_code(code)
        if code == 0 or error is TopicAlreadyExistsError:
            continue
        if getattr(error, "retriable", False):
            again.append(by_name[name])
            continue
        detail = rest[0] if rest and rest[0] else error.__name__
        if error.__name__ in {"InvalidReplicationFactorError", "InvalidPartitionsError"}:
            argument = "replication" if "Replication" in error.__name__ else "partitions"
            raise InvalidArgument(argument=argument, expected="what the cluster can hold", got=str(detail))
        if is_permanent(error(name)):
            raise error(name)
        raise KafkaError(f"{name}: {detail}")
    return again


async def _describe(
    admin: AIOKafkaAdminClient, specs: list[TopicSpec], existing: set[str]
) -> list[TopicReport]:
    """What the brokers now say of each topic."""
    names = [spec.name for spec in specs]
    counts: dict[str, int] = {}
    while len(counts) < len(names):  # a new topic takes a moment to be known everywhere
        described = await admin.describe_topics(names)
        counts = {
            t["topic"]: len(t["partitions"]) for t in described if t["error_code"] == 0 and t["partitions"]
        }
        if len(counts) < len(names):
            await asyncio.sleep(_PAUSE_S)
    configs = await _configs(admin, names)
    reports: list[TopicReport] = []
    for spec in specs:
        report = TopicReport(name=spec.name, partitions=counts[spec.name], created=spec.name not in existing)
        if report.partitions != spec.partitions:
            report.differences.append(f"has {report.partitions} partitions, not {spec.partitions}")
        for key, value in spec.config.items():
            found = configs.get(spec.name, {}).get(key)
            if found != value:
                report.differences.append(f"{key} is {found}, not {value}")
        reports.append(report)
    return reports


async def _configs(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    """Each topic's configuration."""
    found: dict[str, dict[str, str]] = {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    for response in await admin.describe_configs(resources):
        for _code, _message, _kind, name, entries in response.resources:
            found[name] = {entry[0]: entry[1] for entry in entries}
    return found
