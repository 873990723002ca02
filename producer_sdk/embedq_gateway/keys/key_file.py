"""The file of API keys: who may do what, and how much. It holds hashes; a key itself is shown once, when it is made."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from embedq_shared.secret import Secret
from embedq_shared.topics import Lane

Scope = Literal["embed", "admin", "metrics"]

_PREFIX: Final = "embedq-"
"""Programs that look for secrets in repositories recognize a key by how it begins."""
_KEY_BYTES: Final = 32
"""Random ones. So long a secret needs no slow hash: nobody tries out 2^256 of them."""
_MOST_BYTES: Final = 8 * 1024 * 1024
"""Of a file: some twenty thousand keys."""
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_NEW_FILE_MODE: Final = 0o600

Positive = Annotated[int, Meta(ge=1, le=10**15)]


class KeyFileError(Exception):
    """The file of keys cannot be used; the message names the file, and what is wrong with it. It holds no key."""


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key: its hash, and what whoever sends it may do."""

    name: Annotated[str, Meta(pattern=_NAME)]
    """Shown in metrics and logs, so no secret; each name is there once."""
    hash: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = ("embed",)
    """embed: vectors and models. admin: status, reloads, metrics. metrics: the metrics page alone."""
    aliases: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    """Models that it may use; null: all."""
    lane: Lane | None = None
    """The only lane of its jobs; null: either."""
    tokens_per_minute: Positive | None = None
    """null: no limit."""
    in_flight: Positive | None = None
    """Requests at once; null: no limit."""


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[KeyEntry]


def new_key() -> Secret:
    """A key that nobody has."""
    return Secret(f"{_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}")


def digest_of(key: str) -> bytes:
    """What the file keeps of a key."""
    return hashlib.sha256("".join(key).encode(errors="surrogateescape")).digest()


def hash_of(key: str) -> str:
    """The same, as it is written there."""
    return f"sha256:{digest_of(key).hex()}"


def read_keys(path: Path) -> list[KeyEntry]:
    """All keys of a file. Blocks.

    Raises:
        KeyFileError: it cannot be read, or does not hold keys.
    """
    try:
        with path.open("rb") as file:
            found = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from None
    if len(found) > _MOST_BYTES:
        raise KeyFileError(f"{path} is longer than {_MOST_BYTES:,} bytes")
    try:
        entries = msgspec.json.decode(found, type=_KeyFile).keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise KeyFileError(f"{path} is no file of keys: {error}") from None
    for what, values in (
        ("name", [entry.name for entry in entries]),
        ("hash", [entry.hash for entry in entries]),
    ):
        if repeated := next((value for value in values if values.count(value) > 1), None):
            shown = f" {repeated!r}" if what == "name" else ""
            raise KeyFileError(f"{path}: expected each {what} once, got{shown or ' one hash'} twice")
    return entries


def add_key(path: Path, entry: KeyEntry) -> None:
    """Put a key into a file, which need not be there yet. Blocks.

    Raises:
        KeyFileError: the name is taken, or the file cannot be read or written.
    """
    with _changing(path):
        entries = read_keys(path) if path.exists() else []
        if any(each.name == entry.name for each in entries):
            raise KeyFileError(
                f"{path} has a key named {entry.name}: choose another name, or remove it first"
            )
        _write(path, [*entries, entry])


def remove_key(path: Path, name: str) -> None:
    """Take a key out of a file. Blocks.

    Raises:
        KeyFileError: there is none of that name, or the file cannot be read or written.
    """
    with _changing(path):
        entries = read_keys(path)
        if all(each.name != name for each in entries):
            raise KeyFileError(f"{path} has no key named {name}")
        _write(path, [each for each in entries if each.name != name])


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One command at a time: two would each write what the other has not seen."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeyFileError(f"{path.parent} cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, entries: Sequence[KeyEntry]) -> None:
    """All or nothing, so that a gateway that looks meanwhile sees the old file or the new one."""
    target = path.resolve()  # a link stays one
    mode = target.stat().st_mode & 0o777 if target.exists() else _NEW_FILE_MODE
    text = msgspec.json.format(msgspec.json.encode(_KeyFile(list(entries))), indent=2) + b"\n"
    try:
        made, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(made, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise KeyFileError(f"{path} cannot be written ({error.strerror})") from None
