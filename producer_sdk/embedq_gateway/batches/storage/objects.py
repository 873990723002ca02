"""What files and batches ask of the storage that they are kept in."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import msgspec

READ_CHUNK_BYTES: Final = 1 << 20
"""What is read at once: a thread is entered for each, and this much of each open download is in memory."""

_OTHER_VERSION: Final = '"0123456789abcdef0123456789abcdef"'
"""As S3 writes its versions, and of no object."""


class StorageError(Exception):
    """The storage did not do what it was asked: it is full, away, or lets us not in. The message says which part of it."""


class StorageUnfit(StorageError):
    """The storage answers, and cannot do what batches need; trying again would not help."""


class Stored(msgspec.Struct, frozen=True):
    """A small object and the version of its bytes, which `replace` compares."""

    data: bytes
    version: str


class ObjectWriter(Protocol):
    """Takes the bytes of a new object, of which nobody sees anything before all are there."""

    async def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            StorageError.
        """


class Objects(Protocol):
    """Objects by key, such as `a/b/c`, each of them written whole and never changed in part.

    Invariants:
        - An object is there whole or not at all, also after the process was killed, and after a loss of power.
        - `create` and `replace` are atomic against all processes that share the storage.

    Every method raises StorageError.
    """

    async def open(self) -> None:
        """Make what is needed before anything else; several times do no harm."""

    async def get(self, key: str) -> Stored | None:
        """A small object; None if there is none."""

    async def put(self, key: str, data: bytes) -> None:
        """Write an object, whatever was there."""

    async def create(self, key: str, data: bytes) -> bool:
        """Write an object where there is none; False if there is one."""

    async def replace(self, key: str, data: bytes, version: str) -> bool:
        """Write an object in place of the one of this version; False if that is no longer there."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are no error."""

    async def names(self, folder: str) -> list[str]:
        """The names directly below a folder, sorted: of objects, and of folders as long as there is an object in them."""

    def read(self, key: str) -> AsyncGenerator[bytes, None]:
        """An object's bytes, a chunk at a time. One that is not there is a StorageError."""

    def writing(self, key: str) -> AbstractAsyncContextManager[ObjectWriter]:
        """A writer of a large object, which is there when the block ends, and is not if an exception ends it."""

    async def close(self) -> None:
        """Give connections back."""


def version_of(data: bytes) -> str:
    """The version of an object's bytes, where the storage has none of its own."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


async def check_conditions(objects: Objects, probe: str) -> None:
    """Make sure that the storage heeds the conditions of `create` and `replace`, without which two gateways would run one batch.

    Raises:
        StorageUnfit: it does not.
        StorageError: it cannot be written to now.
    """
    try:
        await objects.put(probe, b"1")
        created = await objects.create(probe, b"2")
        replaced = await objects.replace(probe, b"3", _OTHER_VERSION)
        stored = await objects.get(probe)
        rightly = stored is not None and await objects.replace(probe, b"4", stored.version)
    finally:
        await objects.delete([probe])
    if created or replaced or not rightly:
        raise StorageUnfit(
            "the storage does not heed If-None-Match and If-Match: batches need a storage with conditional writes"
        )
