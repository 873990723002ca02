"""The operator's side of the control plane: reload a model and watch it, see the live replicas and the lag."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Final, NamedTuple

import msgspec

from embedq_sdk.admin.commands import (
    DEFAULT_WAVE,
    check_alias,
    checked_command,
    checked_pool,
    checked_soak,
    checked_version,
    checked_wave,
    command_back,
    home_of,
    next_command,
    refuse_unexpected,
    rollout_of,
)
from embedq_sdk.admin.rollout import ReplicaView, RolloutUpdate, RolloutView, view_of
from embedq_sdk.errors import EmbedError, InvalidArgument, TopicMissing
from embedq_sdk.job_options import checked_timeout
from embedq_sdk.transport.kafka import KafkaConnection, require_topics
from embedq_sdk.transport.silence import Silence
from embedq_shared.codec import encode_record, read_command, read_status
from embedq_shared.fleet import Splits, StatusBoard
from embedq_shared.kafka import (
    AIOKafkaConsumer,
    KafkaError,
    Polled,
    TopicPartition,
    UnreadableRecord,
    group_lag,
    poll,
)
from embedq_shared.messages import Control, Policy, Quantization, Split, Status
from embedq_shared.topics import GROUP, Topics

_UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_STEP_S: Final = 10.0
"""One step of a command, such as finding the end of a topic."""
_READ_S: Final = 3 * _STEP_S
"""Both topics, whole; they are compacted and small."""
_POLL_MS: Final = 250
_TURN_S: Final = 4 * _POLL_MS / 1000
"""A poll takes no longer in an event loop that runs."""
_SILENCE_S: Final = 15.0
"""A broker answers a fetch every quarter of a second: if it has not for this long, it is gone."""


class LostRace(EmbedError):
    """Another command for {alias} was written at the same time and takes precedence: see `embedq status`, then reload again"""

    alias: str


class LaneLag(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs of one lane, or of one retry topic, that the service has not committed: they wait, or are in flight."""

    topic: str
    jobs: int


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The live replicas, the lag of each lane, and that of each retry topic that the brokers have, pool by pool."""

    replicas: list[ReplicaView]
    lag: list[LaneLag]
    retries: list[LaneLag] = []


async def reload_model(
    servers: str | list[str],
    path: str,
    *,
    alias: str = "default",
    digest: str | None = None,
    policy: Policy | None = None,
    quantization: Quantization | None = None,
    min_cosine: float | None = None,
    golden: str | None = None,
    golden_min_cosine: float | None = None,
    min_dimensions: int | None = None,
    pool: str | None = None,
    expected_version: int | None = None,
    max_unavailable: int | str | None = DEFAULT_WAVE,
    canary: bool = True,
    soak: float = 0.0,
    timeout: float = 600.0,
    topic_prefix: str = "embed",
    connect_timeout: float = 10.0,
    **security: Any,
) -> AsyncGenerator[RolloutUpdate, None]:
    """Write a reload command, then yield how the replicas follow it, each time something changed; the last update is done.

    The replicas follow it by themselves, whether or not anybody watches: one replica first, then as many at once as
    `max_unavailable` says. If one fails in its turn, all of them go back to the model of before.

    Args:
        path: a model directory below the service's configured root.
        digest: the model version that must result ("sha256:…"); another one is FAILED.
        policy: load alongside the old model, or after unloading it; None: each replica chooses by its free memory.
        quantization: of this model; None: as each replica's settings say.
        min_cosine: least cosine similarity of the check texts' vectors to the old model's; `SAME_SPACE_COSINE` if nothing but
            precision may differ.
        golden: a file of texts and expected vectors, below the model root. Default: the one in the model's directory, if it is there.
        golden_min_cosine: least cosine similarity to those. Default: `SAME_SPACE_COSINE`.
        min_dimensions: the least hidden size. Default: what jobs lately asked for.
        pool: where the alias shall live, "default" for the pool without a name: from now on its jobs go to that pool's lanes, and that
            pool's replicas follow. Those of another one, which served it until now, serve on, for the jobs that they have. Default: where it
            lives now.
        expected_version: the command that must be in force, 0 for none; if another one is, nothing is written.
        max_unavailable: replicas that change at once, or which part of the live ones ("25%", at least one); None: all.
        canary: one replica changes alone first. Without it, and with None for `max_unavailable`, each replica follows for itself:
            one that fails keeps its old model, and the others go on with the new one.
        soak: seconds that the canary must serve the new model before others follow. If a text gets no vector by the model's fault
            meanwhile, or the canary dies, it goes back.
        timeout: seconds, beside the soak time, until the last update says "timeout".
        security: as for `EmbedClient`.

    Raises:
        InvalidArgument, TopicMissing, UnexpectedVersion: no command was written. A pool must have its topics.
        KafkaUnavailable: a command may have been written, or not.
        LostRace: another writer was faster; replicas follow that one.
    """
    command = checked_command(
        path,
        alias,
        digest=digest,
        policy=policy,
        quantization=quantization,
        min_cosine=min_cosine,
        golden=golden,
        golden_min_cosine=golden_min_cosine,
        min_dimensions=min_dimensions,
    )
    expected = checked_version(expected_version)
    wave = checked_wave(max_unavailable)
    soak_s = checked_soak(soak, canary)
    checked_pool(pool)

    def decide(earlier: list[Control], live: list[Status]) -> Control:
        refuse_unexpected(alias, expected, earlier)
        home = home_of(alias, pool, earlier, live)
        followers = sum(status.pool == home for status in live)
        return next_command(
            msgspec.structs.replace(command, pool=home, rollout=rollout_of(wave, canary, followers, soak_s)),
            earlier,
            live,
        )

    place = _Place(KafkaConnection.of(servers, security), Topics(topic_prefix), alias, connect_timeout)
    updates = _carry_out(place, decide, checked_timeout("timeout", timeout) + (soak_s or 0.0))
    async with aclosing(updates):
        async for update in updates:
            yield update


async def rollback_model(
    servers: str | list[str],
    *,
    alias: str = "default",
    max_unavailable: int | str | None = DEFAULT_WAVE,
    timeout: float = 600.0,
    topic_prefix: str = "embed",
    connect_timeout: float = 10.0,
    **security: Any,
) -> AsyncGenerator[RolloutUpdate, None]:
    """Bring back what the alias served before its present command, and yield how the replicas follow, as `reload_model` does.

    Args:
        max_unavailable, timeout, security: as for `reload_model`.

    Raises:
        NothingBefore: no command was written, since nothing is known to go back to.
        InvalidArgument, TopicMissing, KafkaUnavailable, LostRace: as for `reload_model`.
    """
    check_alias(alias)
    wave = checked_wave(max_unavailable)

    def decide(earlier: list[Control], live: list[Status]) -> Control:
        command = command_back(alias, earlier, live)
        followers = sum(status.pool == command.pool for status in live)
        return msgspec.structs.replace(command, rollout=rollout_of(wave, False, followers))

    place = _Place(KafkaConnection.of(servers, security), Topics(topic_prefix), alias, connect_timeout)
    updates = _carry_out(place, decide, checked_timeout("timeout", timeout))
    async with aclosing(updates):
        async for update in updates:
            yield update


class _Place(NamedTuple):
    """Where a command goes."""

    connection: KafkaConnection
    topics: Topics
    alias: str
    connect_timeout: float


async def _carry_out(
    place: _Place, decide: Callable[[list[Control], list[Status]], Control], timeout: float
) -> AsyncGenerator[RolloutUpdate, None]:
    """Write the command that `decide` makes of the alias's earlier ones and its live replicas, and watch it."""
    connection, topics, alias, connect_timeout = place
    async with connection.client(control_consumer(connection), connect_timeout) as consumer:
        names = [topics.control, topics.status]
        known = await require_topics(connection, consumer, names, connect_timeout)
        reader = ControlPlaneReader(connection, consumer, topics, alias)
        commands = await reader.read_to_end([topics.control, topics.status])
        earlier = [found.command for found in commands]
        command = decide(earlier, reader.board.live(reader.heard(time.time()), alias))
        _require_lanes(connection, topics.of(command.pool), known)

        async def write(command: Control) -> int:
            return await write_record(connection, topics.control, command, connect_timeout)

        await _take_part(reader, command, write)
        rollout = RolloutView(reader.board, command, started=time.time(), timeout=timeout)
        shown: object = None
        while True:
            now = time.time()
            update = rollout.at(now, reader.heard(now))
            news = msgspec.structs.replace(
                update, replicas=tuple(_without_what_drifts(replica) for replica in update.replicas)
            )
            if news != shown:
                shown = news
                yield update
            if update.done:
                return
            if (rollback := rollout.overdue_rollback(time.time())) is not None:
                await _take_part(reader, rollback, write)
                rollout.take(rollback)
            for found in await reader.poll():
                rollout.take(found.command)


