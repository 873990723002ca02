"""What files and batches rely on, of a directory and of a server that speaks S3 (moto's, a process of its own)."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from embedq_gateway.batches.storage import (
    Objects,
    StorageAddress,
    StorageError,
    StorageUnfit,
    prepare,
    s3,
    storage_at,
)
from embedq_gateway.batches.storage.directory import DirectoryObjects
from tests.helpers.s3_server import BUCKET, s3_server


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    with s3_server() as environ:
        yield environ


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "directory":
        return str(tmp_path / "files")
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
async def storage(place: str) -> AsyncIterator[Objects]:
    storage = storage_at(StorageAddress.of(place))
    await prepare(storage, "test")
    yield storage
    await storage.close()


async def whole(storage: Objects, key: str) -> bytes:
    return b"".join([chunk async for chunk in storage.read(key)])


async def test_an_object_is_read_as_it_was_written(storage: Objects) -> None:
    await storage.put("a/b/c", b"one")
    stored = await storage.get("a/b/c")
    assert stored is not None
    assert stored.data == b"one" == await whole(storage, "a/b/c")
    await storage.put("a/b/c", b"two")
    changed = await storage.get("a/b/c")
    assert changed is not None
    assert changed.data == b"two"
    assert changed.version != stored.version


async def test_what_is_not_there_is_none_and_cannot_be_read(storage: Objects) -> None:
    assert await storage.get("a/b") is None
    assert await storage.names("a") == []
    await storage.delete(["a/b"])
    with pytest.raises(StorageError):
        await whole(storage, "a/b")


async def test_of_many_who_create_an_object_one_does(storage: Objects) -> None:
    created = await asyncio.gather(*(storage.create("a/b", b"%d" % n) for n in range(12)))
    assert created.count(True) == 1
    stored = await storage.get("a/b")
    assert stored is not None
    assert stored.data == b"%d" % created.index(True)


async def test_changes_that_many_make_at_once_are_all_there(storage: Objects) -> None:
    await storage.put("counter", b"0")

    async def add() -> None:
        while True:
            stored = await storage.get("counter")
            assert stored is not None
            if await storage.replace("counter", b"%d" % (int(stored.data) + 1), stored.version):
                return

    await asyncio.gather(*(add() for _ in range(6)))
    stored = await storage.get("counter")
    assert stored is not None
    assert stored.data == b"6"


async def test_what_is_gone_is_not_replaced(storage: Objects) -> None:
    await storage.put("a", b"1")
    stored = await storage.get("a")
    assert stored is not None
    await storage.delete(["a"])
    assert not await storage.replace("a", b"2", stored.version)
    assert await storage.get("a") is None


async def test_names_are_those_directly_below_a_folder(storage: Objects) -> None:
    for key in ("x/b", "x/a", "x/c/d", "x/c/e", "xy/z", "y"):
        await storage.put(key, b"")
    assert await storage.names("x") == ["a", "b", "c"]
    assert await storage.names("x/c") == ["d", "e"]
    await storage.delete(["x/c/d", "x/c/e", "x/a"])
    assert await storage.names("x") == ["b"]


@pytest.mark.parametrize("size", [0, 1, s3.PART_BYTES, 2 * s3.PART_BYTES + 3])
async def test_a_large_object_is_written_in_parts(storage: Objects, size: int) -> None:
    content = os.urandom(size)
    async with storage.writing("x/large") as writer:
        for start in range(0, size, 1 << 20):
            await writer.write(content[start : start + (1 << 20)])
        assert await storage.names("x") == []  # not before it is whole
    assert await whole(storage, "x/large") == content


async def test_an_interrupted_object_is_not_there(storage: Objects) -> None:
    async def write() -> None:
        async with storage.writing("x/large") as writer:
            await writer.write(bytes(s3.PART_BYTES + 1))
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        await write()
    assert await storage.get("x/large") is None
    assert await storage.names("x") == []


# -- a storage without conditions -------------------------------------------------------------------------------------


class Heedless(DirectoryObjects):
    """Overwrites whatever the condition says."""

    async def create(self, key: str, data: bytes) -> bool:
        await self.put(key, data)
        return True


async def test_a_storage_that_heeds_no_conditions_is_refused(tmp_path: Path) -> None:
    heedless = Heedless(tmp_path)
    with pytest.raises(StorageUnfit, match="If-None-Match"):
        await prepare(heedless, "test")
    assert await heedless.names("probe") == []


# -- a directory ------------------------------------------------------------------------------------------------------


async def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot open in the directory .*file"):
        await prepare(DirectoryObjects(tmp_path / "file"), "test")


@pytest.mark.parametrize("turns", range(4))
async def test_a_reader_that_is_cancelled_at_any_moment_leaves_no_file_open(
    tmp_path: Path, turns: int
) -> None:
    storage = DirectoryObjects(tmp_path)
    await storage.open()
    await storage.put("folder/name", b"data" * 1000)
    busy = BusyThread()
    asyncio.get_running_loop().set_default_executor(busy.threads)
    reading = asyncio.create_task(whole(storage, "folder/name"))
    for _ in range(turns):
        await busy.take_a_turn()
    for _ in range(2):  # the second time while it closes what it has opened
        reading.cancel()
        await several_turns_of_the_loop()
    busy.stop()
    await asyncio.wait({reading})
    await asyncio.to_thread(lambda: None)
    assert open_files(tmp_path) == []


def open_files(folder: Path) -> list[Path]:
    """Those of this process below a folder."""
    found = []
    for number in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(number.readlink())
    return [path for path in found if path.is_relative_to(folder)]


async def several_turns_of_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class BusyThread:
    """One thread, which begins what waits for it when it is told to."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(1)
        self._stopped = threading.Event()
        self._turns = threading.Semaphore(0)
        self._block()

    async def take_a_turn(self) -> None:
        """Do what waits, and nothing that comes after it."""
        await several_turns_of_the_loop()
        begun = self._block()
        self._turns.release()
        while not begun.is_set():  # noqa: ASYNC110  # a thread sets it
            await asyncio.sleep(0)
        await several_turns_of_the_loop()

    def stop(self) -> None:
        """Do whatever comes at once from now on."""
        self._stopped.set()
        self._turns.release()

    def _block(self) -> threading.Event:
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            if not self._stopped.is_set():
                self._turns.acquire()

        self.threads.submit(wait)
        return begun


