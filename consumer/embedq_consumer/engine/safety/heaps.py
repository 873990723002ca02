"""What glibc's malloc keeps of the memory that was freed. Another C library's allocator is left as it is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["give_back", "is_tuned", "keep_for_reuse", "keep_little"]

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
"""Parameters of `mallopt`."""
_LARGEST_IN_A_HEAP: Final = 32 << 20
"""Bytes. What is larger has pages of its own, which go when it is freed; activations are smaller. glibc comes to this by itself, but
not any more once one of its parameters was set."""
_KEPT_FOR_REUSE: Final = 64 << 20
"""The same at the end of each heap: what glibc comes to, and as large as a heap of any thread but the first can be."""
_KEPT_WHILE_MODELS_CHANGE: Final = 128 << 10


def keep_little() -> None:
    """From now on what is freed at the end of a thread's heap goes to the system at once.

    `give_back` does not reach it there, each load has threads of its own, and nobody knows which heaps the next ones will have.
    """
    _keep(_KEPT_WHILE_MODELS_CHANGE)


def keep_for_reuse() -> None:
    """From now on a thread keeps what it has freed: the next micro-batch's activations need no new pages."""
    _keep(_KEPT_FOR_REUSE)


def give_back() -> None:
    """Hand to the system what was freed and is kept within the heaps of all threads. Takes a few milliseconds."""
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


def is_tuned(environ: Mapping[str, str]) -> bool:
    """Whether an operator has set these parameters, who then has the last word."""
    ours = ("trim_threshold", "mmap_threshold")
    tunables = environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in environ or f"malloc.{name}=" in tunables for name in ours)


def _keep(size: int) -> None:
    if (tune := _function("mallopt")) is not None and not is_tuned(os.environ):
        tune(_MMAP_THRESHOLD, _LARGEST_IN_A_HEAP)
        tune(_TRIM_THRESHOLD, size)


def _function(name: str) -> Any:
    """A function of the C library; None where it has none of this name, or is not glibc."""
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
