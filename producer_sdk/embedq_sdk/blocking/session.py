"""A client of the SDK in an event loop of its own, in a thread of its own, for callers that cannot await.

anyio's portal would start the thread as well; what takes thought is a fork, an interpreter that ends, a garbage collector
that closes generators, and one connection for many callers, and none of that is in it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from typing import Any, Final, Generic, TypeVar

from embedq_sdk.client import EmbedClient
from embedq_sdk.errors import ClientClosed

T = TypeVar("T")
Client = TypeVar("Client", bound=EmbedClient)

LEAVE_S: Final = 5.0
"""Closing takes about 2 s at most, with a broker that is silent. A thread that takes longer is left behind, and keeps nobody."""


class Session(Generic[Client]):
    """A client, and the thread whose event loop it lives in.

    Invariants:
        - What was begun ends: as it would anyhow, or cancelled when the session ends. Nothing begins after that.
        - A forked process begins nothing in its parent's session, whose thread it does not have.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._takes = True
        self._ended = False
        self._inherited = False
        self._told = asyncio.Event()
        self._opening: asyncio.Task[Client] | None = None
        self._begun: dict[Future[Any], Coroutine[Any, Any, Any]] = {}
        """What has not ended. No lock guards it: the garbage collector may run any caller's code in the midst of ours."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="embedq-client", daemon=True)
        self._thread.start()
        _sessions.add(self)

    @property
    def inherited(self) -> bool:
        """Whether it is the parent's of this process."""
        return self._inherited

    def begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin work in the event loop, connected or not. Cancelling the future cancels the work.

        Raises:
            ClientClosed: the session has ended.
        """
        if not self._takes:
            raise self._over()
        coroutine = work()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop has closed since
            coroutine.close()
            raise self._over() from None
        self._begun[future] = coroutine
        future.add_done_callback(lambda done: self._begun.pop(done, None))
        if self._ended:  # and so did whoever would have ended this
            self._end_all()
        return future

    def begin_open(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin work that needs an open client, which is opened first where it is not yet."""
        return self.begin(lambda: self._opened(work))

    def tell(self, what: Callable[[], object]) -> None:
        """Have the loop do something short. Does nothing where the session's end has ended what it would be for."""
        if self._takes:
            with contextlib.suppress(RuntimeError):  # the loop has closed since
                self._loop.call_soon_threadsafe(what)

    def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the end of something, and wait for it. Does nothing where the session's end has ended it.

        The garbage collector may close a generator in any thread. In the event loop's own the end is begun and not awaited.
        """
        with contextlib.suppress(ClientClosed):
            ending = self.begin(work)
            if threading.current_thread() is not self._thread:
                outcome(ending)

    def end(self) -> None:
        """Close the client, then end the loop and the thread. Does not wait."""
        if self._takes:
            with contextlib.suppress(ClientClosed):
                self.begin(self._close)
            self._takes = False

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, at most so long."""
        if not self._inherited:
            self._thread.join(seconds)

    def disown(self) -> None:
        """This process is a new child of the one that the session belongs to: its thread does not exist here."""
        self._takes = False
        self._inherited = True

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._until_told())
        finally:
            self._takes = False
            self._ended = True
            self._end_all()
            _sessions.discard(self)

    def _end_all(self) -> None:
        """End what came too late for the loop to begin it."""
        for future, coroutine in list(self._begun.items()):
            coroutine.close()
            future.cancel()

    async def _until_told(self) -> None:
        await self._told.wait()  # then the runner cancels what is left

    async def _opened(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """All who come while it is being opened share one attempt: its outcome is theirs, and none that gives up ends it."""
        opening = self._opening
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception() is not None)):
            # The connection outlives the call that made it, whose context, a request's perhaps, it must not keep.
            nobody = contextvars.Context()
            opening = asyncio.create_task(self.client.open(), name="embedq-open", context=nobody)
            opening.add_done_callback(_seen)
            self._opening = opening
        await asyncio.shield(opening)
        return await work()

    async def _close(self) -> None:
        try:
            await self.client.close()
        finally:
            self._told.set()

    def _over(self) -> ClientClosed:
        closed = ClientClosed()
        if self._inherited:
            closed.add_note("It was begun in the parent process; begin it anew in this one")
        return closed


class Call(Generic[Client, T]):
    """Work that ends when its caller leaves, wherever an interruption, by Ctrl-C for one, finds that caller: it may have begun the
    work, and not hold its future yet."""

    def __init__(self, work: Callable[[Client], Awaitable[T]]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._left = False

    async def run(self, client: Client) -> T:
        """The work, in the loop."""
        if self._left:
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        return await self._work(client)

    def leave(self) -> None:
        """Nobody waits for it any more; in the loop, at any time."""
        self._left = True
        _cancel(self._task)


class Steps(Generic[T]):
    """An async generator that is taken one step at a time."""

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[Any] | None = None

    async def next(self) -> T | None:
        """The next item; None after the last."""
        async with self._turn:
            self._task = asyncio.current_task()
            return await anext(self._items, None)

    async def close(self) -> None:
        """End the generator, wherever it is: a step that is still under way, since its caller was interrupted, is cancelled."""
        _cancel(self._task)
        async with self._turn:
            await self._items.aclose()


def _cancel(task: asyncio.Task[Any] | None) -> None:
    """Once: a second time would break off what the first has it clean up."""
    if task is not None and not task.done() and not task.cancelling():
        task.cancel()


def outcome(future: Future[T]) -> T:
    """What came of it. A caller that is interrupted, by Ctrl-C for one, leaves at once, and the work is cancelled.

    Raises:
        ClientClosed: the session ended first.
    """
    try:
        return future.result()
    except CancelledError:
        raise ClientClosed() from None
    except BaseException:
        future.cancel()
        raise


def _seen(opening: asyncio.Task[Any]) -> None:
    """An attempt to connect whose callers have all left is no news for a log."""
    if not opening.cancelled():
        opening.exception()


# -- the process: its end, and its children ----------------------------------------------------------------------------

_sessions: Final[set[Session[Any]]] = set()
"""Of this process, and running."""
_inherited: Final[list[Session[Any]]] = []
"""Of the parent process. They are kept for ever: collecting one would close the parent's poll of its sockets, and warn."""
_making = threading.RLock()


def making() -> AbstractContextManager[Any]:
    """The lock of this process under which a client makes its session. One thread may take it again: a finalizer may close a client."""
    return _making


def _in_child() -> None:
    global _making
    _making = threading.RLock()  # whoever held the other one is not here
    _inherited.extend(_sessions)
    _sessions.clear()
    for session in _inherited:
        session.disown()


def _at_exit() -> None:
    """Close what is still open. Threads that keep the interpreter have ended by now, so nobody uses it any more."""
    end = time.monotonic() + LEAVE_S
    sessions = list(_sessions)
    for session in sessions:
        session.end()
    for session in sessions:
        session.join(max(0.0, end - time.monotonic()))


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
