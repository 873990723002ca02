"""The parts of files and batches, and how they are opened and closed."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Final

from starlette.routing import Route

from embedq_gateway.batches.answering import EmbedLine
from embedq_gateway.batches.batch import DAY_S
from embedq_gateway.batches.files import Files
from embedq_gateway.batches.register import Register
from embedq_gateway.batches.routes import BatchRoutes, FileRoutes, NoStorage
from embedq_gateway.batches.running.runner import RunOptions
from embedq_gateway.batches.running.worker import BatchWorker, WorkerOptions
from embedq_gateway.batches.storage import StorageAddress, StorageError, StorageUnfit, prepare, storage_at
from embedq_gateway.settings import PREFIX, GatewaySettings, SettingsError
from embedq_sdk import EmbedClient
from embedq_sdk.errors import ClientClosed, EmbedError
from embedq_shared.backoff import backoff

log = logging.getLogger("embedq.gateway")

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_LEAVE_S: Final = 10.0
"""To write down what is there. What is not written is computed again by whoever goes on."""
_BEATS: Final = 3
"""Signs of life within a lease, so that two may come late."""


class NoBatches:
    """A gateway that has no place for files and batches."""

    def routes(self) -> list[Route]:
        """The paths, which say so."""
        return NoStorage().routes()

    async def run(self) -> None:
        """There is nothing to run."""


class Batches:
    """Files and batches of one gateway process.

    Args:
        client: their own, which is opened and closed here.

    Raises:
        SettingsError: their place is not one, or needs a package that is missing.
    """

    def __init__(self, settings: GatewaySettings, client: EmbedClient) -> None:
        self._client = client
        try:
            self._objects = storage_at(StorageAddress.of(settings.files))
        except (ValueError, StorageUnfit) as error:
            raise SettingsError(f"{PREFIX}FILES: {error}") from None
        keep_s = settings.files_keep_days * DAY_S
        self._holder = uuid.uuid4().hex
        self.files = Files(self._objects, keep_s=keep_s, most_bytes=settings.max_file_bytes)
        self.register = Register(self._objects)
        self.worker = BatchWorker(
            self._holder,
            self.register,
            self.files,
            EmbedLine(client, settings),
            WorkerOptions(
                run=RunOptions(
                    most_lines=settings.max_batch_requests,
                    in_flight_texts=settings.batch_in_flight_texts,
                    beat_s=settings.batch_lease_s / _BEATS,
                ),
                lease_s=settings.batch_lease_s,
                at_once=settings.batches_at_once,
                keep_s=keep_s,
            ),
            _report,
        )

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            *FileRoutes(self.files, self.register).routes(),
            *BatchRoutes(self.files, self.register, self.worker.poke).routes(),
        ]

    async def run(self) -> None:
        """Run batches until cancelled, which lets others go on with them.

        Raises:
            StorageUnfit: the storage can't do what batches need.
        """
        await self._prepare()
        await self._connect()
        work = asyncio.create_task(self.worker.run(), name="embedq-batches")
        broken = asyncio.create_task(self._broken(), name="embedq-batches-client")
        try:
            await asyncio.wait((work, broken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            broken.cancel()
            self.worker.stop()
            _, late = await asyncio.wait((work,), timeout=_LEAVE_S)
            if late:
                work.cancel()
            await asyncio.wait((work, broken))
            await self._client.close()
            await self._objects.close()
        for task in (work, broken):
            if not task.cancelled():
                task.result()

    async def _connect(self) -> None:
        """Open the client, however long Kafka is away."""
        while True:
            try:
                await self._client.open()
            except ClientClosed:
                raise
            except EmbedError:  # the gateway's other client has said so in the log
                await asyncio.sleep(_FIRST_PAUSE_S)
            else:
                return

    async def _broken(self) -> None:
        """A client that broke down does not mend itself: recovery is the next process."""
        while True:
            if self._client.fault is not None:
                raise self._client.fault
            await asyncio.sleep(_FIRST_PAUSE_S)

    async def _prepare(self) -> None:
        failures = 0
        while True:
            try:
                await prepare(self._objects, self._holder)
                return
            except StorageUnfit:
                raise
            except StorageError as error:
                _report("the storage of batches cannot be used yet", error)
                await asyncio.sleep(backoff(failures, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
                failures += 1


def _report(what: str, error: BaseException) -> None:
    told = isinstance(error, StorageError)
    log.warning("batches", extra={"reason": f"{what}: {error}"}, exc_info=None if told else error)
