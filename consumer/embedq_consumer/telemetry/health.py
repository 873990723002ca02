"""Health and metrics over HTTP, in a thread of their own: the pages are served even while the event loop is stuck."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_REQUEST_S: Final = 10.0
"""From a connection to the end of its answer, however the peer spends it: Prometheus' own limit for a scrape."""
_MOST_CONNECTIONS: Final = 32
"""Probes and scrapes are a handful at a time. One more makes the oldest give way, so that who holds them all keeps nobody
out."""
_REQUEST_BYTES: Final = 16 * 1024
"""Of a request's head; nobody who scrapes sends a tenth of it."""
_POLL_S: Final = 0.1
"""How often the listening thread checks whether it should end."""

log = structlog.get_logger()


class Report(NamedTuple):
    """Result of a health check: whether all is well, and the facts that say why, which are sent as JSON."""

    well: bool
    facts: dict[str, Any]


class Health:
    """What the service knows of its own health. Any thread may call any method; times are `time.monotonic()` seconds.

    Invariants:

    - Alive: each registered loop has beaten within its own limit.
    - Ready: alive, and no reason is set why not. A service starts with the reason "starting". A part's own reason (`hinder`) shows
      before the service's.
    - A loop's last beat never goes back in time.
    """

    def __init__(self, reason: str = "starting") -> None:
        self._lock = threading.Lock()
        self._limits: dict[str, float] = {}
        self._beats: dict[str, float] = {}
        self._reason: str | None = reason
        self._hindrances: dict[str, str] = {}
        self._facts: dict[str, object] = {}

    def register(self, loop: str, limit_s: float, now: float) -> None:
        """From now on this loop must beat at least every `limit_s`; registering counts as its first beat."""
        with self._lock:
            self._limits[loop] = limit_s
            self._beats[loop] = now

    def beat(self, loop: str, now: float) -> None:
        """This loop is alive. A beat of a loop that is not registered is ignored: it has no limit."""
        with self._lock:
            if loop in self._beats:
                self._beats[loop] = max(now, self._beats[loop])

    def set_ready(self, reason: str | None) -> None:
        """None if the service takes jobs, otherwise why not, such as "loading the model" or "draining"."""
        with self._lock:
            self._reason = reason

    def hinder(self, part: str, reason: str | None) -> None:
        """Why one part keeps the service from being ready, such as the brokers that it waits for; None: it does not."""
        with self._lock:
            if reason is None:
                self._hindrances.pop(part, None)
            else:
                self._hindrances[part] = reason

    def tell(self, facts: Mapping[str, object]) -> None:
        """Show these facts on the readiness page, in addition to those that it shows already."""
        with self._lock:
            self._facts.update(facts)

    def oldest_beat(self, now: float) -> float:
        """Seconds since the slowest loop's last beat; 0 when no loop is registered."""
        with self._lock:
            return max((now - beat for beat in self._beats.values()), default=0.0)

    def silent(self, now: float) -> list[str]:
        """The loops that have not beaten within their limit."""
        with self._lock:
            return sorted(loop for loop, beat in self._beats.items() if now - beat > self._limits[loop])

    def live(self, now: float) -> Report:
        """Fails when a loop has been silent for longer than its limit, and names each one."""
        with self._lock:
            loops = {
                loop: {"age_s": round(now - beat, 3), "limit_s": self._limits[loop]}
                for loop, beat in self._beats.items()
            }
        silent = self.silent(now)
        facts: dict[str, Any] = {"status": "silent" if silent else "ok", "loops": loops}
        if silent:
            facts["reason"] = f"no heartbeat from {', '.join(silent)}"
        return Report(not silent, facts)

    def ready(self, now: float) -> Report:
        """Fails for the reason that was set, or because a loop is silent."""
        alive, facts = self.live(now)
        with self._lock:
            reason = next(iter(self._hindrances.values()), self._reason)
            shown = dict(self._facts)
        if reason is None and alive:
            return Report(True, {"status": "ok", **shown})
        return Report(False, {"status": "not ready", "reason": reason or facts["reason"]})


class CannotListen(Exception):
    """The pages cannot be served there; the message begins with the setting to change, without its prefix."""


