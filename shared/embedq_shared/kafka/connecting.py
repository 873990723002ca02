"""A client that is started, or the reason why not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from embedq_shared.backoff import backoff
from embedq_shared.kafka.security.refusals import KafkaRefused, explain, is_permanent, refusal, uses_tokens
from embedq_shared.kafka.stopping import connections_of, stop_client

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
        KafkaRefused: a broker answers, and trying again will not help. At once.
        BrokerUnreachable: not within `within` seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + within
    attempt = 0
    while True:
        client = make()
        try:
            async with asyncio.timeout(min(_ATTEMPT_S, max(0.001, end - loop.time()))):
                await start_client(client)
            return client
        except TimeoutError:
            why = f"no answer within {within:g} s"
        except KafkaRefused:
            await stop_client(client, _DISCARD_S)
            raise
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


async def start_client(client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient) -> None:
    """Start a client, once.

    Raises:
        KafkaRefused: a broker answers, and trying again will not help.
        KafkaError, OSError: it could not be started, for a reason that may pass.
    """
    connections = connections_of(client)
    if uses_tokens(connections) and (refused := await refusal(connections)) is not None:
        # aiokafka takes a token that the broker refuses for one that it took, so that one is looked at before.
        raise refused
    try:
        await client.start()
    except (KafkaError, OSError) as error:
        if is_permanent(error):
            raise KafkaRefused(explain(error)) from None
        if (refused := await refusal(connections)) is not None:
            raise refused from None
        raise


def reason(error: BaseException) -> str:
    """An error of aiokafka's in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
