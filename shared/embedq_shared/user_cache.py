"""The user's cache directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def user_cache(environ: Mapping[str, str]) -> Path:
    """`embedq` in XDG_CACHE_HOME, else in `~/.cache`. A relative XDG_CACHE_HOME is ignored, as its specification asks.

    Raises:
        RuntimeError: there is no home directory.
    """
    xdg = environ.get("XDG_CACHE_HOME")
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "embedq"
