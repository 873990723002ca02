"""Where a user's cache lies."""

from __future__ import annotations

from pathlib import Path

from embedq_shared.user_cache import user_cache


def test_the_cache_is_below_the_directory_that_the_user_chose() -> None:
    assert user_cache({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/embedq")


def test_without_a_choice_or_with_a_relative_one_it_is_below_the_home_directory() -> None:
    usual = Path.home() / ".cache" / "embedq"

    assert user_cache({}) == user_cache({"XDG_CACHE_HOME": ""}) == usual
    assert user_cache({"XDG_CACHE_HOME": "here"}) == usual
