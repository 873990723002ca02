"""Whether a client may be used, here and now. Nothing here does I/O."""

from __future__ import annotations

import asyncio
from enum import Enum, auto

from embedq_sdk.errors import ClientClosed, ClientNotOpened, EmbedError, WrongEventLoop


class _State(Enum):
    NEW = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSED = auto()


class Lifetime:
    """A client's life: not opened, being opened, open, closed; and the event loop that all of it happens in.

    Invariants:
        - A client is usable only while it is open, and only in the loop in which it was opened: its futures, tasks and
          connections belong to that one, and another loop or thread would wait for them in vain, or break them.
        - What failed to open is as if it had never been tried. What was closed stays closed.
    """

    def __init__(self) -> None:
        self._state = _State.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self.fault: BaseException | None = None
        """Why it broke down."""
        self.turn = asyncio.Lock()
        """Held while opening; a lock has waiters of one loop."""

    def claim(self) -> None:
        """Somebody wants to open the client, here; may be called again while it is being opened, or open.

        Raises:
            ClientClosed, WrongEventLoop.
        """
        self.check_loop()
        if self._state is _State.CLOSED:
            raise ClientClosed()
        if self._state is _State.NEW:
            self._state = _State.OPENING
            if self._loop is not asyncio.get_running_loop():
                self._loop = asyncio.get_running_loop()
                self.turn = asyncio.Lock()

    def failed(self) -> None:
        """It could not be opened."""
        if self._state is _State.OPENING:
            self._state = _State.NEW

    def opened(self) -> None:
        """It is connected.

        Raises:
            ClientClosed: it was closed meanwhile.
        """
        if self._state is _State.CLOSED:
            raise ClientClosed()
        self._state = _State.OPEN
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """It is used no more.

        Raises:
            WrongEventLoop.
        """
        self.check_loop()
        self._state = _State.CLOSED

    def break_down(self, fault: BaseException) -> None:
        """It stopped working by itself, which is our bug."""
        self.fault = fault

    @property
    def is_open(self) -> bool:
        """Whether it is open, in whatever loop."""
        return self._state is _State.OPEN

    def check(self) -> None:
        """Check that the client can be used, here and now.

        Raises:
            ClientNotOpened, ClientClosed, WrongEventLoop.
            EmbedError: it broke down.
        """
        if self._state is _State.CLOSED or self.fault is not None:
            raise self.ended()
        self.check_loop()
        if self._state is not _State.OPEN:
            raise ClientNotOpened()

    def check_loop(self) -> None:
        """Check that nothing keeps the client from this event loop.

        Raises:
            WrongEventLoop: it is open, or being opened, in another one.
        """
        mine = self._loop
        bound = self._state in (_State.OPENING, _State.OPEN)
        if not bound or mine is None or mine is asyncio.get_running_loop():
            return
        if mine.is_closed():
            where = "one that has ended, with all its connections: asyncio.run begins a new loop each time"
        elif mine.is_running():
            where = "one that runs in another thread"
        else:
            where = "one that does not run now"
        raise WrongEventLoop(where=where)

    def ended(self) -> EmbedError:
        """Why it cannot be used any more."""
        if self.fault is None:
            return ClientClosed()
        broken = EmbedError()
        broken.__cause__ = self.fault
        broken.add_note(f"the client stopped working ({self.fault!r}). This is a bug.")
        return broken
