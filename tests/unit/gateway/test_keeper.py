"""The file of keys is followed: a change is in force, a broken one is told of and changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from embedq_gateway.keys import keeper as keeper_module
from embedq_gateway.keys.keeper import KeyKeeper
from embedq_gateway.keys.key_file import KeyEntry, KeyFileError, add_key, hash_of, remove_key
from tests.helpers.support import wait_until


def keep(path: Path) -> tuple[KeyKeeper, list[str]]:
    told: list[str] = []
    return KeyKeeper(path, told=told.append), told


def look(keeper: KeyKeeper) -> None:
    found = keeper.look()
    if found is not None:
        keeper.take(found)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.json"
    add_key(found, KeyEntry(name="one", hash=hash_of("1")))
    return found


def test_a_file_that_does_not_change_is_not_read_again(path: Path) -> None:
    keeper, told = keep(path)
    look(keeper)
    assert (keeper.door.names, told) == (["one"], [])


def test_keys_come_and_go_with_the_file(path: Path) -> None:
    keeper, told = keep(path)
    add_key(path, KeyEntry(name="two", hash=hash_of("2")))
    look(keeper)
    assert keeper.door.names == ["one", "two"]
    remove_key(path, "one")
    look(keeper)
    assert keeper.door.names == ["two"]
    assert told == ["ok", "ok"]


@pytest.mark.parametrize("breaks", ["", '{"keys": [{"name": "x"}]}'])
def test_a_broken_file_keeps_the_old_keys_and_says_so(
    path: Path, breaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    keeper, told = keep(path)
    path.write_text(breaks)
    look(keeper)
    look(keeper)
    assert keeper.door.names == ["one"]
    assert keeper.fault is not None
    assert str(path) in keeper.fault
    assert told == ["refused"], "once for each change"
    assert [record.message for record in caplog.records] == ["key_file_refused"]


def test_a_file_that_is_gone_keeps_the_old_keys_and_one_that_is_mended_is_taken(path: Path) -> None:
    keeper, told = keep(path)
    path.unlink()
    look(keeper)
    assert keeper.door.names == ["one"]
    assert "No such file" in (keeper.fault or "")
    add_key(path, KeyEntry(name="two", hash=hash_of("2")))
    look(keeper)
    assert keeper.door.names == ["two"]
    assert keeper.fault is None
    assert told == ["refused", "ok"]


def test_there_is_nothing_to_begin_with_where_the_file_is_broken(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError):
        KeyKeeper(tmp_path / "none")


async def test_the_file_is_looked_at_while_the_gateway_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_LOOK_S", 0.01)
    keeper, _ = await asyncio.to_thread(keep, path)
    following = asyncio.create_task(keeper.follow())
    await asyncio.to_thread(add_key, path, KeyEntry(name="two", hash=hash_of("2")))
    await wait_until(lambda: keeper.door.names == ["one", "two"], what="the second key")
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
