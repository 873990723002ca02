"""Objects as files below a directory, which several processes, and machines with a shared file system, may use at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from embedq_gateway.batches.storage.objects import READ_CHUNK_BYTES, StorageError, Stored, version_of

_ASIDE: Final = ".aside"
"""The folder in which objects are written before they are renamed: on the same file system, and never listed."""
_LOCK: Final = ".lock"
_ABANDONED_AFTER_S: Final = 24 * 3600.0
"""A file aside is in use for as long as an upload takes, and no upload takes a day."""

Answer = TypeVar("Answer")


class DirectoryObjects:
    """A directory of files, each written aside, forced to the disk and renamed.

    `replace` and `delete` hold a lock of the whole directory (flock, which NFS from version 4 on knows too) while they compare
    and rename; `create` is a hard link, which is atomic by itself.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    async def open(self) -> None:
        """Make the directory, and remove what killed processes left aside.

        Raises:
            StorageError.
        """
        await self._do("open", self._open)

    async def get(self, key: str) -> Stored | None:
        """See `Objects`."""
        data = await self._do("read", lambda: _read_whole(self._path(key)))
        return None if data is None else Stored(data, version_of(data))

    async def put(self, key: str, data: bytes) -> None:
        """See `Objects`."""
        await self._do("write", lambda: self._publish(self._aside(data), key))

    async def create(self, key: str, data: bytes) -> bool:
        """See `Objects`."""
        return await self._do("write", lambda: self._create(key, data))

    async def replace(self, key: str, data: bytes, version: str) -> bool:
        """See `Objects`."""
        return await self._do("write", lambda: self._replace(key, data, version))

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Objects`."""
        if keys:
            await self._do("delete", lambda: self._delete(keys))

    async def names(self, folder: str) -> list[str]:
        """See `Objects`."""
        return await self._do("list", lambda: _names(self._path(folder)))

    async def read(self, key: str) -> AsyncGenerator[bytes, None]:
        """See `Objects`."""
        file = await self._opened("read", lambda: open(self._path(key), "rb"), lambda file: file.close())  # noqa: SIM115 - closed below, in a thread
        try:
            while chunk := await self._do("read", lambda: file.read(READ_CHUNK_BYTES)):
                yield chunk
        finally:
            await _in_any_case(file.close)

    @contextlib.asynccontextmanager
    async def writing(self, key: str) -> AsyncIterator[_FileWriter]:
        """See `Objects`."""
        path = self._new_aside()
        file = await self._opened("write", lambda: open(path, "xb"), partial(_discard, path))  # noqa: SIM115 - closed below, in a thread
        try:
            yield _FileWriter(file, self._do)
            await self._do("write", lambda: _force(file))
            await self._do("write", lambda: self._publish(path, key))
        except BaseException:
            await _in_any_case(partial(_discard, path, file))
            raise
        await self._do("write", file.close)

    async def close(self) -> None:
        """Nothing is held."""

    # -- in threads ---------------------------------------------------------------------------------------------------

    async def _opened(
        self, what: str, work: Callable[[], BinaryIO], let_go: Callable[[BinaryIO], object]
    ) -> BinaryIO:
        """What `work` opens. A thread cannot be called back: if nobody waits any more, `let_go` gets the file when it is open."""
        opening = _Opening(work, let_go)
        try:
            return await self._do(what, opening)
        except asyncio.CancelledError:
            _in_any_case(opening.abandon)
            raise

    async def _do(self, what: str, work: Callable[[], Answer]) -> Answer:
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            raise StorageError(
                f"cannot {what} in the directory {self._root}: {error.strerror or error}"
            ) from error

    def _path(self, key: str) -> Path:
        return self._root / key

    def _open(self) -> None:
        (self._root / _ASIDE).mkdir(parents=True, exist_ok=True)
        (self._root / _LOCK).touch()
        old = time.time() - _ABANDONED_AFTER_S
        for path in (self._root / _ASIDE).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another gateway starts at the same time
                if path.stat().st_mtime < old:
                    path.unlink()

    def _new_aside(self) -> Path:
        return self._root / _ASIDE / uuid.uuid4().hex

    def _aside(self, data: bytes) -> Path:
        path = self._new_aside()
        try:
            with open(path, "xb") as file:
                file.write(data)
                _force(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _publish(self, aside: Path, key: str) -> None:
        path = self._path(key)
        self._in_folder(path, lambda: os.replace(aside, path))

    def _create(self, key: str, data: bytes) -> bool:
        path, aside = self._path(key), self._aside(data)
        try:
            self._in_folder(path, lambda: os.link(aside, path))
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _replace(self, key: str, data: bytes, version: str) -> bool:
        aside = self._aside(data)  # before the lock, since forcing it to the disk takes long
        try:
            with self._locked():
                now = _read_whole(self._path(key))
                if now is None or version_of(now) != version:
                    return False
                self._publish(aside, key)
                return True
        finally:
            aside.unlink(missing_ok=True)

    def _delete(self, keys: Sequence[str]) -> None:
        with self._locked():
            for key in keys:
                path = self._path(key)
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it holds others, or is gone
                    path.parent.rmdir()

    def _in_folder(self, path: Path, work: Callable[[], None]) -> None:
        """Do it once the folder is there, which another gateway's `delete` may remove in between, and force both to the disk."""
        while True:
            made = self._make(path.parent)
            try:
                work()
            except FileNotFoundError:
                if path.parent.exists():
                    raise
                continue
            for folder in (path.parent, *made):
                _force_folder(folder)
            return

    def _make(self, folder: Path) -> list[Path]:
        """Make a folder; the folders in which something was made."""
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        return [each.parent for each in missing]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._root / _LOCK, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _in_any_case(work: Callable[[], object]) -> Awaitable[object]:
    """Do it in a thread, even when whoever waits for it is cancelled: before its turn has come, that would take it back."""
    return asyncio.shield(asyncio.get_running_loop().run_in_executor(None, work))


class _Opening:
    """A file that one thread opens for a task. If the task is gone by then, whichever of the two is later lets go of it."""

    def __init__(self, work: Callable[[], BinaryIO], let_go: Callable[[BinaryIO], object]) -> None:
        self._work = work
        self._let_go = let_go
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._wanted = True

    def __call__(self) -> BinaryIO:
        file = self._work()
        with self._lock:
            self._file = file
            if self._wanted:
                return file
        self._let_go(file)
        return file

    def abandon(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._wanted = False
            file = self._file
        if file is not None:
            self._let_go(file)


class _FileWriter:
    def __init__(self, file: BinaryIO, do: Callable[[str, Callable[[], int]], Awaitable[int]]) -> None:
        self._file = file
        self._do = do

    async def write(self, data: bytes) -> None:
        """See `ObjectWriter`."""
        await self._do("write", lambda: self._file.write(data))


def _discard(path: Path, file: BinaryIO) -> None:
    """Forget a file that is not whole."""
    with contextlib.suppress(OSError):  # what is buffered may not find room, and is not wanted
        file.close()
    path.unlink(missing_ok=True)


def _read_whole(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        return []


def _force(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _force_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
