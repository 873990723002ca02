"""Clients stop, or are abandoned: aiokafka's own `stop` may never end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient


async def stop_client(
    client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient, within: float
) -> str | None:
    """Stop a client, or abandon it: None if it stopped, else why it did not, in one word.

    aiokafka's own `stop` never ends while the brokers are gone. After `within` seconds it is cancelled, and what it
    leaves running is ended here: a producer's sender, which would connect again and send what was given up long ago, a
    consumer's fetcher, and the connections. Each of these steps takes `within` seconds at most. Raises nothing that
    Kafka says, since nothing could be done about it. If the caller is cancelled, only the sender is ended.
    """
    stop = client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop()
    problem: str | None = "CancelledError"
    try:
        problem = await finished(stop, within)
    finally:
        sender = _sender_of(client)
        if problem is not None and sender is not None:
            sender.cancel()
    if problem is None:
        return None
    if isinstance(client, AIOKafkaConsumer) and client._fetcher is not None:
        await finished(client._fetcher.close(), within)
    connections = client.client if isinstance(client, AIOKafkaProducer) else client._client
    await finished(connections.close(), within)
    if sender is not None:
        await asyncio.wait({sender}, timeout=within)
    return problem


def _sender_of(
    client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient,
) -> asyncio.Task[None] | None:
    if not isinstance(client, AIOKafkaProducer) or client._sender is None:
        return None
    sender: asyncio.Task[None] | None = client._sender.sender_task
    return sender


async def finished(work: Awaitable[None], within: float) -> str | None:
    """Wait for `work` for `within` seconds at most: None if it succeeded, else why not, in one word.

    It runs as a task: a fetch that a consumer's `stop` cancels lets `stop` itself end with CancelledError, which must
    not pass for a cancellation of ours.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=within)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_ignore_outcome)
    if not task.done():
        return "TimeoutError"
    if task.cancelled():
        return "CancelledError"
    failure = task.exception()
    return None if failure is None else type(failure).__name__


def _ignore_outcome(task: asyncio.Future[None]) -> None:
    """What a client raises once it was abandoned is of no use, and asyncio must not log it as never retrieved."""
    if not task.cancelled():
        task.exception()
