"""aiokafka's clients, without the permission to create topics, and without a word on the screen.

A metadata request that names a topic creates it, with the broker's defaults, where `auto.create.topics.enable` is on, which
it is unless somebody turned it off: so a producer would bring a deleted topic back with one partition and call its records
delivered. aiokafka always gives that permission. These clients never do, and no others leave the Kafka room.

aiokafka gives its loggers no handler, so that Python writes their warnings to the standard error of whoever has not configured
logging: hundreds of lines while a broker is away, beside an exception that says it all.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import aiokafka
import aiokafka.admin
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    RequestTimedOutError,
    UnknownTopicOrPartitionError,
    UnsupportedVersionError,
)
from aiokafka.producer.sender import Sender, SendProduceReqHandler
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.util import wait_for

from embedq_shared.kafka.requests import TopicFacts, TopicIds, topics_of
from embedq_shared.kafka.wire.answers import Answers
from embedq_shared.kafka.wire.fetches import QuickFetch
from embedq_shared.kafka.wire.produces import Produce, QuickProduce, framed

for _library in ("aiokafka", "embedq_shared"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


class AIOKafkaProducer(aiokafka.AIOKafkaProducer):  # type: ignore[misc]  # aiokafka has no type information
    """aiokafka's producer, which creates no topics."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.client.__class__ = KafkaConnections
        self._sender.__class__ = PromptSender


