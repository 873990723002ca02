"""Files of callers: uploaded, or made of a batch's results. Content lies in pieces; a small document says which."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from typing import Final, Literal

import msgspec

from embedq_gateway.batches.batch import DAY_S, Piece
from embedq_gateway.batches.identities import is_id, new_id, owner_folder
from embedq_gateway.batches.paging import documents, ordered
from embedq_gateway.batches.storage import Objects

Purpose = Literal["batch", "batch_output"]


class FileTooLarge(Exception):
    """An upload has more bytes than a file may have."""


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file's document."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    created_at: int
    """Seconds since 1970."""
    expires_at: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return sum(piece.size for piece in self.pieces)


_decoder: Final = msgspec.json.Decoder(File)


class Files:
    """The files of all callers. Each caller's are in a folder of its own, so that nobody's id finds another's file.

    Args:
        keep_s: how long a file is kept unless it is said otherwise.
        most_bytes: of one upload.

    Every method raises StorageError.
    """

    def __init__(
        self,
        objects: Objects,
        *,
        keep_s: int = 30 * DAY_S,
        most_bytes: int = 200 << 20,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._keep_s = keep_s
        self._most_bytes = most_bytes
        self._now = now

    async def upload(
        self, owner: str, chunks: AsyncIterable[bytes], described: Callable[[], tuple[str, int | None]]
    ) -> File:
        """Keep a file, of which no more than a chunk is in memory.

        `described` is asked once the last chunk is there: for the file's name and for how many seconds to keep it.

        Raises:
            FileTooLarge; and whatever `chunks` and `described` raise. Then there is no file.
        """
        now = self._now()
        name = new_id("file", now)
        key = f"{owner_folder(owner)}/contents/{name}"
        size = 0
        async with self._objects.writing(key) as content:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._most_bytes:
                    raise FileTooLarge(f"expected a file of at most {self._most_bytes:,} bytes")
                await content.write(chunk)
            filename, keep_s = described()
        file = File(
            id=name,
            owner=owner,
            filename=filename,
            purpose="batch",
            created_at=int(now),
            expires_at=int(now) + (keep_s or self._keep_s),
            pieces=(Piece(key, size),),
        )
        await self.publish(file)
        return file

    def made_of(
        self, owner: str, name: str, pieces: Sequence[Piece], filename: str, keep_s: int | None
    ) -> File:
        """The document of a file whose pieces are there already."""
        now = int(self._now())
        return File(
            id=name,
            owner=owner,
            filename=filename,
            purpose="batch_output",
            created_at=now,
            expires_at=now + (keep_s or self._keep_s),
            pieces=tuple(pieces),
        )

    async def publish(self, file: File) -> None:
        """From now on the file is there. Doing so twice does nothing more."""
        await self._objects.create(_document(file.owner, file.id), msgspec.json.encode(file))

    async def get(self, owner: str, name: str, *, in_use: bool = False) -> File | None:
        """A file of this owner; None if there is none, or not any more. While it is in use its time is not over."""
        if not is_id("file", name):
            return None
        stored = await self._objects.get(_document(owner, name))
        file = None if stored is None else _decoder.decode(stored.data)
        return file if file is not None and (in_use or self._now() < file.expires_at) else None

    async def page(
        self, owner: str, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[File], bool]:
        """Up to `limit` files beyond the one named `after`, and whether there are more."""
        names = await self._objects.names(f"{owner_folder(owner)}/files")
        found: list[File] = []
        files = documents(ordered(names, after, newest_first), lambda name: self.get(owner, name))
        async with contextlib.aclosing(files):
            async for file in files:
                if purpose is None or file.purpose == purpose:
                    if len(found) == limit:
                        return found, True
                    found.append(file)
        return found, False

    async def read(self, file: File) -> AsyncGenerator[bytes, None]:
        """A file's bytes."""
        for piece in file.pieces:
            async with contextlib.aclosing(self._objects.read(piece.key)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def delete(self, file: File) -> None:
        """Remove a file: the document first, so that a file that is there is whole."""
        await self._objects.delete([_document(file.owner, file.id)])
        await self._objects.delete([piece.key for piece in file.pieces])

    # -- pieces of a batch --------------------------------------------------------------------------------------------

    async def put_piece(self, owner: str, batch: str, name: str, data: bytes) -> Piece:
        """Write a part of a file that will be made of a batch's results."""
        key = f"{_pieces(owner, batch)}/{name}"
        await self._objects.put(key, data)
        return Piece(key, len(data))

    async def delete_other_pieces(self, owner: str, batch: str, known: Sequence[Piece]) -> None:
        """Remove what was written for a batch and never counted: its writer was killed, or had lost its lease."""
        keep = {piece.key for piece in known}
        folder = _pieces(owner, batch)
        keys = [f"{folder}/{name}" for name in await self._objects.names(folder)]
        await self._objects.delete([key for key in keys if key not in keep])

    # -- housekeeping -------------------------------------------------------------------------------------------------

    async def sweep(self, folder: str, in_use: frozenset[str]) -> None:
        """Remove an owner's files whose time is over, and contents of uploads that never became files."""
        now = self._now()
        documents = await self._objects.names(f"{folder}/files")
        for name in documents:
            stored = await self._objects.get(f"{folder}/files/{name}")
            if stored is None:
                continue
            file = _decoder.decode(stored.data)
            if file.expires_at <= now and name not in in_use:
                await self.delete(file)
        a_day_ago = new_id("file", now - DAY_S)
        contents = await self._objects.names(f"{folder}/contents")
        lost = sorted(set(contents) - set(documents))
        await self._objects.delete([f"{folder}/contents/{name}" for name in lost if name < a_day_ago])


def _document(owner: str, name: str) -> str:
    return f"{owner_folder(owner)}/files/{name}"


def _pieces(owner: str, batch: str) -> str:
    return f"{owner_folder(owner)}/pieces/{batch}"
