"""The producer of a run: sends jobs until the brokers have acknowledged as many as were asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog

from embedq_shared.kafka import AIOKafkaProducer, KafkaError, stop_client
from tests.faults.load import JobMaker

log = structlog.get_logger()

_TROUBLE: Final = (KafkaError, OSError, TimeoutError)
_ATTEMPT_S: Final = 20.0
_PAUSE_S: Final = 0.5
_BATCH: Final = 100


class Producing:
    """Each attempt has an id of its own: a job that was not acknowledged may be in the log all the same, and then it counts
    as accepted; it is never sent again.

    Args:
        jobs: how many must be acknowledged, at least.
        window: how many jobs in the log may be without a result, before it waits.
        waiting: how many there are.
        more: whether it is to go on beyond `jobs`.
        over: whether it is to stop now, come what may.
    """

    # More than six parameters: how much is sent, and how fast.
    def __init__(
        self,
        servers: str,
        maker: JobMaker,
        *,
        jobs: int,
        window: int,
        waiting: Callable[[], int],
        more: Callable[[], bool],
        over: Callable[[], bool],
    ) -> None:
        self._servers = servers
        self._maker = maker
        self._jobs = jobs
        self._window = window
        self._waiting = waiting
        self._more = more
        self._over = over
        self._attempts = 0
        self.acknowledged = 0

    @property
    def _done(self) -> bool:
        return self._over() or (self.acknowledged >= self._jobs and not self._more())

    async def run(self) -> None:
        """Send until enough are acknowledged."""
        while not self._done:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._servers,
                acks="all",
                enable_idempotence=True,
                linger_ms=5,
                request_timeout_ms=10_000,
            )
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    await producer.start()
                await self._produce(producer)
            except _TROUBLE as error:
                log.info("producer_connects_again", reason=repr(error))
                await asyncio.sleep(_PAUSE_S)
            finally:
                await stop_client(producer, _ATTEMPT_S)

    async def _produce(self, producer: AIOKafkaProducer) -> None:
        while not self._done:
            if self._waiting() >= self._window:
                await asyncio.sleep(0.02)
                continue
            sent: list[asyncio.Future[object]] = []
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    for _ in range(_BATCH):
                        job = self._maker.job(f"job-{self._attempts}")
                        self._attempts += 1
                        sent.append(
                            await producer.send(
                                job.topic, job.value, key=job.id.encode(), headers=list(job.headers)
                            )
                        )
                    await asyncio.wait(sent)
            finally:
                for future in sent:
                    with suppress(*_TROUBLE, asyncio.CancelledError, asyncio.InvalidStateError):
                        future.result()
                        self.acknowledged += 1
            for future in sent:
                future.result()  # one that failed: this producer's sequence has a gap
