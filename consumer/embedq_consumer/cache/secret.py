"""The secret that signs cache entries: from a setting, from a file, or made once and kept in a file.

Replicas that share a Redis must share it, or each takes the others' entries for foreign ones. It never comes from Redis:
whoever can write there could replace it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Final, Literal

import msgspec

LEAST_BYTES: Final = 16
"""Fewer can be found by trying: whoever reads Redis can try as fast as a machine computes hashes."""
_MOST_BYTES: Final = 4096
"""Of a file: a key is a line, and a path that was mistyped may name anything."""
_MADE_BYTES: Final = 32

Origin = Literal["setting", "file", "kept", "process"]
"""Where a secret came from: `kept` is a file of our own making, `process` means that it could not be kept."""


class SecretSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where to look, in this order: `text`, the file at `path`, the file `kept`, which is made if it is not there."""

    text: str = ""
    path: str = ""
    kept: Path | None = None

    def __repr__(self) -> str:
        return f"SecretSource(path={self.path!r}, kept={self.kept!r})"


class Secret(msgspec.Struct, frozen=True):
    """The bytes, and where they came from; for `file` and `kept`, which file."""

    value: bytes
    origin: Origin
    path: Path | None = None

    def __repr__(self) -> str:
        return f"Secret(origin={self.origin!r}, path={self.path!r})"


class BadCacheSetting(Exception):
    """A setting of the cache cannot be used. The message names it without its prefix, and never quotes a secret."""


def load_secret(source: SecretSource) -> Secret:
    """The secret, made where none is given. Blocks on the file system.

    Raises:
        BadCacheSetting: the setting or its file holds nothing usable. A secret that cannot be kept is no error.
    """
    if source.text:
        return Secret(_usable(source.text.encode(), "CACHE_KEY"), "setting")
    if source.path:
        try:
            found = read_small_file(source.path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadCacheSetting(
                f"CACHE_KEY_FILE: expected a readable file, {source.path}: {reason}"
            ) from None
        return Secret(_usable(found.strip(), "CACHE_KEY_FILE"), "file", Path(source.path))
    made = secrets.token_hex(_MADE_BYTES).encode()
    if source.kept is not None:
        with contextlib.suppress(OSError, ValueError):
            return Secret(_kept(source.kept, made), "kept", source.kept)
    return Secret(made, "process")


def _usable(value: bytes, name: str) -> bytes:
    if len(value) < LEAST_BYTES:
        raise BadCacheSetting(
            f"{name}: expected at least {LEAST_BYTES} bytes, such as `openssl rand -hex 32` prints, got {len(value)}"
        )
    return value


def _kept(path: Path, made: bytes) -> bytes:
    """What the file holds, which is `made` if it was not there. Processes that come at once agree on one.

    Raises:
        OSError, ValueError: it cannot be read or written, or holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(made + b"\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)  # appears complete or not at all, and never replaces another one's
        finally:
            os.unlink(name)
    found = read_small_file(path).strip()
    if len(found) < LEAST_BYTES:
        raise ValueError("too short")
    return found


def read_small_file(path: str | Path) -> bytes:
    """A regular file of a few kilobytes. A pipe or a device is not waited for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or too large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        found = file.read(_MOST_BYTES + 1)
    if len(found) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    return found
