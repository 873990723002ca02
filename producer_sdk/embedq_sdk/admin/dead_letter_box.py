"""The dead-letter topic as an operator uses it: find letters, look at one, replay them, drop them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from embedq_sdk.admin.dead_letters import (
    NOTE,
    DeadLetter,
    Fate,
    LetterFilter,
    Note,
    Position,
    deletable_before,
    letter_of,
    note_of,
    original_headers,
)
from embedq_sdk.errors import EmbedError, InvalidArgument
from embedq_sdk.shown import Shown
from embedq_sdk.transport.kafka import KafkaConnection, require_topics
from embedq_sdk.transport.silence import Silence
from embedq_shared.kafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRecord,
    KafkaError,
    TopicPartition,
    UnreadableRecord,
    delete_before,
    poll_partition,
    reason,
)
from embedq_shared.topics import Topics

_POLL_MS: Final = 500
_TURN_S: Final = 2 * _POLL_MS / 1000
"""A poll takes no longer in an event loop that runs."""
_STEP_S: Final = 30.0
"""One call to the brokers, and the longest silence while reading."""
_CHUNK: Final = 100
"""Letters that are sent before their note is written: at most as many are sent twice after a crash between the two."""
_CHUNK_S: Final = 1.0
"""A chunk is no more than the rate allows in this time, so that an interruption never waits long."""


class NoSuchLetter(EmbedError):
    """There is no dead letter at {position}"""

    position: str


class LetterContent(Shown, frozen=True, kw_only=True):
    """A letter with the record as it was."""

    letter: DeadLetter
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    """The record's own, without those of the dead letter."""


class ReplayProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a replay is. `failed` has the letters that could not be sent, and why; they are not settled."""

    total: int
    replayed: int
    failed: list[tuple[Position, str]]


class DropReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a drop did. `freed` counts records that Kafka deleted from the beginnings of partitions; `refused` says why it did
    not want to.
    """

    dropped: int
    freed: int
    refused: str | None