async def test_what_a_killed_process_left_aside_goes_after_a_day(tmp_path: Path) -> None:
    storage = DirectoryObjects(tmp_path)
    await storage.open()
    old, new = (tmp_path / ".aside" / name for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    await storage.open()
    assert not old.exists()
    assert new.exists()


async def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DirectoryObjects(tmp_path)
    await storage.open()
    await storage.put("a", b"1")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        await storage.put("a", b"2")
    monkeypatch.undo()
    assert await whole(storage, "a") == b"1"
    assert list((tmp_path / ".aside").iterdir()) == []


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "bucket", "prefix"),
    [("s3://b", "b", ""), ("s3://b/", "b", ""), ("s3://my-bucket/some/where/", "my-bucket", "some/where")],
)
def test_a_bucket_and_what_its_keys_begin_with(setting: str, bucket: str, prefix: str) -> None:
    assert StorageAddress.of(setting) == StorageAddress(bucket=bucket, prefix=prefix)


def test_anything_else_is_a_directory(tmp_path: Path) -> None:
    assert StorageAddress.of(str(tmp_path)) == StorageAddress(directory=tmp_path)


@pytest.mark.parametrize("setting", ["s3://", "s3:///x", "gs://b", "http://b/c", "s3://b/c?x=1"])
def test_other_addresses_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET"):
        StorageAddress.of(setting)
