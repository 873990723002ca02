"""The secret that signs cache entries: given, read, or made once for all who come at once."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedq_consumer.cache.secret import BadCacheSetting, Secret, SecretSource, load_secret

LONG = "0123456789abcdef"


def test_the_setting_counts_before_the_file_of_our_own(tmp_path: Path) -> None:
    found = load_secret(SecretSource(text=LONG, kept=tmp_path / "key"))
    assert (found.value, found.origin) == (LONG.encode(), "setting")
    assert not list(tmp_path.iterdir())


def test_a_file_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text(f"{LONG}\n")
    found = load_secret(SecretSource(path=str(tmp_path / "mounted")))
    assert (found.value, found.origin, found.path) == (LONG.encode(), "file", tmp_path / "mounted")


def test_one_is_made_for_its_owner_alone_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "key"
    made, again = (load_secret(SecretSource(kept=path)) for _ in range(2))
    assert made == again
    assert (made.origin, len(made.value)) == ("kept", 64)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_replicas_that_start_at_once_agree_on_one(tmp_path: Path) -> None:
    for n in range(20):
        with ThreadPoolExecutor(8) as pool:
            source = SecretSource(kept=tmp_path / f"key {n}")
            found = set(pool.map(lambda _, source=source: load_secret(source).value, range(8)))
        assert len(found) == 1
    assert len(list(tmp_path.iterdir())) == 20


def test_one_that_cannot_be_kept_is_this_processs_own(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "short").write_text("short")
    os.mkfifo(tmp_path / "pipe")
    for kept in (None, tmp_path / "a file" / "key", tmp_path / "short", tmp_path / "pipe", tmp_path):
        one, other = (load_secret(SecretSource(kept=kept)) for _ in range(2))
        assert one.origin == "process"
        assert one.value != other.value


def test_what_is_too_short_is_refused_by_the_settings_name(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(BadCacheSetting, match=r"^CACHE_KEY: expected at least 16 bytes"):
        load_secret(SecretSource(text=LONG[:15]))
    with pytest.raises(BadCacheSetting, match=r"^CACHE_KEY_FILE: expected at least 16 bytes"):
        load_secret(SecretSource(path=str(tmp_path / "empty")))


def test_a_file_that_is_none_or_never_ends_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 5000)
    for path, reason in {
        "none": "No such file",
        "pipe": "not a regular file",
        "large": "more than 4096 bytes",
        "/dev/zero": "not a regular file",
        ".": "directory|regular",
    }.items():
        with pytest.raises(BadCacheSetting, match=f"^CACHE_KEY_FILE: .*({reason})"):
            load_secret(SecretSource(path=str(tmp_path / path)))


def test_no_repr_shows_it(tmp_path: Path) -> None:
    assert LONG not in repr(SecretSource(text=LONG))
    assert LONG not in repr(Secret(LONG.encode(), "setting"))
