"""Opening what a model directory holds: regular files below the model root alone, and never more bytes than expected."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.safety.bounds import MOST_ENTRIES, limit_of

__all__ = ["confines_of", "open_regular", "read_bounded", "survey"]

_DEEPEST: Final = 6
"""Folders in folders: a model has two levels, with what was exported for other runtimes three."""
_KINDS: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a directory"),
)


def confines_of(directory: Path, root: Path | None) -> tuple[Path, ...]:
    """The folders below which every file of `directory` must lie, links resolved.

    These are the directory itself and `root`, the model root, if the directory lies below it. In the layout of Hugging Face's
    cache (`REPO/snapshots/REVISION`, whose files are links into `REPO/blobs`) also that one `blobs`, which its snapshots own.
    """
    directory = directory.resolve()
    found = [directory]
    if root is not None and directory.is_relative_to(root.resolve()):
        found.append(root.resolve())
    if directory.parent.name == "snapshots":
        found.append(directory.parent.parent / "blobs")
    return tuple(found)


def survey(directory: Path, confines: tuple[Path, ...]) -> None:
    """Look at everything below `directory` without opening it; hidden folders, which nothing reads, are left out.

    A library opens files of its own choosing there, so what it may find is checked before. Limitation: whoever can change the
    directory between this look and the load can still make the load hang; it has a deadline.

    Raises:
        ModelError: a file is no regular one, lies elsewhere, or is larger than its kind may be.
    """
    left = MOST_ENTRIES
    folders = [(directory, 0)]
    while folders:
        folder, depth = folders.pop()
        for entry in _entries(folder):
            left -= 1
            if left < 0:
                raise ModelError(f"{directory}: expected at most {MOST_ENTRIES:,} files")
            path = folder / entry.name
            is_folder = _check(path, confines)
            if is_folder and not entry.name.startswith("."):
                if depth == _DEEPEST:
                    raise ModelError(f"{path}: expected at most {_DEEPEST} folders in each other")
                folders.append((path, depth + 1))


def read_bounded(file: Path, limit: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes; by default what its name allows.

    Raises:
        ModelError: there is no such file, it is no regular one, or it has more bytes.
    """
    most = limit_of(file.name) if limit is None else limit
    if most is None:
        raise RuntimeError(f"{file.name}: no bound. This is a bug.")
    with open_regular(file) as descriptor:
        refuse_size(file, os.fstat(descriptor).st_size, most)
        parts: list[bytes] = []
        size = 0
        # What grows meanwhile is not followed.
        while size <= most and (part := os.read(descriptor, min(1 << 20, most + 1 - size))):
            parts.append(part)
            size += len(part)
    refuse_size(file, size, most)
    return b"".join(parts)


def refuse_size(file: Path, size: int, limit: int | None) -> None:
    """
    Raises:
        ModelError: `size` is above `limit`.
    """
    if limit is not None and size > limit:
        raise ModelError(f"{file}: expected at most {limit:,} bytes, it has {size:,}")


@contextmanager
def open_regular(file: Path) -> Iterator[int]:
    """A descriptor to read `file`, closed at the end. Neither opening nor reading waits for another process.

    Raises:
        ModelError: it is missing, cannot be read, or is no regular file.
    """
    try:
        _refuse_kind(file, os.stat(file).st_mode)  # before it is opened, which some devices notice
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{file}: missing") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({type(error).__name__})") from error
    try:
        _refuse_kind(file, os.fstat(descriptor).st_mode)
        yield descriptor
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({type(error).__name__})") from error
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            # One more than may be is enough to know.
            return [entry for entry, _ in zip(found, range(MOST_ENTRIES + 1), strict=False)]
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({type(error).__name__})") from error


def _check(path: Path, confines: tuple[Path, ...]) -> bool:
    """Whether it is a folder. A link that leads nowhere is as good as missing."""
    try:
        state = os.lstat(path)
        if stat.S_ISLNK(state.st_mode):
            target = Path(os.path.realpath(path, strict=True))
            if not any(target.is_relative_to(each) for each in confines):
                raise ModelError(
                    f"{path}: a link to {target}, outside of the model root; copy the file, or set the root above both"
                )
            state = os.lstat(target)
    except FileNotFoundError:
        return False
    except OSError as error:  # a circle of links, no permission
        raise ModelError(f"{path}: cannot be read ({type(error).__name__})") from error
    if stat.S_ISDIR(state.st_mode):
        return True
    _refuse_kind(path, state.st_mode)
    refuse_size(path, state.st_size, limit_of(path.name))
    return False


def _refuse_kind(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise ModelError(f"{file}: expected a regular file, it is {kind}")