class HealthServer:
    """Serves `/metrics`, `/livez` and `/readyz` from the moment it is made until `close`.

    Port 0 takes a free one; `port` says which. The health pages answer 200 or 503, with JSON that says why. Peers that are
    slow, silent or many cost a bounded number of threads and keep nobody else from an answer.

    Raises:
        CannotListen: the port is taken, or the address is not this machine's.
    """

    def __init__(
        self,
        port: int,
        registry: CollectorRegistry,
        health: Health,
        *,
        host: str = "127.0.0.1",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        server = _DualStackServer if ":" in host else _Server
        try:
            self._server = server((host, port), partial(_RequestHandler, registry, health, clock))
        except OSError as error:
            raise CannotListen(_why(error, host, port)) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; blocks for up to `_POLL_S`."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"HTTP_PORT: expected a port that is free, {port} is in use (0: any free one)"
    if error.errno == errno.EACCES:
        return f"HTTP_PORT: expected a port that this user may have, {port} is not one"
    return f"HTTP_HOST: expected an address of this machine, {host} is none ({error.strerror or error})"


class Connections:
    """The connections that are open, oldest first. Says which must be closed; whoever asks closes them.

    Any thread may call any method; times are `time.monotonic()` seconds.
    """

    def __init__(self, most: int, longest_s: float) -> None:
        self._most = most
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._since: dict[socket.socket, float] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._since)

    def add(self, connection: socket.socket, now: float) -> list[socket.socket]:
        """Those that give way to this one."""
        with self._lock:
            self._since[connection] = now
            oldest = list(self._since)[: max(0, len(self._since) - self._most)]
            for each in oldest:
                del self._since[each]
            return oldest

    def remove(self, connection: socket.socket) -> None:
        """It was closed. It need not be here."""
        with self._lock:
            self._since.pop(connection, None)

    def overdue(self, now: float) -> list[socket.socket]:
        """Those whose time is over."""
        with self._lock:
            found = [each for each, since in self._since.items() if now - since > self._longest_s]
            for each in found:
                del self._since[each]
            return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a scraper that hangs must not keep the process from stopping
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self._connections = Connections(_MOST_CONNECTIONS, _REQUEST_S)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        for oldest in self._connections.add(request, time.monotonic()):
            _hang_up(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The answer was sent, or the peer is gone."""
        self._connections.remove(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called after each connection and each `_POLL_S`."""
        for overdue in self._connections.overdue(time.monotonic()):
            _hang_up(overdue)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a request handler raised; the standard library would print it to stderr."""
        if not isinstance(sys.exception(), OSError):  # a peer that went away is not our failure
            log.exception("http_answer_failed")


def _hang_up(connection: socket.socket) -> None:
    """Wake the thread that reads or writes there; it then closes the connection."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Head:
    """What a peer sends, as far as a request's head may go; beyond it there is nothing."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = _REQUEST_BYTES

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self._file.readline(self._left if limit < 0 else min(limit, self._left))
        self._left -= len(line)
        return line

    def close(self) -> None:
        self._file.close()


class _DualStackServer(_Server):
    address_family = socket.AF_INET6


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "embedq"
    sys_version = ""
    timeout = _REQUEST_S

    def __init__(
        self, registry: CollectorRegistry, health: Health, clock: Callable[[], float], *args: Any
    ) -> None:
        self._registry = registry
        self._health = health
        self._clock = clock
        super().__init__(*args)

    def setup(self) -> None:
        """Called by the standard library before it reads."""
        super().setup()
        self.rfile = _Head(self.rfile)  # type: ignore[assignment]  # the head is all that is read

    def do_GET(self) -> None:
        """Serve one page."""
        match urlsplit(self.path).path:
            case "/metrics":
                self._metrics()
            case "/livez":
                self._report(self._health.live(self._clock()))
            case "/readyz":
                self._report(self._health.ready(self._clock()))
            case _:
                paths = {"paths": ["/metrics", "/livez", "/readyz"]}
                self._send(HTTPStatus.NOT_FOUND, "application/json", json.dumps(paths).encode())

    do_HEAD = do_GET

    def _metrics(self) -> None:
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._send(HTTPStatus.OK, content_type, encode(self._registry))

    def _report(self, report: Report) -> None:
        status = HTTPStatus.OK if report.well else HTTPStatus.SERVICE_UNAVAILABLE
        self._send(status, "application/json", json.dumps(report.facts).encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # one that waits for the next scrape would only hold a thread
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: probes and scrapes come every few seconds."""