class DeadLetterBox:
    """The dead letters of one service.

    Invariants:
        - What is settled was acknowledged before: a letter's note is written after the brokers have its replay.
        - A replay goes to the job topic that the letter came from, of whichever pool, and to no other topic: anybody who may write
          dead letters could otherwise make it write anywhere.
    """

    def __init__(
        self,
        connection: KafkaConnection,
        consumer: AIOKafkaConsumer,
        topics: Topics,
        connect_timeout: float,
    ) -> None:
        self._connection = connection
        self._consumer = consumer
        self._topics = topics
        self._timeout = connect_timeout
        self._letters: dict[int, list[DeadLetter]] = {}
        self._lanes: list[str] = []
        """Of all pools."""

    # -- reading --------------------------------------------------------------------------------------------------------

    async def find(self, where: LetterFilter, *, settled: bool = False) -> list[DeadLetter]:
        """The letters that the filter means, in the order of their positions; `settled`: also those that are settled.

        Reads the whole topic, and keeps of each letter what `DeadLetter` has.

        Raises:
            KafkaUnavailable: the brokers do not answer.
        """
        self._letters = {
            partition: [letter async for letter in self._read_partition(partition)]
            for partition in await self._partitions()
        }
        return [
            letter
            for letters in self._letters.values()
            for letter in letters
            if (settled or letter.settled is None) and where.matches(letter)
        ]

    async def read(self, position: Position) -> LetterContent:
        """One letter with its record.

        Raises:
            KafkaUnavailable: the brokers do not answer.
            NoSuchLetter: there is none at this position.
        """
        if position.partition in await self._partitions():
            found = await self.find(LetterFilter(positions=[position]), settled=True)
            async for letter, record in self._contents(found):
                return _content(letter, record)
        raise NoSuchLetter(position=str(position))

    async def _partitions(self) -> list[int]:
        name = self._topics.dead_letters
        needed = [name, *self._topics.lanes]
        known = await require_topics(self._connection, self._consumer, needed, self._timeout)
        pools = [None, *self._topics.pools_among(known)]
        self._lanes = [lane for pool in pools for lane in self._topics.of(pool).lanes]
        async with self._connection.client(self._connection.admin, self._timeout) as admin:
            [described] = await self._connection.call(
                _STEP_S, "finding the partitions", admin.describe_topics([name])
            )
        return sorted(one["partition"] for one in described["partitions"])

    async def _read_partition(self, partition: int) -> AsyncIterator[DeadLetter]:
        letters: list[DeadLetter] = []
        fates: dict[int, Fate] = {}
        async for record in self._records(partition):
            if (note := note_of(record.value, record.headers)) is not None:
                fates |= dict.fromkeys(note[1], note[0])
            else:
                letters.append(letter_of(partition, record.offset, record.value, record.headers))
        for letter in letters:
            yield msgspec.structs.replace(letter, settled=fates.get(letter.offset))

    async def _records(self, partition: int, begin: int | None = None) -> AsyncIterator[ConsumerRecord]:
        """A partition's records up to its end as it is now. What no client can read is no letter of ours: it is passed."""
        here = TopicPartition(self._topics.dead_letters, partition)
        call = self._connection.call
        self._consumer.assign([here])
        if begin is None:
            await call(_STEP_S, "going to the beginning", self._consumer.seek_to_beginning(here))
        else:
            self._consumer.seek(here, begin)
        end = (await call(_STEP_S, "finding the end", self._consumer.end_offsets([here])))[here]
        silence = Silence(_TURN_S)
        read = 0
        while await call(_STEP_S, "finding the position", self._consumer.position(here)) < end:
            silence.listen(time.monotonic())  # what our caller does with a letter is not Kafka's silence
            try:
                found = await poll_partition(self._consumer, here, timeout_ms=_POLL_MS)
            except (KafkaError, OSError) as error:
                raise self._connection.unavailable(reason(error)) from error
            read += len(found)
            if silence.look(read or None, time.monotonic()) > _STEP_S:
                raise self._connection.unavailable(f"nothing came for {_STEP_S:g} s")
            for record in found:
                if not isinstance(record, UnreadableRecord):
                    yield record

    async def _contents(
        self, letters: Iterable[DeadLetter]
    ) -> AsyncIterator[tuple[DeadLetter, ConsumerRecord]]:
        """These letters with their records, in the order of their positions."""
        wanted: defaultdict[int, dict[int, DeadLetter]] = defaultdict(dict)
        for letter in letters:
            wanted[letter.partition][letter.offset] = letter
        for partition, by_offset in sorted(wanted.items()):
            left = len(by_offset)
            async for record in self._records(partition, min(by_offset)):
                if (found := by_offset.get(record.offset)) is not None:
                    yield found, record
                    left -= 1
                if not left:
                    break

    # -- settling -------------------------------------------------------------------------------------------------------

    async def replay(
        self, letters: Sequence[DeadLetter], *, rate: float, keep_deadline: bool = True
    ) -> AsyncGenerator[ReplayProgress, None]:
        """Send the records of these letters, which `find` gave, to their job topics, as they were, at most `rate` a second.

        After each chunk a note says which are done, and progress is yielded. When it is interrupted, what was acknowledged
        is still noted; the next replay goes on from there.

        Raises:
            KafkaUnavailable: the brokers do not answer.
        """
        async with self._connection.client(self._connection.producer, self._timeout) as producer:
            lanes = {
                lane: await self._connection.call(
                    _STEP_S, "finding the partitions", producer.partitions_for(lane)
                )
                for lane in self._lanes
            }
            replayed, failed = 0, list[tuple[Position, str]]()
            size = max(1, min(_CHUNK, int(rate * _CHUNK_S)))
            due = time.monotonic()
            async for chunk in _chunks(self._contents(letters), size):
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic()) + len(chunk) / rate
                done: list[DeadLetter] = []
                try:
                    failed += await self._send(producer, lanes, chunk, done, keep_deadline=keep_deadline)
                finally:
                    await asyncio.shield(self._note(producer, "replayed", done))
                replayed += len(done)
                yield ReplayProgress(total=len(letters), replayed=replayed, failed=list(failed))

    async def drop(self, letters: Sequence[DeadLetter]) -> DropReport:
        """Settle these letters without replaying them, and let Kafka delete what is settled at the beginning of each partition.

        `letters` come from the latest `find` of this object.

        Raises:
            KafkaUnavailable: the brokers do not answer.
        """
        async with self._connection.client(self._connection.producer, self._timeout) as producer:
            for start in range(0, len(letters), _CHUNK):
                await self._note(producer, "dropped", letters[start : start + _CHUNK])
        dropped = {letter.position for letter in letters}
        partitions = {
            TopicPartition(self._topics.dead_letters, partition): [
                msgspec.structs.replace(letter, settled="dropped") if letter.position in dropped else letter
                for letter in found
            ]
            for partition, found in self._letters.items()
        }
        call = self._connection.call
        begins = await call(_STEP_S, "finding the beginning", self._consumer.beginning_offsets(partitions))
        ends = await call(_STEP_S, "finding the end", self._consumer.end_offsets(partitions))
        # Letters that came since `find` are behind every letter that it found, and must stay.
        known = {here: found[-1].offset + 1 if found else begins[here] for here, found in partitions.items()}
        before = {
            here: deletable_before(found, begins[here], min(known[here], ends[here]))
            for here, found in partitions.items()
        }
        before = {here: offset for here, offset in before.items() if offset > begins[here]}
        refused = await self._delete(before)
        freed = 0 if refused else sum(offset - begins[here] for here, offset in before.items())
        return DropReport(dropped=len(letters), freed=freed, refused=refused)

    async def _delete(self, before: Mapping[TopicPartition, int]) -> str | None:
        """Let Kafka delete; why it did not, if it did not."""
        if not before:
            return None
        async with self._connection.client(self._connection.admin, self._timeout) as admin:
            try:
                async with asyncio.timeout(_STEP_S):
                    await delete_before(admin, before)
            except TimeoutError:
                return f"no answer within {_STEP_S:g} s"
            except KafkaError as error:
                return reason(error)
        return None

    async def _send(
        self,
        producer: AIOKafkaProducer,
        lanes: Mapping[str, set[int]],
        chunk: Sequence[tuple[DeadLetter, ConsumerRecord]],
        done: list[DeadLetter],
        *,
        keep_deadline: bool,
    ) -> list[tuple[Position, str]]:
        """Send a chunk; those acknowledged go to `done` at once. Returned are those that failed, and why."""
        failed: list[tuple[Position, str]] = []
        sent: list[tuple[DeadLetter, asyncio.Future[Any]]] = []
        try:
            async with asyncio.timeout(_STEP_S):
                for letter, record in chunk:
                    if (why := _cannot(letter, lanes)) is not None:
                        failed.append((letter.position, why))
                        continue
                    partitions = lanes[letter.original_topic]
                    own = letter.original_partition
                    try:
                        future = await producer.send(
                            letter.original_topic,
                            record.value,
                            key=record.key,
                            partition=own if own in partitions else None,
                            headers=original_headers(record.headers, deadline=keep_deadline),
                        )
                    except KafkaError as error:
                        failed.append((letter.position, reason(error)))
                        continue
                    future.add_done_callback(_note_done(letter, done))
                    sent.append((letter, future))
                if sent:
                    await asyncio.wait([future for _, future in sent])
        except TimeoutError:
            raise self._connection.unavailable(f"no acknowledgement within {_STEP_S:g} s") from None
        for letter, future in sent:
            if (problem := future.exception()) is not None:
                failed.append((letter.position, reason(problem)))
        return failed

    async def _note(self, producer: AIOKafkaProducer, fate: Fate, letters: Sequence[DeadLetter]) -> None:
        """Write down what became of letters, on their own partitions."""
        offsets: defaultdict[int, list[int]] = defaultdict(list)
        for letter in letters:
            offsets[letter.partition].append(letter.offset)
        for partition, settled in offsets.items():
            await self._connection.call(
                _STEP_S,
                "noting what is settled",
                producer.send_and_wait(
                    self._topics.dead_letters,
                    msgspec.json.encode(Note(offsets=settled)),
                    partition=partition,
                    headers=[(NOTE, fate.encode())],
                ),
            )