class PromptSender(Sender):  # type: ignore[misc]
    """Sends what was appended two rounds of the event loop earlier than aiokafka's sender, which waits for a set of futures anew each
    time, and writes in tasks: here one future is told of all that may be sent, and of each request that is over, and what may be sent is
    written at once. A transactional one is aiokafka's own.
    """

    request_kind: type[PromptRequest]

    async def _sender_routine(self) -> None:
        if self._txn_manager is not None and self._txn_manager.transactional_id is not None:
            await super()._sender_routine()
            return
        requests: set[asyncio.Task[None]] = set()
        try:
            while True:
                await self._maybe_wait_for_pid()
                for request in [each for each in requests if each.done()]:
                    requests.discard(request)
                    request.result()
                waits_for_leaders = self._send_what_may_be_sent(requests)
                more = self._message_accumulator.waiter()
                if waits_for_leaders:
                    known = self.client.force_metadata_update()
                    await asyncio.wait({more, known}, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await more
        except asyncio.CancelledError:
            for request in requests:
                await request
        except (OutOfOrderSequenceNumber, ProducerFenced):
            raise
        except Exception as error:
            raise KafkaError("a request to produce failed in a way that aiokafka does not expect") from error

    def _send_what_may_be_sent(self, requests: set[asyncio.Task[None]]) -> bool:
        """Start a request for each broker that has none. Whether something waits for its partition's leader to be known."""
        by_node: Any
        by_node, waits_for_leaders = self._message_accumulator.drain_by_nodes(
            ignore_nodes=self._in_flight, muted_partitions=self._muted_partitions
        )
        for node, batches in by_node.items():
            self._in_flight.add(node)
            self._muted_partitions.update(batches)
            written = self.request_kind(self, batches, node)
            request = asyncio.create_task(self._until_answered(written, node, batches))
            request.add_done_callback(self._look_again)
            requests.add(request)
        return bool(waits_for_leaders)

    async def _until_answered(self, request: PromptRequest, node: int, batches: Any) -> None:
        await request.do(node)
        self._in_flight.remove(node)
        self._muted_partitions -= batches.keys()

    def _look_again(self, _: asyncio.Task[None]) -> None:
        if not (more := self._message_accumulator.waiter()).done():
            more.set_result(None)


class PromptRequest(SendProduceReqHandler):  # type: ignore[misc]
    """Records on their way to a broker: written when this is made, if it is connected."""

    def __init__(self, sender: PromptSender, batches: Any, node: int) -> None:
        super().__init__(sender, batches)
        self._made = super().create_request()
        self._client.write(node, self._made)

    def create_request(self) -> ProduceRequest:
        """The one that was made."""
        return self._made


PromptSender.request_kind = PromptRequest


class AIOKafkaConsumer(aiokafka.AIOKafkaConsumer):  # type: ignore[misc]
    """aiokafka's consumer, which creates no topics."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._client.__class__ = KafkaConnections

    async def topic_facts(self, topic: str) -> TopicFacts | None:
        """A topic's id and number of partitions, as some broker has them; None if it says that there is no such topic.

        Raises:
            KafkaError: nothing can be said now; `UnsupportedVersionError` for ever, by a broker older than 2.8.
        """
        node = self._client.get_random_node()
        if node is None:
            raise KafkaConnectionError("the broker knows no brokers yet")
        try:
            response = await self._client.send(node, TopicIds([topic]))
        except NotImplementedError:  # aiokafka: the broker has no such version
            raise UnsupportedVersionError from None
        facts = topics_of(response).get(topic, UnknownTopicOrPartitionError())
        if isinstance(facts, TopicFacts):
            return facts
        if isinstance(facts, UnknownTopicOrPartitionError):
            return None
        raise facts


class AIOKafkaAdminClient(aiokafka.admin.AIOKafkaAdminClient):  # type: ignore[misc]
    """aiokafka's admin client, which creates topics only by `create_topics`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._client.__class__ = KafkaConnections


class KafkaConnections(AIOKafkaClient):  # type: ignore[misc]
    """Every request but the first one, which names no topic, goes over a connection from here.

    A broker that was just started may say that it knows no brokers at all, which aiokafka takes for a fault of ours where it
    looks for a coordinator (`AssertionError`). Here it is an error that may pass, after which aiokafka asks again.
    """

    async def coordinator_lookup(self, *args: Any) -> int:
        if not self.cluster.brokers() and not (await self.force_metadata_update() and self.cluster.brokers()):
            raise KafkaConnectionError("the broker knows no brokers yet")
        node: int = await super().coordinator_lookup(*args)
        return node

    def write(self, node: int, request: ProduceRequest) -> None:
        """Write a request at once, if its broker is connected; `send` waits for its answer alone then, and else does all."""
        connection = self._conns.get((node, ConnectionGroup.DEFAULT))
        if connection is not None and connection.connected() and request.required_acks:
            with suppress(KafkaError):  # `send` raises it again, to whoever waits
                request.written = connection, connection.send(request)

    async def send(self, node_id: int, request: Any, *, group: int = ConnectionGroup.DEFAULT) -> Any:
        written = getattr(request, "written", None)
        if written is None:
            return await super().send(node_id, request, group=group)
        connection, answer = written
        try:
            return await answer
        except TimeoutError:  # as aiokafka does
            connection.close(reason=CloseReason.CONNECTION_TIMEOUT)
            raise RequestTimedOutError from None

    async def _get_conn(self, *args: Any, **options: Any) -> AIOKafkaConnection | None:
        connection = await super()._get_conn(*args, **options)
        if connection is not None:
            connection.__class__ = _Connection
            Answers.take(connection)
        return connection


class _Connection(AIOKafkaConnection):  # type: ignore[misc]
    def send(self, request: Any, expect_response: bool = True) -> Any:
        if isinstance(request, MetadataRequest):
            request._allow_auto_topic_creation = False
        elif type(request) is FetchRequest:
            request.__class__ = QuickFetch
        elif type(request) is ProduceRequest and expect_response and self._writer is not None:
            request.__class__ = QuickProduce
            sent = request.prepare(self._versions)
            if type(sent) is Produce:
                return self._send_records(sent)
        return super().send(request, expect_response)

    def _send_records(self, request: Produce) -> Any:
        """As `send`, but that aiokafka copies what it has written twice more before it goes out."""
        number = self._next_correlation_id()
        header = request.build_request_header(correlation_id=number, client_id=self._client_id)
        self._writer.write(framed(header.encode(), request))
        answer = self._loop.create_future()
        self._requests.append((number, request, answer))
        return wait_for(answer, self._request_timeout)
