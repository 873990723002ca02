"""Health and metrics over HTTP, in a thread of their own: the pages are served even while the event loop is stuck."""

from __future__ import annotations

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

_SCRAPE_TIMEOUT_S: Final = 10.0
"""How long a silent peer may hold a thread."""
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

    def live(self, now: float) -> Report:
        """Fails when a loop has been silent for longer than its limit, and names each one."""
        with self._lock:
            loops = {
                loop: {"age_s": round(now - beat, 3), "limit_s": self._limits[loop]}
                for loop, beat in self._beats.items()
            }
        silent = sorted(loop for loop, facts in loops.items() if facts["age_s"] > facts["limit_s"])
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


class HealthServer:
    """Serves `/metrics`, `/livez` and `/readyz` from the moment it is made until `close`.

    Port 0 takes a free one; `port` says which. The health pages answer 200 or 503, with JSON that says why.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """

    def __init__(
        self,
        port: int,
        registry: CollectorRegistry,
        health: Health,
        *,
        host: str = "0.0.0.0",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        server = _DualStackServer if ":" in host else _Server
        self._server = server((host, port), partial(_RequestHandler, registry, health, clock))
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a scraper that hangs must not keep the process from stopping

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a request handler raised; the standard library would print it to stderr."""
        if not isinstance(sys.exception(), OSError):  # a peer that went away is not our failure
            log.exception("http_answer_failed")


class _DualStackServer(_Server):
    address_family = socket.AF_INET6


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "embedq"
    sys_version = ""
    timeout = _SCRAPE_TIMEOUT_S

    def __init__(
        self, registry: CollectorRegistry, health: Health, clock: Callable[[], float], *args: Any
    ) -> None:
        self._registry = registry
        self._health = health
        self._clock = clock
        super().__init__(*args)

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
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: probes and scrapes come every few seconds."""
