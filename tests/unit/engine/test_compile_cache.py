"""Compiled GPU code is kept between starts, each library's in its own folder."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from embedq_consumer.engine.loading import compile_cache


def test_every_library_gets_a_folder_and_is_told_to_keep(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    compile_cache.enable(tmp_path / "kept", environ)
    assert environ["TRITON_CACHE_DIR"] == str(tmp_path / "kept" / "triton")
    assert environ.pop("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED") == "1"
    assert len(set(environ.values())) == len(environ)
    assert all(Path(folder).parent == tmp_path / "kept" for folder in environ.values())


def test_what_is_set_already_stays(tmp_path: Path) -> None:
    environ = {"TRITON_CACHE_DIR": "/elsewhere", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}
    compile_cache.enable(tmp_path, environ)
    assert environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "0"


def test_nobody_else_may_write_what_is_loaded_as_code(tmp_path: Path) -> None:
    compile_cache.enable(tmp_path / "kept", {})
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700


def test_it_lies_where_the_users_caches_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert compile_cache.default_directory({}) == Path("/home/someone/.cache/embedq/compiled")
    assert compile_cache.default_directory({"XDG_CACHE_HOME": "/caches"}) == Path("/caches/embedq/compiled")


def test_a_place_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        compile_cache.enable(tmp_path / "file" / "kept", {})
