"""A command that is being followed, until it ends or a newer one supersedes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from embedq_consumer.engine import Cancellation
from embedq_shared.messages import Control

__all__ = ["Pursuit", "Superseded"]


class Superseded(Exception):
    """A newer command has taken this one's place; the message says which."""


class Pursuit:
    """One command, and whether it is still the one to follow.

    A load ends at its next look at `cancel`, what waits inside `interruptible` at once, and everything else where it calls
    `check`. Changed on the event loop alone.
    """

    def __init__(self, command: Control) -> None:
        self.command = command
        self.cancel = Cancellation()
        """Set once a newer command is there."""
        self._newer: Control | None = None
        self._waits: set[asyncio.Timeout] = set()

    def supersede(self, newer: Control) -> None:
        """This command is not wanted any more."""
        self._newer = newer
        self.cancel.set()
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now)

    def check(self) -> None:
        """
        Raises:
            Superseded: a newer command is there.
        """
        if self._newer is not None:
            raise Superseded(f"superseded by version {self._newer.version}")

    @asynccontextmanager
    async def interruptible(self) -> AsyncIterator[None]:
        """What is awaited inside is cancelled once a newer command is there.

        Raises:
            Superseded: then, or when it is entered after that.
        """
        self.check()
        wait = asyncio.timeout(None)
        try:
            async with wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if wait.expired():
                self.check()
            raise
