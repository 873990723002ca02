"""Where compiled GPU code is cached for the next start. Imports nothing heavy, and must run before anything that does."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from embedq_shared.user_cache import user_cache

__all__ = ["default_directory", "enable"]

_FOLDERS: Final = {
    "TRITON_CACHE_DIR": "triton",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attn",
    "CUTE_DSL_CACHE_DIR": "cute",
    "QUACK_CACHE_DIR": "quack",
    "CUDA_CACHE_PATH": "cuda",
}
"""Each library's environment variable, and its folder."""
_ON: Final = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""flash-attn-4 caches nothing without this."""


def default_directory(environ: MutableMapping[str, str]) -> Path:
    """`compiled` in the user's cache directory.

    Raises:
        RuntimeError: there is no home directory.
    """
    return user_cache(environ) / "compiled"


def enable(directory: Path, environ: MutableMapping[str, str]) -> None:
    """Point every library's cache below `directory`; variables that are set already stay as they are.

    A directory made here is readable by this user alone, since its contents are loaded as code; one that exists keeps its
    permissions.

    Raises:
        OSError: the directory cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, folder in _FOLDERS.items():
        environ.setdefault(name, str(directory / folder))
    environ.setdefault(_ON, "1")
