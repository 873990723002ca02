"""aiokafka's transactional producer, as `Transactions` needs it."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import structlog

from embedq_consumer.delivery.destination import MAX_BATCH_BYTES
from embedq_consumer.delivery.outgoing import Place
from embedq_consumer.exactly_once.transactions import Offsets, Parcel, TransactionalProducer
from embedq_shared.kafka import (
    FencedMember,
    FencedProducer,
    KafkaError,
    KafkaTimeoutError,
    OffsetAndMetadata,
    TopicPartition,
    connect,
    stable_offsets,
    stop_client,
)

log = structlog.get_logger()

_CONNECT_S: Final = 5.0
_CLOSE_S: Final = 1.0
_LINGER_MS: Final = 1
_ACK_MS: Final = 3_000
"""Below the time of an attempt, so that the broker's own reason comes first."""


def transactional_producers(
    options: Mapping[str, Any], name: str, *, timeout_ms: int, max_bytes: int
) -> Callable[[], TransactionalProducer]:
    """Makes producers of this transactional name, each of which fences the one before.

    `timeout_ms` is how long the brokers leave a transaction open whose producer has died, and readers wait.
    """

    def make() -> FencedProducer:
        return FencedProducer(
            **options,
            retries=True,
            ack_timeout_ms=_ACK_MS,
            transactional_id=name,
            transaction_timeout_ms=timeout_ms,
            acks="all",
            linger_ms=_LINGER_MS,
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=max_bytes,
        )

    return lambda: KafkaTransactions(make)


class KafkaTransactions:
    """One transactional producer."""

    def __init__(self, make: Callable[[], FencedProducer]) -> None:
        self._make = make
        self._connected: FencedProducer | None = None

    async def start(self) -> None:
        """Connect, and fence the producers of this name before."""
        self._connected = await connect(self._make, _CONNECT_S)

    async def look_up(self, places: Collection[Place]) -> Mapping[Place, KafkaError]:
        """Why some of these places cannot be written to."""
        found: dict[Place, KafkaError] = {}
        for place in places:
            if not self._producer.has_leader(*place):
                try:
                    await self._producer.look_up(*place)
                except KafkaError as error:
                    found[place] = error
        return found

    async def begin(self) -> None:
        """Begin a transaction."""
        await self._producer.begin_transaction()

    async def send(self, parcels: Sequence[Parcel], within: float) -> Sequence[KafkaError | None]:
        """Send all, to each place as much as fits at a time."""
        began = time.monotonic()
        by_place: dict[Place, list[int]] = defaultdict(list)
        for index, parcel in enumerate(parcels):
            by_place[parcel.place].append(index)
        outcomes: dict[int, KafkaError | None] = {}
        tasks = [
            asyncio.ensure_future(self._send_to(parcels, indices, outcomes)) for indices in by_place.values()
        ]
        broken = asyncio.ensure_future(self._producer.transaction_broken())
        done = (
            asyncio.ensure_future(asyncio.wait(tasks)) if tasks else asyncio.ensure_future(asyncio.sleep(0))
        )
        try:
            await asyncio.wait({done, broken}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (done, broken, *tasks):
                task.cancel()
        await asyncio.wait({done, broken, *tasks})
        return [
            outcomes[index] if index in outcomes else self._silence(parcel.place, began)
            for index, parcel in enumerate(parcels)
        ]

    async def _send_to(
        self, parcels: Sequence[Parcel], indices: Sequence[int], outcomes: dict[int, KafkaError | None]
    ) -> None:
        """To one place, a batch at a time, so that nothing waits for room within the client."""
        open: dict[int, asyncio.Future[Any]] = {}
        size = 0
        for index in indices:
            parcel = parcels[index]
            record = parcel.record
            if open and (parcel.alone or size + record.size > MAX_BATCH_BYTES):
                await _settled(open, outcomes)
                size = 0
            try:
                open[index], _ = self._producer.append(*parcel.place, [record])
            except KafkaError as error:
                outcomes[index] = error
                continue
            size += record.size
            if parcel.alone:
                await _settled(open, outcomes)
                size = 0
        await _settled(open, outcomes)

    def _silence(self, place: Place, began: float) -> KafkaError:
        """Why a record of this place has no answer."""
        if (error := self._producer.refusal_of(place[0])) is not None:
            return error
        said = self._producer.last_error(*place, began)
        return said if isinstance(said, KafkaError) else KafkaTimeoutError("no answer")

    async def add_offsets(self, offsets: Offsets, member: FencedMember) -> None:
        """The offsets become the group's with this transaction."""
        self._producer.member = member
        await self._producer.send_offsets_to_transaction(dict(offsets), member.group)

    async def commit(self) -> None:
        """Make it all visible."""
        await self._producer.commit_transaction()

    async def abort(self) -> None:
        """Undo it all."""
        await self._producer.abort_transaction()

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata | None]:
        """The group's offsets, once no open transaction can change them."""
        return await stable_offsets(self._producer.client, group, partitions)

    async def abandon(self) -> None:
        """Disconnect, whatever the brokers do."""
        producer, self._connected = self._connected, None
        if producer is not None and (problem := await stop_client(producer, _CLOSE_S)):
            log.info("transactional_producer_abandoned", reason=problem)

    @property
    def _producer(self) -> FencedProducer:
        if self._connected is None:
            raise RuntimeError("the producer is not connected. This is a bug.")
        return self._connected


async def _settled(open: dict[int, asyncio.Future[Any]], outcomes: dict[int, KafkaError | None]) -> None:
    """Wait for these, note what became of each, and forget them."""
    if open:
        await asyncio.wait(open.values())
    for index, future in open.items():
        outcomes[index] = _reason(future)
    open.clear()


def _reason(sent: asyncio.Future[Any]) -> KafkaError | None:
    if sent.cancelled():
        return KafkaError("the producer was closed")
    failure = sent.exception()
    if failure is None or isinstance(failure, KafkaError):
        return failure
    raise failure
