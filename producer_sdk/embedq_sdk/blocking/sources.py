"""Lazy texts of a blocking caller: its own thread reads them, when the event loop asks for more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Final, Self, TypeVar

from embedq_sdk.blocking.session import outcome
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.job_options import Column, listed_column

T = TypeVar("T")

_MORE: Final = "more"
_DONE: Final = "done"
_TURN_S: Final = 0.005
"""A source that gives texts at once is read in batches, which spares a change of threads for each; one that makes its reader
wait gives what it has after this time."""


class CallersSource(AsyncIterator[str]):
    """A source as the event loop sees it, and as its caller's thread does.

    It may use what belongs to that thread: a database's cursor, a request, a Spark task. The loop waits for no source.

    Args:
        source: the texts.
        most: how many of them are read at a time.
    """

    def __init__(self, source: Iterator[str], most: int) -> None:
        self._source = source
        self._most = most
        self._signals: SimpleQueue[str] = SimpleQueue()
        """What the caller's thread waits for: the loop wants more texts, or what it was asked for is done."""
        self._texts: deque[str] = deque()
        self._end: BaseException | None = None
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- the event loop's side ----------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._texts:
            if self._end is not None:
                raise self._end
            self._loop = asyncio.get_running_loop()
            self._news.clear()
            self._signals.put(_MORE)
            await self._news.wait()
        return self._texts.popleft()

    # -- the caller's side --------------------------------------------------------------------------------------------

    def read_until(self, done: Future[T]) -> T:
        """Read whenever the loop asks for it, until the work is done; its outcome."""
        done.add_done_callback(lambda _: self._signals.put(_DONE))
        try:
            while self._signals.get() is _MORE:
                self._read()
        except BaseException:
            done.cancel()
            raise
        return outcome(done)

    def top_up(self) -> None:
        """Read if the loop has asked for it: between two steps that were done at once, so that the window stays full."""
        with contextlib.suppress(Empty):
            self._signals.get_nowait()
            self._read()

    def _read(self) -> None:
        until = time.monotonic() + _TURN_S
        texts: list[str] = []
        end: BaseException | None = None
        try:
            while not texts or (len(texts) < self._most and time.monotonic() < until):
                texts.append(next(self._source))
        except StopIteration:
            end = StopAsyncIteration()
        except Exception as error:  # noqa: BLE001 - it is raised where the loop comes to it, after what was read before
            end = error
        self._texts.extend(texts)
        self._end = end
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and with it whoever asked
                self._loop.call_soon_threadsafe(self._news.set)


def readable(texts: Iterable[str] | Column, most: int) -> tuple[Any, CallersSource | None]:
    """What the event loop gets, and the same where the caller's thread has to read it; the loop reads what lies in memory.

    Raises:
        InvalidArgument: a whole table instead of one of its columns, or a source that only an event loop can read.
    """
    found: Any = listed_column(texts, "texts")
    if isinstance(found, AsyncIterable):
        raise InvalidArgument(
            argument="texts", expected="an iterable of strings", got="one that only the async client reads"
        )
    if isinstance(found, (list, tuple, str, bytes, Mapping)) or not isinstance(found, Iterable):
        return found, None
    source = CallersSource(iter(found), most)
    return source, source
