"""Where compiled GPU code is kept, so that the next start finds it. Imports nothing heavy, and must run before what does."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

__all__ = ["default_directory", "keep_compiled"]

_PLACES: Final = {
    "TRITON_CACHE_DIR": "triton",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attn",
    "CUTE_DSL_CACHE_DIR": "cute",
    "QUACK_CACHE_DIR": "quack",
    "CUDA_CACHE_PATH": "cuda",
}
"""Each library's own variable, and the folder that it gets."""
_ON: Final = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""flash-attn-4 keeps nothing unless told to."""


def default_directory(environ: MutableMapping[str, str]) -> Path:
    """`embedq/compiled` in XDG_CACHE_HOME, else in `~/.cache`."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "embedq" / "compiled"


def keep_compiled(directory: Path, environ: MutableMapping[str, str]) -> None:
    """Point every library's cache below `directory`; what is set already stays as it is.

    A directory that is made here is this user's alone, since what lies there is loaded as code; one that is there
    already keeps its permissions.

    Raises:
        OSError: it cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, folder in _PLACES.items():
        environ.setdefault(name, str(directory / folder))
    environ.setdefault(_ON, "1")
