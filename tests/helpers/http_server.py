"""Small HTTP servers of tests, each in a thread of its own, until the end of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

_LOOKS_EVERY_S: Final = 0.01
"""Between two looks whether it is to end: its own half second would be most of what a test takes."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """Requests to a free port of this machine are answered by the handler."""

    class Prompt(handler):  # type: ignore[valid-type, misc]
        """A body does not wait until the peer has confirmed the head, which over a connection that stays open takes it 40 ms."""

        disable_nagle_algorithm = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Prompt) as server:
        thread = threading.Thread(target=server.serve_forever, args=(_LOOKS_EVERY_S,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