@contextlib.asynccontextmanager
async def dead_letters(
    servers: str | list[str],
    *,
    topic_prefix: str = "embed",
    connect_timeout: float = 10.0,
    **security: Any,
) -> AsyncIterator[DeadLetterBox]:
    """The dead letters of the service below a prefix. `security` as for `EmbedClient`.

    Raises:
        InvalidArgument, KafkaUnavailable.
    """
    connection = KafkaConnection.of(servers, security)
    if not topic_prefix:
        raise InvalidArgument(argument="topic_prefix", expected="a prefix of topic names", got="nothing")
    async with connection.client(
        lambda: connection.consumer(fetch_max_wait_ms=100, isolation_level="read_committed"), connect_timeout
    ) as consumer:
        yield DeadLetterBox(connection, consumer, Topics(topic_prefix), connect_timeout)


def _cannot(letter: DeadLetter, lanes: Mapping[str, set[int]]) -> str | None:
    """Why a letter cannot be replayed."""
    if letter.value_bytes is None:
        return "only the record's place is here, not its content"
    if letter.original_topic not in lanes:
        return f"it came from {letter.original_topic or 'nowhere'}, which is no job topic of this service"
    return None


def _note_done(letter: DeadLetter, done: list[DeadLetter]) -> Callable[[asyncio.Future[Any]], None]:
    def note(future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            done.append(letter)

    return note


def _content(letter: DeadLetter, record: ConsumerRecord) -> LetterContent:
    return LetterContent(
        letter=letter,
        key=record.key,
        value=record.value,
        headers=[(name, value or b"") for name, value in original_headers(record.headers)],
    )


async def _chunks(
    found: AsyncIterator[tuple[DeadLetter, ConsumerRecord]], size: int
) -> AsyncIterator[list[tuple[DeadLetter, ConsumerRecord]]]:
    chunk: list[tuple[DeadLetter, ConsumerRecord]] = []
    async for one in found:
        chunk.append(one)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
