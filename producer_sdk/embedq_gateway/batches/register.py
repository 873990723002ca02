"""The batches of all callers: a document for each, changed only from the version that was read, and a list of those that run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final

import msgspec

from embedq_gateway.batches.batch import DAY_S, Batch
from embedq_gateway.batches.identities import is_id, owner_folder
from embedq_gateway.batches.paging import documents, ordered
from embedq_gateway.batches.storage import Objects, StorageError

_ACTIVE: Final = "active"
"""The folder that names each batch that has not ended, so that nobody need look at all of them."""
_UNBORN_S: Final = 600.0
"""A name in that folder is written before its batch; its writer was killed in between if there is none after so long."""
_MOST_TRIES: Final = 100
"""Of one change. Two gateways change a batch now and then, never for long."""

_decoder: Final = msgspec.json.Decoder(Batch)


class BatchGone(Exception):
    """There is no such batch any more."""


class Active(msgspec.Struct, frozen=True):
    """What the folder of running batches holds of each."""

    owner: str
    created_at: int


_active: Final = msgspec.json.Decoder(Active)


class Register:
    """All batches.

    Every method raises StorageError.
    """

    def __init__(self, objects: Objects, *, now: Callable[[], float] = time.time) -> None:
        self._objects = objects
        self.now = now
        """Seconds since 1970."""

    async def add(self, batch: Batch) -> None:
        """A new batch, which somebody will run from now on."""
        active = Active(batch.owner, batch.created_at)
        await self._objects.put(f"{_ACTIVE}/{batch.id}", msgspec.json.encode(active))
        await self._objects.create(_document(batch.owner, batch.id), msgspec.json.encode(batch))

    async def get(self, owner: str, name: str) -> Batch | None:
        """A batch of this owner; None if there is none."""
        if not is_id("batch", name):
            return None
        stored = await self._objects.get(_document(owner, name))
        return None if stored is None else _decoder.decode(stored.data)

    async def page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Up to `limit` batches, the newest first, older than the one named `after`; and whether there are more."""
        names = ordered(await self._objects.names(f"{owner_folder(owner)}/batches"), after, True)
        batches = documents(names, lambda name: self.get(owner, name))
        found: list[Batch] = []
        async with contextlib.aclosing(batches):
            async for batch in batches:
                if len(found) == limit:
                    return found, True
                found.append(batch)
        return found, False

    async def change(self, owner: str, name: str, change: Callable[[Batch], Batch]) -> Batch:
        """Change a batch, from what it is now; again if somebody else changes it in between. The batch as it then is.

        Raises:
            BatchGone; and whatever `change` raises.
        """
        key = _document(owner, name)
        written = b""
        for _ in range(_MOST_TRIES):
            stored = await self._objects.get(key)
            if stored is None:
                raise BatchGone(f"there is no batch {name} any more")
            if stored.data == written:  # it was done, and only the answer was lost
                return _decoder.decode(written)
            changed = change(_decoder.decode(stored.data))
            written = msgspec.json.encode(changed)
            if written == stored.data or await self._objects.replace(key, written, stored.version):
                return changed
        raise StorageError(f"batch {name} could not be changed: others change it all the time")

    # -- those that run -----------------------------------------------------------------------------------------------

    async def active(self) -> list[Batch]:
        """The batches that have not ended."""
        return [batch for batch in await self.listed() if not batch.ended]

    async def listed(self) -> list[Batch]:
        """The batches that somebody has to look at: those that run, and those after whose end nobody has cleared away."""
        return [batch async for batch in documents(await self._objects.names(_ACTIVE), self._active_batch)]

    async def _active_batch(self, name: str) -> Batch | None:
        stored = await self._objects.get(f"{_ACTIVE}/{name}")
        if stored is None:
            return None
        active = _active.decode(stored.data)
        batch = await self.get(active.owner, name)
        if batch is None and self.now() - active.created_at > _UNBORN_S:
            await self._objects.delete([f"{_ACTIVE}/{name}"])
        return batch

    async def leave_active(self, batch: Batch) -> None:
        """A batch has ended, and what was left of it is gone: nobody need look at it any more."""
        await self._objects.delete([f"{_ACTIVE}/{batch.id}"])

    # -- housekeeping -------------------------------------------------------------------------------------------------

    async def owners(self) -> list[str]:
        """The folders of all owners."""
        return [f"owners/{name}" for name in await self._objects.names("owners")]

    async def sweep(self, folder: str, keep_s: int = 30 * DAY_S) -> None:
        """Remove an owner's batches that ended so long ago."""
        names = await self._objects.names(f"{folder}/batches")
        for name in names:
            stored = await self._objects.get(f"{folder}/batches/{name}")
            if stored is None:
                continue
            ended_at = _decoder.decode(stored.data).ended_at
            if ended_at is not None and ended_at + keep_s <= self.now():
                await self._objects.delete([f"{folder}/batches/{name}"])


def _document(owner: str, name: str) -> str:
    return f"{owner_folder(owner)}/batches/{name}"