def _require_lanes(connection: KafkaConnection, topics: Topics, known: set[str]) -> None:
    """Check that jobs can go where a command sends those of its alias.

    Raises:
        TopicMissing: its pool has no such topic.
    """
    if topics.pool is None:
        return
    for lane in topics.lanes:
        if lane not in known:
            raise TopicMissing(servers=connection.servers, topic=lane)


def _without_what_drifts(replica: ReplicaView) -> ReplicaView:
    """A replica without what changes while nothing happens."""
    return msgspec.structs.replace(replica, age_s=0.0, memory_used=None)


async def service_status(
    servers: str | list[str],
    *,
    topic_prefix: str = "embed",
    pool: str | None = None,
    group: str = GROUP,
    connect_timeout: float = 10.0,
    **security: Any,
) -> ServiceStatus:
    """The live replicas, and the lag of each lane and each retry topic, now.

    Args:
        pool: of this pool alone, "default" for the one without a name. Default: of all whose topics are there.
        group: the service's consumer group (its setting EMBEDQ_GROUP), whose lag it is; that of a pool has the pool's name behind it.
        security: as for `EmbedClient`.

    Raises:
        InvalidArgument, KafkaUnavailable, TopicMissing.
    """
    if not isinstance(group, str) or not group:
        raise InvalidArgument(argument="group", expected="a non-empty string", got=repr(group))
    connection = KafkaConnection.of(servers, security)
    topics = Topics(topic_prefix, checked_pool(pool))
    async with (
        connection.client(control_consumer(connection), connect_timeout) as consumer,
        connection.client(connection.admin, connect_timeout) as admin,
    ):
        known = await require_topics(connection, consumer, [*topics.lanes, topics.status], connect_timeout)
        several = [] if pool is not None else topics.pools_among(known)
        pools = [topics, *(topics.of(each) for each in several)]
        reader = ControlPlaneReader(connection, consumer, topics)
        await reader.read_to_end([topics.status])
        now = time.time()
        lag: dict[str, int] = {}
        for each in pools:
            names = [*each.lanes, *each.retries_among(known)]
            lag |= await connection.call(
                connect_timeout,
                "reading the lag",
                group_lag(admin, consumer, each.group(group), names),
            )
        live = reader.board.live(reader.heard(now))
        return ServiceStatus(
            replicas=[view_of(status, now) for status in live if pool is None or status.pool == topics.pool],
            lag=[LaneLag(topic=topic, jobs=lag[topic]) for each in pools for topic in each.lanes],
            retries=[
                LaneLag(topic=topic, jobs=lag[topic]) for each in pools for topic in each.retries_among(known)
            ],
        )


