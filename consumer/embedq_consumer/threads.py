"""Threads for work that may never end: native code, file systems, devices. The process can leave without them.

The standard library's pool joins its threads when the interpreter ends, and asyncio joins those of its own pool when its loop
closes, however long that takes. These here are daemons: whoever closes them waits as long as it likes, and `process.leave`
ends the process around those that are left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

__all__ = ["CLOSE_S", "WorkerThreads", "left_behind"]

CLOSE_S: Final = 5.0
"""What a call that still runs has to end by itself: ten micro-batches on a CPU. Below any limit of the whole stop."""

Params = ParamSpec("Params")
Returned = TypeVar("Returned")


class _Worker(threading.Thread):
    """A thread of this room."""


class WorkerThreads(Executor):
    """Up to `count` threads that take calls in order. Threads start when they are needed.

    Invariants:
        - After `close` no call begins; those that wait are cancelled.
        - What a call raises, whatever it is, its future has.
    """

    def __init__(self, name: str, count: int = 1) -> None:
        self._name = name
        self._count = count
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(
        self, fn: Callable[Params, Returned], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Future[Returned]:
        """Call `fn` on one of the threads.

        Raises:
            RuntimeError: the threads are closed.
        """
        future: Future[Returned] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the {self._name} threads are closed")
            self._calls.put((future, partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._count:
                name = f"{self._name}_{len(self._threads)}"
                self._threads.append(_Worker(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in every executor: it may wait for ever. `close` does not."""
        self._end(cancel=cancel_futures)
        if wait:
            for thread in self._threads:
                thread.join()

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Cancel what waits, and wait for what runs, but not longer than this. Whether every thread has ended."""
        self._end(cancel=True)
        until = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _end(self, *, cancel: bool) -> None:
        with self._lock:
            self._closed = True
            while cancel:
                try:
                    waiting = self._calls.get_nowait()
                except Empty:
                    break
                if waiting is not None:
                    waiting[0].cancel()
            for _ in self._threads:
                self._calls.put(None)

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                self._idle.release()
                call = self._calls.get()
            if call is None:
                return
            _make(*call)
            del call  # what it holds must not live until the next one


def _make(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = call()
    except BaseException as error:  # noqa: BLE001  # it is raised where the call is waited for
        future.set_exception(error)
    else:
        future.set_result(found)


def left_behind() -> list[str]:
    """Names of the threads of this room that have not ended."""
    return [thread.name for thread in threading.enumerate() if isinstance(thread, _Worker)]
