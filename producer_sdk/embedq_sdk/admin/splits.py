"""Aliases that are shares of others: an A/B test of models, which begins, changes and ends by a message."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from embedq_sdk.admin.commands import check_alias
from embedq_sdk.admin.control import ControlPlaneReader, LostRace, control_consumer, write_record
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.transport.kafka import KafkaConnection, require_topics
from embedq_shared.fleet import StatusBoard
from embedq_shared.messages import MAX_SHARES, MAX_WEIGHT, Split
from embedq_shared.topics import Topics


async def split_alias(
    servers: str | list[str],
    alias: str,
    weights: Mapping[str, int],
    *,
    topic_prefix: str = "embed",
    connect_timeout: float = 10.0,
    **security: Any,
) -> Split:
    """Share the jobs of `alias` out among other aliases, by weight and by the jobs' ids; without weights, share them no more.

    A job's id alone says whose it is, so a job that is sent again is the same one's; where weights change, as few ids move as can.

    Args:
        alias: a name that no replica serves by itself.
        weights: of each alias that gets a share, such as `{"old": 90, "new": 10}`.
        security: as for `EmbedClient`.

    Raises:
        InvalidArgument, TopicMissing: nothing was written.
        KafkaUnavailable: the split may have been written, or not.
        LostRace: another writer was faster; that one's split is in force.
    """
    check_alias(alias)
    shares = _checked_weights(alias, weights)
    connection, topics = KafkaConnection.of(servers, security), Topics(topic_prefix)
    async with _reader(connection, topics, connect_timeout) as reader:
        _check_served(alias, shares, reader.board, reader.heard(time.time()))
        before = reader.splits.newest(alias)
        version = 1 if before is None else before.version + 1
        split = Split(alias=alias, version=version, command_id=uuid.uuid4().hex, split=shares)
        await reader.read_back(await write_record(connection, topics.control, split, connect_timeout))
        first = reader.splits.newest(alias)
        if first is not None and first.command_id != split.command_id:
            # Compaction keeps the last record of a key, so that must be the one in force.
            await write_record(connection, topics.control, first, connect_timeout)
            raise LostRace(alias=alias)
        return split


async def splits_in_force(
    servers: str | list[str], *, topic_prefix: str = "embed", connect_timeout: float = 10.0, **security: Any
) -> dict[str, dict[str, int]]:
    """The weights of every split, by its alias.

    Args:
        security: as for `EmbedClient`.

    Raises:
        InvalidArgument, KafkaUnavailable, TopicMissing.
    """
    connection = KafkaConnection.of(servers, security)
    async with _reader(connection, Topics(topic_prefix), connect_timeout) as reader:
        return reader.splits.weights()


@asynccontextmanager
async def _reader(
    connection: KafkaConnection, topics: Topics, connect_timeout: float
) -> AsyncIterator[ControlPlaneReader]:
    """A reader of both topics, at their ends."""
    names = [topics.control, topics.status]
    async with connection.client(control_consumer(connection), connect_timeout) as consumer:
        await require_topics(connection, consumer, names, connect_timeout)
        reader = ControlPlaneReader(connection, consumer, topics)
        await reader.read_to_end(names)
        yield reader


def _checked_weights(alias: str, weights: Mapping[str, int]) -> dict[str, int]:
    expected = (
        f"at most {MAX_SHARES} other aliases, each with a whole number from 1 to {MAX_WEIGHT:,}, such as "
        "{'old': 90, 'new': 10}"
    )
    if not isinstance(weights, Mapping):
        raise InvalidArgument(argument="weights", expected=expected, got=type(weights).__name__)
    for one, weight in weights.items():
        check_alias(one)
        if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
            raise InvalidArgument(argument="weights", expected=expected, got=f"{weight!r:.40}")
    if alias in weights or len(weights) > MAX_SHARES:
        got = "the alias itself" if alias in weights else f"{len(weights)}"
        raise InvalidArgument(argument="weights", expected=expected, got=got)
    return dict(weights)


def _check_served(alias: str, shares: Mapping[str, int], board: StatusBoard, now: float) -> None:
    """Refuse a split that would do nothing, or whose jobs nobody would run, as far as live replicas say."""
    served = {status.alias for status in board.live(now)}
    if not served or not shares:
        return
    if alias in served:
        raise InvalidArgument(argument="alias", expected="a name that no replica serves by itself", got=alias)
    if missing := sorted(shares.keys() - served):
        expected = f"aliases that live replicas serve ({', '.join(sorted(served))})"
        raise InvalidArgument(argument="weights", expected=expected, got=", ".join(missing))
