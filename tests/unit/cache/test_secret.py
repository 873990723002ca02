"""The secret that signs cache entries: given, or made once for all who come at once."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedq_consumer.cache.secret import BadCacheSetting, CacheSecret, SecretSource, load_secret

LONG = "0123456789abcdef"


def test_the_setting_counts_before_the_file_of_our_own(tmp_path: Path) -> None:
    found = load_secret(SecretSource(text=LONG, kept=tmp_path / "key"))
    assert (found.value, found.origin) == (LONG.encode(), "setting")
    assert not list(tmp_path.iterdir())


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
    (tmp_path / "large").write_bytes(b"x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "a file/key", "short", "large", "pipe", "."):
        kept = None if name == "none" else tmp_path / name
        one, other = (load_secret(SecretSource(kept=kept)) for _ in range(2))
        assert one.origin == "process"
        assert one.value != other.value


def test_what_is_too_short_is_refused_by_the_settings_name() -> None:
    with pytest.raises(BadCacheSetting, match=r"^CACHE_KEY: expected at least 16 bytes"):
        load_secret(SecretSource(text=LONG[:15]))


def test_no_repr_shows_it(tmp_path: Path) -> None:
    assert LONG not in repr(SecretSource(text=LONG))
    assert LONG not in repr(CacheSecret(LONG.encode(), "setting"))
