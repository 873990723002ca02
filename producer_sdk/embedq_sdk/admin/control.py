"""The control plane from the operator's side: reload a model and watch it, see who is there and how far behind."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Final, get_args

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
)

from embedq_sdk.admin.rollout import ReplicaView, RolloutUpdate, RolloutView, StatusBoard, view_of
from embedq_sdk.errors import EmbedError, InvalidArgument
from embedq_sdk.job_options import checked_timeout
from embedq_sdk.transport.kafka import KafkaConnection, reason, require_topics
from embedq_shared.codec import decode_control, decode_status, encode_record
from embedq_shared.messages import Control, Policy, Status
from embedq_shared.topics import GROUP, Topics

_UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_PAUSE_S: Final = 0.1
_STEP_S: Final = 10.0
_POLL_MS: Final = 250
_SILENCE_S: Final = 15.0


class LostRace(EmbedError):
    """Another command for {alias} was written at the same moment: look at `embedq status`, then reload again"""

    alias: str


class LaneLag(msgspec.Struct, frozen=True):
    """How far the service is behind in one lane: jobs without a committed result."""

    topic: str
    jobs: int


class ServiceStatus(msgspec.Struct, frozen=True):
    """Who is there, and what waits."""

    replicas: list[ReplicaView]
    lag: list[LaneLag]


async def reload_model(
    servers: str | list[str],
    path: str,
    *,
    alias: str = "default",
    digest: str | None = None,
    policy: Policy = "availability_preserving",
    min_cosine: float | None = None,
    timeout: float = 600.0,
    topic_prefix: str = "embed",
    connect_timeout: float = 10.0,
    **security: Any,
) -> AsyncGenerator[RolloutUpdate, None]:
    """Write a reload command, then yield how the replicas follow it, whenever something changed; the last update is done.

    Args:
        path: a model directory below the service's configured root.
        digest: the model version that must come out ("sha256:…"); another one is FAILED.
        policy: load beside the old model, or after unloading it.
        min_cosine: least cosine of the check texts' vectors to the old model's.
        timeout: seconds until the last update says "timeout".

    Raises:
        InvalidArgument, KafkaUnavailable, TopicMissing: nothing was written, or nobody knows.
        LostRace: another writer was faster; replicas follow that one.
    """
    command = _checked_command(path, alias, digest, policy, min_cosine)
    timeout = checked_timeout("timeout", timeout)
    where = KafkaConnection.of(servers, security)
    topics = Topics(topic_prefix)
    control, status = TopicPartition(topics.control, 0), TopicPartition(topics.status, 0)
    async with where.opened(lambda: where.consumer(fetch_max_wait_ms=_POLL_MS), connect_timeout) as consumer:
        await require_topics(where, consumer, [topics.control, topics.status], connect_timeout)
        consumer.assign([control, status])
        board = StatusBoard()
        commands = await _read_to_end(where, consumer, {control, status}, board, alias)
        now = time.time()
        command = _next_command(command, commands, board.live(now, alias))
        offset = await _write(where, topics.control, command, connect_timeout)
        await _check_race(where, consumer, board, command, offset)
        rollout = RolloutView(
            board,
            alias=alias,
            version=command.version,
            command_id=command.command_id,
            started=time.time(),
            timeout=timeout,
        )
        shown: object = None
        while True:
            update = rollout.at(time.time())
            news = (update.progress, [msgspec.structs.replace(r, age_s=0.0) for r in update.replicas])
            if news != shown:
                shown = news
                yield update
            if update.done:
                return
            await _poll(where, consumer, board, alias)


async def service_status(
    servers: str | list[str], *, topic_prefix: str = "embed", connect_timeout: float = 10.0, **security: Any
) -> ServiceStatus:
    """Live replicas and each lane's lag, now.

    Raises:
        KafkaUnavailable, TopicMissing.
    """
    where = KafkaConnection.of(servers, security)
    topics = Topics(topic_prefix)
    status = TopicPartition(topics.status, 0)
    async with (
        where.opened(lambda: where.consumer(fetch_max_wait_ms=_POLL_MS), connect_timeout) as consumer,
        where.opened(where.admin, connect_timeout) as admin,
    ):
        await require_topics(where, consumer, [*topics.lanes, topics.status], connect_timeout)
        consumer.assign([status])
        board = StatusBoard()
        await _read_to_end(where, consumer, {status}, board, alias=None)
        now = time.time()
        lag = await where.within(connect_timeout, "reading the lag", _lag(admin, consumer, topics))
        return ServiceStatus([view_of(s, now) for s in board.live(now)], lag)


def _checked_command(
    path: str, alias: str, digest: str | None, policy: Policy, min_cosine: float | None
) -> Control:
    """The command without its version, checked at the door."""
    for name, value in (("path", path), ("alias", alias)):
        if not isinstance(value, str) or not 1 <= len(value) <= (256 if name == "alias" else 4096):
            raise InvalidArgument(argument=name, expected="a non-empty string", got=type(value).__name__)
    if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise InvalidArgument(
            argument="digest", expected="sha256: and 64 lower-case hex digits", got="something else"
        )
    if policy not in get_args(Policy):
        raise InvalidArgument(
            argument="policy", expected=f"one of {', '.join(get_args(Policy))}", got=repr(policy)
        )
    if min_cosine is not None and not (
        isinstance(min_cosine, (int, float)) and not isinstance(min_cosine, bool) and -1 <= min_cosine <= 1
    ):
        raise InvalidArgument(argument="min_cosine", expected="a number from -1 to 1", got=repr(min_cosine))
    return Control(
        alias=alias,
        version=1,
        path=path,
        command_id=uuid.uuid4().hex,
        digest=digest,
        policy=policy,
        min_cosine=None if min_cosine is None else float(min_cosine),
    )


def _next_command(command: Control, earlier: list[Control], live: list[Status]) -> Control:
    """The command with its version, and with the directory to fall back to: one that is known to load.

    That is the current record's path if a live replica serves it, else what that record itself would fall back to.
    """
    if not earlier:
        return command
    current = max(earlier, key=lambda record: record.version)
    served = any(s.version == current.version and s.state == "READY" for s in live)
    return msgspec.structs.replace(
        command, version=current.version + 1, fallback=current.path if served else current.fallback
    )


async def _read_to_end(
    where: KafkaConnection,
    consumer: AIOKafkaConsumer,
    partitions: set[TopicPartition],
    board: StatusBoard,
    alias: str | None,
) -> list[Control]:
    """Read partitions from their beginning to their present end; returns the commands for `alias`."""
    await where.within(_STEP_S, "going to the beginning", consumer.seek_to_beginning(*partitions))
    ends = await where.within(_STEP_S, "finding the end", consumer.end_offsets(list(partitions)))
    commands: list[Control] = []
    deadline = time.monotonic() + 3 * _STEP_S
    # The position counts, not the last record's offset: compaction may have removed the last records.
    while any([await consumer.position(tp) < ends[tp] for tp in partitions]):
        if time.monotonic() > deadline:
            raise where.unavailable("reading the control and status topics took too long")
        commands += await _poll(where, consumer, board, alias)
    return commands


async def _poll(
    where: KafkaConnection, consumer: AIOKafkaConsumer, board: StatusBoard, alias: str | None
) -> list[Control]:
    """One poll: statuses go to the board, commands for `alias` are returned. What can't be read is not ours to judge."""
    try:
        fetched = await consumer.getmany(timeout_ms=_POLL_MS)
    except (KafkaError, OSError) as error:
        raise where.unavailable(reason(error)) from error
    now = time.time()
    for tp in consumer.assignment():
        last = consumer.last_poll_timestamp(tp)
        if last is not None and now - last / 1000 > _SILENCE_S:
            raise where.unavailable(f"nothing came for {_SILENCE_S:g} s")
    commands: list[Control] = []
    for tp, records in fetched.items():
        for record in records:
            is_status = tp.topic.endswith(".status")
            if record.value is None:
                if is_status and record.key is not None:
                    board.forget(record.key.decode(errors="replace"))
                continue
            try:
                if is_status:
                    board.see(decode_status(record.value))
                else:
                    command = decode_control(record.value)
                    if command.alias == alias:
                        commands.append(command)
            except _UNDECODABLE:
                continue
    return commands


