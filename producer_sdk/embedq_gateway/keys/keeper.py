"""Follows the file of keys: a change is in force a second later, and a file that is broken changes nothing, and is told of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from embedq_gateway.keys.door import Door
from embedq_gateway.keys.key_file import KeyEntry, KeyFileError, read_keys

_LOOK_S: Final = 1.0
"""How often the file is looked at: one call of `stat`."""

log = logging.getLogger("embedq.gateway")

Fingerprint = tuple[int, int, int]


class KeyKeeper:
    """Brings what the file says to the door, and knows how the last reading of it went."""

    def __init__(
        self,
        path: Path,
        *,
        workers: int = 1,
        read: Callable[[Path], list[KeyEntry]] = read_keys,
        told: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """Reads the file. Blocks. `told` hears "ok" or "refused" of each reading after the first.

        Raises:
            KeyFileError: it cannot be used, so there is nothing to begin with.
        """
        self._path = path
        self._read = read
        self._told = told
        self._seen = _fingerprint(path)
        self.door = Door(read(path), workers=workers)
        self.fault: str | None = None
        """Why the file as it is now is not in force; None: it is."""

    async def follow(self) -> None:
        """Look at the file until cancelled. A file system that hangs holds up this loop alone."""
        while True:
            await asyncio.sleep(_LOOK_S)
            found = await asyncio.to_thread(self.look)
            if found is not None:
                self.take(found)

    def look(self) -> list[KeyEntry] | KeyFileError | None:
        """What the file holds, if it is another one than at the last look. Blocks."""
        seen = _fingerprint(self._path)
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            return self._read(self._path)
        except KeyFileError as error:
            return error

    def take(self, found: list[KeyEntry] | KeyFileError) -> None:
        """Put what was found in force, unless it is broken."""
        if isinstance(found, KeyFileError):
            self.fault = str(found)
            log.error("key_file_refused", extra={"reason": self.fault, "in_force": len(self.door.names)})
            self._told("refused")
            return
        self.fault = None
        self.door.replace(found)
        log.info("key_file_read", extra={"keys": len(found)})
        self._told("ok")


def _fingerprint(path: Path) -> Fingerprint | None:
    """What changes when a file is written or replaced; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
