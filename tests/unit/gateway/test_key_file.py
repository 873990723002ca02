"""The file of keys: what it takes, how it is changed, and that no key is ever in it."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from embedq_gateway.keys.key_file import (
    KeyEntry,
    KeyFileError,
    add_key,
    hash_of,
    new_key,
    read_keys,
    remove_key,
)


def entry(name: str, key: str = "k") -> KeyEntry:
    return KeyEntry(name=name, hash=hash_of(key + name))


def test_what_is_added_is_read_and_what_is_removed_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    one = KeyEntry(
        name="search",
        hash=hash_of("a"),
        scopes=("embed", "admin"),
        aliases=("default", "small"),
        lane="bulk",
        tokens_per_minute=1000,
        in_flight=8,
    )
    add_key(path, one)
    add_key(path, entry("other"))
    assert read_keys(path) == [one, entry("other")]
    remove_key(path, "search")
    assert read_keys(path) == [entry("other")]


def test_the_file_is_for_people_too_and_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = new_key()
    add_key(path, KeyEntry(name="search", hash=hash_of(key)))
    assert path.read_text() == (
        f'{{\n  "keys": [\n    {{\n      "name": "search",\n      "hash": "{hash_of(key)}"\n    }}\n  ]\n}}\n'
    )
    assert key.reveal() not in path.read_text()


def test_keys_are_long_random_and_begin_alike() -> None:
    keys = {new_key().reveal() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("embedq-") and len(key) == 50 for key in keys)


def test_a_new_file_is_its_owners_alone_and_one_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, entry("one"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    add_key(path, entry("two"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to(real / "keys.json")
    add_key(link, entry("one"))
    assert link.is_symlink()
    assert read_keys(real / "keys.json") == [entry("one")]


def test_commands_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_key, args=(path, entry(f"k{i}"))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.name for each in read_keys(path)} == {f"k{i}" for i in range(16)}
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, entry("one"))
    with pytest.raises(KeyFileError, match="has a key named one"):
        add_key(path, entry("one", "another"))
    with pytest.raises(KeyFileError, match="has no key named two"):
        remove_key(path, "two")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no file of keys"),
        (b"[]", "Expected `object`"),
        (b'{"keys": [{"name": "a"}]}', "missing required field `hash`"),
        (b'{"keys": [{"name": "a", "hash": "sha256:00"}]}', r"\$\.keys\[0\]\.hash"),
        (b'{"keys": [], "key": []}', "unknown field `key`"),
        (b"\xff\xfe", "no file of keys"),
        (b"[" * 100_000, "no file of keys"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=why) as refused:
        read_keys(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "field",
    [
        {"scopes": ["write"]},
        {"aliases": []},
        {"lane": "fast"},
        {"tokens_per_minute": 0},
        {"in_flight": -1},
        {"name": "with blank"},
        {"name": "x" * 65},
        {"token_per_minute": 5},
    ],
)
def test_a_field_that_is_wrong_or_mistyped_is_refused(tmp_path: Path, field: dict[str, object]) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "a", "hash": hash_of("a")} | field]}))
    with pytest.raises(KeyFileError, match="no file of keys"):
        read_keys(path)


@pytest.mark.parametrize("twice", ["name", "hash"])
def test_a_name_or_a_key_that_is_there_twice_is_refused_and_hashes_are_not_shown(
    tmp_path: Path, twice: str
) -> None:
    path = tmp_path / "keys.json"
    keys = [{"name": "a", "hash": hash_of("a")}, {"name": "b", "hash": hash_of("b")}]
    keys[1][twice] = keys[0][twice]
    path.write_text(json.dumps({"keys": keys}))
    with pytest.raises(KeyFileError, match=f"expected each {twice} once") as refused:
        read_keys(path)
    assert "sha256" not in str(refused.value)


def test_a_key_that_was_pasted_where_its_hash_belongs_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = new_key().reveal()
    path.write_text(json.dumps({"keys": [{"name": "a", "hash": key}]}))
    with pytest.raises(KeyFileError) as refused:
        read_keys(path)
    assert key not in str(refused.value)


def test_a_file_that_is_not_there_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(KeyFileError, match="cannot be opened"):
        add_key(tmp_path / "no" / "folder", entry("a"))
    path = tmp_path / "long"
    path.write_bytes(b" " * (8 * 1024 * 1024 + 1))
    with pytest.raises(KeyFileError, match="longer than"):
        read_keys(path)
