"""Standard input line by line, without keeping the event loop from its work while somebody still types, or a program computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import Final, Self

_READ: Final = 64 * 1024
"""Bytes of one read; what a pipe holds."""


class InputLines:
    """The lines of a file descriptor, as bytes with their ends. Iteration blocks where none is there yet; `ready` waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._begun = b""
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not (line := self.readline()):
            raise StopIteration
        return line

    def readline(self, limit: int = -1) -> bytes:
        """The next line, or what is there of it if that is `limit` bytes; empty at the end."""
        while not self._lines and not self._ended:
            if 0 <= limit <= len(self._begun):
                begun, self._begun = self._begun, b""
                return begun
            self._fill()
        return self._lines.popleft() if self._lines else b""

    def unread(self, line: bytes) -> None:
        """Put a line that was looked at back in front."""
        if line:
            self._lines.appendleft(line)

    async def ready(self) -> Self:
        """Wait until a line is there, or the end."""
        while not self._lines and not self._ended:
            await _readable(self._fd)
            self._fill()
        return self

    def _fill(self) -> None:
        data = os.read(self._fd, _READ)
        self._ended = not data
        *lines, self._begun = (self._begun + data).split(b"\n")
        self._lines.extend(line + b"\n" for line in lines)
        if self._ended and self._begun:
            self._lines.append(self._begun)
            self._begun = b""


async def _readable(fd: int) -> None:
    """Wait until a read would not block. The descriptor stays as it is: others, such as a shell, may share it."""
    import asyncio

    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    try:
        loop.add_reader(fd, arrived.set)
    except (OSError, NotImplementedError):
        return  # a regular file, which is always ready; or a system that cannot tell
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(fd)
