"""A client that is started, or the reason why not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from aiokafka.errors import KafkaError

from embedq_shared.backoff import backoff
from embedq_shared.kafka.clients import AIOKafkaAdminClient, AIOKafkaConsumer, AIOKafkaProducer
from embedq_shared.kafka.stopping import stop_client

Client = TypeVar("Client", AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient)

_ATTEMPT_S: Final = 5.0
"""One attempt to connect: a broker that hangs must not cost the whole deadline."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_DISCARD_S: Final = 0.5
"""For stopping a client that never connected: there is nothing to flush."""


class BrokerUnreachable(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """No broker let us in before the deadline; the message is the last reason."""


async def connect(make: Callable[[], Client], within: float) -> Client:
    """A started client. Tries again with new ones for `within` seconds, since Kafka is often started together with us.

    Raises:
        BrokerUnreachable: not within `within` seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + within
    attempt = 0
    while True:
        client = make()
        try:
            async with asyncio.timeout(min(_ATTEMPT_S, max(0.001, end - loop.time()))):
                await client.start()
            return client
        except TimeoutError:
            why = f"no answer within {within:g} s"
        except (KafkaError, OSError) as error:
            why = reason(error)
        except BaseException:
            await stop_client(client, _DISCARD_S)
            raise
        await stop_client(client, _DISCARD_S)
        pause = backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
        if end - loop.time() <= pause:
            raise BrokerUnreachable(why)
        await asyncio.sleep(pause)
        attempt += 1


def reason(error: BaseException) -> str:
    """An error of aiokafka's in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
