"""Every metric of the gateway, in one list. Labels are routes, statuses, codes and names of keys: nothing that a request chooses.

Several worker processes share a directory of files, as prometheus-client does it, so that a scrape of any one of them shows
them all. Whoever starts the workers sets `PROMETHEUS_MULTIPROC_DIR` for them.
"""

from __future__ import annotations

import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from embedq_gateway.http.entrance import HUNG_UP
from embedq_gateway.http.exchange import Exchange

DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client reads it when it is imported."""
_SECONDS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
"""As the service has them, so that the two can be laid side by side."""
_NOWHERE: Final = "other"
"""The route of requests that have none: what they ask for may be anything."""
_NOBODY: Final = "none"
"""The key of requests that were not asked for one, or brought none that is known."""
_REFUSALS: Final = frozenset({"invalid_api_key", "permission_denied", "rate_limit_exceeded"})
_TOKENS: Final = "embedq_gateway_tokens"


class GatewayMetrics:
    """The metrics of this process in a registry of their own, or of all workers where they share a directory."""

    def __init__(self, directory: str | None = os.environ.get(DIRECTORY)) -> None:
        self._directory = directory
        self.registry = registry = CollectorRegistry()
        if directory is None:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        else:
            forget_the_dead(directory)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"embedq_gateway_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(
                f"embedq_gateway_{name}", help, labels, registry=registry, multiprocess_mode="livesum"
            )

        self.requests = counter(
            "requests_total", "Requests answered, by route and status.", "route", "status"
        )
        self.seconds = Histogram(
            "embedq_gateway_request_seconds",
            "From a request's head to the end of its answer, by route.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.in_flight = gauge("in_flight", "Requests that are being answered.")
        self.texts = counter("texts_total", "Texts of requests that were answered, by the key's name.", "key")
        self.tokens = counter(
            "tokens_total", "Tokens of requests that were answered, by the key's name.", "key"
        )
        self.refused = counter(
            "refused_total",
            "Requests refused for what their key is or may do, by the key's name and code.",
            "key",
            "code",
        )
        self.connections = gauge("connections", "Open connections: busy or idle.", "state")
        self.connections_ended = counter(
            "connections_ended_total",
            "Connections ended for breaking a bound: too slow, too long a head, too many.",
        )
        self.key_file_readings = counter(
            "key_file_readings_total", "Readings of the key file after it changed: ok or refused.", "outcome"
        )
        self.key_file_broken = gauge(
            "key_file_broken", "Processes that found the key file broken, and go on with what it held before."
        )
        self.ready = gauge("ready", "Processes whose /readyz says yes.")
        self._of_route: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        """By route and status: looking a child up by its labels costs more than counting."""
        self._of_key: dict[str, tuple[Counter, Counter]] = {}
        """Texts and tokens, by the key's name."""

    def observe(self, exchange: Exchange) -> None:
        """A request has ended."""
        route, status = exchange.route or _NOWHERE, exchange.status or HUNG_UP
        found = self._of_route.get((route, status))
        if found is None:
            found = self.requests.labels(route, str(status)), self.seconds.labels(route)
            self._of_route[route, status] = found
        requests, seconds = found
        requests.inc()
        seconds.observe((exchange.answered_at or time.monotonic()) - exchange.began)
        key = _NOBODY if exchange.caller is None else exchange.caller.name
        answered = exchange.texts if status == HTTPStatus.OK else 0
        if answered or exchange.tokens:
            texts, tokens = self._counters_of(key)
            texts.inc(answered)
            tokens.inc(exchange.tokens)
        if exchange.error in _REFUSALS:
            self.refused.labels(key, exchange.error).inc()

    def _counters_of(self, key: str) -> tuple[Counter, Counter]:
        found = self._of_key.get(key)
        if found is None:
            found = self._of_key[key] = self.texts.labels(key), self.tokens.labels(key)
        return found

    def measure(self, *, in_flight: int, busy: int, idle: int, ready: bool) -> None:
        """How this process stands now."""
        self.in_flight.set(in_flight)
        self.connections.labels("busy").set(busy)
        self.connections.labels("idle").set(idle)
        self.ready.set(ready)

    def page(self, accept: str) -> tuple[str, bytes]:
        """What a scrape gets: content type and body. Reads files where workers share them."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._all())

    def tokens_so_far(self) -> float:
        """Tokens of all keys, and of all workers. Reads files where they share them."""
        return sum(
            sample.value
            for family in self._all().collect()
            if family.name == _TOKENS
            for sample in family.samples
            if sample.name == f"{_TOKENS}_total"
        )

    def _all(self) -> CollectorRegistry:
        if self._directory is None:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=self._directory)
        return registry


def forget_the_dead(directory: str) -> None:
    """Take out the gauges of processes that have ended: a worker that was killed has nothing in flight."""
    for file in Path(directory).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            mark_process_dead(int(pid), directory)
