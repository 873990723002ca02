"""Panics of native libraries. Rust's reach Python as `pyo3_runtime.PanicException`, which is no `Exception` and so escapes
every ordinary guard: here they become one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Panic", "first_line", "panics_caught"]


class Panic(Exception):
    """A native library gave up on what it was given; the message is its own."""


@contextmanager
def panics_caught() -> Iterator[None]:
    """Around every call of a library that is written in Rust: tokenizers, safetensors, and transformers, which calls both.

    Raises:
        Panic: in place of a panic. Everything else passes unchanged.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        # The class lives in each library that was built with pyo3, and can be imported from none.
        if type(error).__name__ != "PanicException":
            raise
        raise Panic(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().partition("\n")[0][:500] or type(error).__name__
