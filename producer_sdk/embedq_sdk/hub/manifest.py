"""What a pulled directory holds, and by which digests it is known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

MANIFEST: Final = "embedq_manifest.json"
"""In the model's directory."""
_READ_BYTES: Final = 1 << 20


class ManifestFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file: its path below the directory, with slashes, and what it must be."""

    path: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Where a directory came from, and all of its files, sorted by path."""

    repository: str
    revision: str
    """The commit, 40 hex digits."""
    endpoint: str
    files: tuple[ManifestFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def problems(self, directory: Path) -> Iterator[str]:
        """What in the directory is not as it was pulled. Reads every byte."""
        for file in self.files:
            path = directory / file.path
            if not path.is_file():
                yield f"{file.path}: missing"
            elif path.stat().st_size != file.size:
                yield f"{file.path}: expected {file.size:,} bytes, got {path.stat().st_size:,}"
            elif digest(path) != file.sha256:
                yield f"{file.path}: its content has changed"


def read_manifest(directory: Path) -> Manifest | None:
    """A directory's manifest; None where it has none that can be read."""
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it, readable for people."""
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def digest(path: Path) -> str:
    """A file's SHA-256, in hex."""
    return _hash(path, hashlib.sha256)


def git_blob_id(path: Path) -> str:
    """What git calls a file of this content: the hub gives no other digest of small files."""

    def start() -> hashlib._Hash:
        return hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)

    return _hash(path, start)


def _hash(path: Path, start: Callable[[], hashlib._Hash]) -> str:
    found = start()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            found.update(chunk)
    return found.hexdigest()