async def _write(where: KafkaConnection, topic: str, command: Control, timeout: float) -> int:
    """Publish the command; returns its offset."""
    async with where.opened(where.producer, timeout) as producer:
        sent = await where.within(
            timeout,
            "writing the command",
            producer.send_and_wait(topic, encode_record(command), key=command.alias.encode(), partition=0),
        )
        return int(sent.offset)


async def _check_race(
    where: KafkaConnection, consumer: AIOKafkaConsumer, board: StatusBoard, command: Control, offset: int
) -> None:
    """Replicas follow the first command of a version: read up to ours and see whether it is the first."""
    control = next(tp for tp in consumer.assignment() if tp.topic.endswith(".control"))
    deadline = time.monotonic() + _STEP_S
    while await consumer.position(control) <= offset:
        if time.monotonic() > deadline:
            raise where.unavailable("reading the command back took too long")
        for found in await _poll(where, consumer, board, command.alias):
            if found.command_id == command.command_id:
                return
            if found.version >= command.version:
                raise LostRace(alias=command.alias)


async def _committed(admin: AIOKafkaAdminClient) -> dict[TopicPartition, int]:
    """The service's committed offsets. A fresh broker needs a moment to become the group's coordinator."""
    while True:
        try:
            found = await admin.list_consumer_group_offsets(GROUP)
        except (GroupCoordinatorNotAvailableError, GroupLoadInProgressError, NotCoordinatorForGroupError):
            await asyncio.sleep(_PAUSE_S)
        else:
            return {tp: offset.offset for tp, offset in found.items()}


async def _lag(admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer, topics: Topics) -> list[LaneLag]:
    """Committed against end offsets, per lane; where nothing was committed yet, all that is there counts."""
    committed = {tp: found.offset for tp, found in (await admin.list_consumer_group_offsets(GROUP)).items()}
    described = await admin.describe_topics(list(topics.lanes))
    lanes = {
        topic["topic"]: [TopicPartition(topic["topic"], p["partition"]) for p in topic["partitions"]]
        for topic in described
    }
    everything = [tp for partitions in lanes.values() for tp in partitions]
    ends = await consumer.end_offsets(everything)
    begins = await consumer.beginning_offsets(everything)
    lags: list[LaneLag] = []
    for lane in topics.lanes:
        behind = 0
        for tp in lanes.get(lane, []):
            done = committed.get(tp, -1)
            behind += max(0, ends[tp] - max(done, begins[tp]))
        lags.append(LaneLag(lane, behind))
    return lags