async def live_replicas(
    servers: str | list[str], *, topic_prefix: str = "embed", connect_timeout: float = 10.0, **security: Any
) -> list[ReplicaView]:
    """The live replicas and what each serves, now, sorted by name.

    Args:
        security: as for `EmbedClient`.

    Raises:
        InvalidArgument, KafkaUnavailable, TopicMissing.
    """
    connection = KafkaConnection.of(servers, security)
    topics = Topics(topic_prefix)
    async with connection.client(control_consumer(connection), connect_timeout) as consumer:
        await require_topics(connection, consumer, [topics.status], connect_timeout)
        reader = ControlPlaneReader(connection, consumer, topics)
        await reader.read_to_end([topics.status])
        now = time.time()
        return [view_of(status, now) for status in reader.board.live(reader.heard(now))]


def control_consumer(connection: KafkaConnection) -> Callable[[], AIOKafkaConsumer]:
    """Makes a consumer for `ControlPlaneReader`."""
    return lambda: connection.consumer(fetch_max_wait_ms=_POLL_MS)


class FoundCommand(msgspec.Struct, frozen=True):
    """A command, and where it is on the control topic."""

    offset: int
    command: Control


class ControlPlaneReader:
    """Reads the control and status topics: statuses go to `board`, splits to `splits`, and commands for `alias` are returned, in
    their order.

    What cannot be read or decoded is passed: it is neither a status nor a command, and other programs may write here too.
    `control_consumer` makes its consumer. With a `board` that another reader has filled, that one is gone on with.

    Invariant: neither Kafka nor a replica is charged for a time in which our event loop did not run, or our caller was busy.
    """

    def __init__(
        self,
        connection: KafkaConnection,
        consumer: AIOKafkaConsumer,
        topics: Topics,
        alias: str | None = None,
        board: StatusBoard | None = None,
    ) -> None:
        self._connection = connection
        self._consumer = consumer
        self._control = TopicPartition(topics.control, 0)
        self._status = TopicPartition(topics.status, 0)
        self._silences: dict[TopicPartition, Silence] = {}
        self._heard: float | None = None
        self._alias = alias
        self.board = StatusBoard() if board is None else board
        self.splits = Splits()

    async def read_to_end(self, topics: Iterable[str]) -> list[FoundCommand]:
        """Read topics of one partition from their beginning to their present end; the commands for the alias.

        Raises:
            KafkaUnavailable: a step took too long.
        """
        partitions = [TopicPartition(topic, 0) for topic in topics]
        self._consumer.assign(partitions)
        self._silences = {partition: Silence(_TURN_S) for partition in partitions}
        await self._connection.call(
            _STEP_S, "going to the beginning", self._consumer.seek_to_beginning(*partitions)
        )
        ends = await self._connection.call(_STEP_S, "finding the end", self._consumer.end_offsets(partitions))
        return await self._read_to(ends, _READ_S, "reading the control and status topics")

    async def read_back(self, offset: int) -> list[FoundCommand]:
        """Read until the control topic's record at `offset` was read; the commands for the alias.

        Raises:
            KafkaUnavailable: it took too long.
        """
        return await self._read_to({self._control: offset + 1}, _STEP_S, "reading the command back")

    async def _read_to(
        self, ends: Mapping[TopicPartition, int], within: float, what: str
    ) -> list[FoundCommand]:
        commands: list[FoundCommand] = []
        taken = Silence(_TURN_S)
        # The position counts, not the last record's offset: compaction may have removed the last records.
        while any([await self._consumer.position(tp) < end for tp, end in ends.items()]):
            if taken.look(None, time.monotonic()) > within:
                raise self._connection.unavailable(f"{what} took more than {within:g} s")
            commands += await self.poll()
        return commands

    async def poll(self) -> list[FoundCommand]:
        """Read what is there, waiting for it a quarter of a second at most; the commands for the alias.

        Raises:
            KafkaUnavailable: the broker does not answer.
        """
        for silence in self._silences.values():
            silence.listen(time.monotonic())
        try:
            records = await poll(self._consumer, timeout_ms=_POLL_MS)
        except (KafkaError, OSError) as error:
            raise self._connection.failed(error) from error
        self._listen(time.monotonic())
        return [found for record in records if (found := self._take(record)) is not None]

    def heard(self, now: float) -> float:
        """Up to when the statuses were read, at epoch seconds `now`."""
        return now if self._heard is None else min(now, self._heard)

    def _listen(self, now: float) -> None:
        for tp, silence in self._silences.items():
            last: int | None = self._consumer.last_poll_timestamp(tp)
            if silence.look(last, now) > _SILENCE_S:
                raise self._connection.unavailable(f"nothing came for {_SILENCE_S:g} s")
            if tp == self._status and last is not None:
                self._heard = last / 1000

    def _take(self, record: Polled) -> FoundCommand | None:
        if isinstance(record, UnreadableRecord):
            return None
        is_command = record.topic == self._control.topic
        if is_command:
            self.splits.see(record.key, record.value)
        if record.value is None:
            if not is_command and record.key is not None:
                self.board.forget(record.key.decode(errors="replace"))
            return None
        try:
            if is_command:
                alias = self._alias
                command = None if alias is None else read_command(record.key, record.value, alias)
                return None if command is None else FoundCommand(record.offset, command)
            key = (record.key or b"").decode(errors="replace")
            self.board.see(key, read_status(record.key, record.value))
        except _UNDECODABLE:
            return None
        return None


async def write_record(
    connection: KafkaConnection, topic: str, command: Control | Split, timeout: float
) -> int:
    """Publish a command or a split; its offset."""
    async with connection.client(connection.producer, timeout) as producer:
        sent = await connection.call(
            timeout,
            "writing the command",
            producer.send_and_wait(topic, encode_record(command), key=command.alias.encode(), partition=0),
        )
        return int(sent.offset)


async def _take_part(
    reader: ControlPlaneReader, command: Control, write: Callable[[Control], Awaitable[int]]
) -> None:
    """Write the command, and see what else was written meanwhile: replicas follow the highest version, and of equal ones the
    first. Compaction keeps the last record, so that must be this one, too: whoever lost writes it once more.

    Raises:
        LostRace: it is another one than ours.
    """
    found: list[FoundCommand] = []
    written = command
    while True:
        offset = await write(written)
        found += await reader.read_back(offset)
        first = max((one for one in found if one.offset <= offset), key=lambda one: one.command.version)
        if first.command.command_id == written.command_id:
            break
        written = first.command
    if written.command_id != command.command_id:
        raise LostRace(alias=command.alias)
