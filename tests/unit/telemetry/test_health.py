"""Health and metrics over HTTP, and the logs."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from prometheus_client import Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from embedq_consumer.telemetry import logs
from embedq_consumer.telemetry.health import CannotListen, Connections, Health, HealthServer
from embedq_consumer.telemetry.metrics import Metrics
from tests.helpers.support import patient


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server looks more often whether it is to end: each test has one or two."""
    monkeypatch.setattr("embedq_consumer.telemetry.health._POLL_S", 0.01)


class Served:
    def __init__(self) -> None:
        self.clock = Clock()
        self.health = Health()
        self.metrics = Metrics()
        self.server = HealthServer(0, self.metrics.registry, self.health, host="127.0.0.1", clock=self.clock)

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=patient(10))
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
        finally:
            connection.close()

    def json(self, path: str) -> tuple[int, dict[str, Any]]:
        status, content_type, body = self.get(path)
        assert content_type == "application/json"
        return status, json.loads(body)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.server.close()


def test_a_loop_is_alive_up_to_its_own_limit() -> None:
    health = Health()
    health.register("intake", 10, now=0)
    health.register("engine", 100, now=0)
    assert health.live(10).well
    dead = health.live(11)
    assert not dead.well
    assert dead.facts["reason"] == "no heartbeat from intake"
    assert dead.facts["loops"] == {
        "intake": {"age_s": 11, "limit_s": 10},
        "engine": {"age_s": 11, "limit_s": 100},
    }
    health.beat("intake", 11)
    assert health.live(20).well


def test_the_oldest_beat_is_that_of_the_slowest_loop() -> None:
    health = Health()
    assert health.oldest_beat(50) == 0
    health.register("intake", 10, now=0)
    health.register("engine", 100, now=3)
    assert health.oldest_beat(5) == 5
    health.beat("intake", 4)
    assert health.oldest_beat(5) == 2


def test_a_beat_of_a_loop_that_is_not_registered_is_ignored() -> None:
    health = Health()
    health.beat("intake", 1)
    assert health.live(1000).well
    assert health.oldest_beat(1000) == 0


def test_a_late_beat_does_not_turn_time_back() -> None:
    health = Health()
    health.register("intake", 10, now=0)
    health.beat("intake", 20)
    health.beat("intake", 15)
    assert health.live(29).well


def test_it_is_not_ready_until_somebody_says_so_and_never_when_a_loop_is_silent() -> None:
    health = Health()
    health.register("intake", 10, now=0)
    assert health.ready(0).facts == {"status": "not ready", "reason": "starting"}
    health.set_ready(None)
    assert health.ready(0).well
    assert health.ready(11).facts["reason"] == "no heartbeat from intake"
    health.set_ready("draining")
    assert health.ready(0).facts["reason"] == "draining"


def test_a_part_may_keep_a_service_that_takes_jobs_from_being_ready() -> None:
    health = Health()
    health.set_ready(None)
    health.hinder("watermark", "stuck")
    assert health.ready(0).facts == {"status": "not ready", "reason": "stuck"}
    health.hinder("watermark", None)
    assert health.ready(0).well


def test_threads_may_beat_and_ask_at_once() -> None:
    health = Health()

    def work(name: str) -> None:
        for now in range(500):
            health.register(name, 1000, now)
            health.beat(name, now)
            assert health.live(now).well

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, f"loop {n}") for n in range(8)]:
            done.result()
    assert health.live(499).facts["loops"] == {f"loop {n}": {"age_s": 0, "limit_s": 1000} for n in range(8)}


def test_livez_is_503_while_a_loop_is_silent_and_200_again_after(served: Served) -> None:
    served.health.register("engine", 30, served.clock.now)
    assert served.json("/livez")[0] == 200
    served.clock.now += 31
    status, facts = served.json("/livez")
    assert status == 503
    assert facts["reason"] == "no heartbeat from engine"
    served.health.beat("engine", served.clock.now)
    assert served.json("/livez")[0] == 200


def test_readyz_is_503_with_the_reason_until_ready(served: Served) -> None:
    served.health.set_ready("loading the model")
    assert served.json("/readyz") == (503, {"status": "not ready", "reason": "loading the model"})
    served.health.set_ready(None)
    assert served.json("/readyz") == (200, {"status": "ok"})
    served.health.tell({"batch_tokens": 16})
    served.health.tell({"model": "m"})
    assert served.json("/readyz") == (200, {"status": "ok", "batch_tokens": 16, "model": "m"})


def test_metrics_are_the_registry_in_the_form_that_was_asked_for(served: Served) -> None:
    served.metrics.cache.labels("hit").inc(3)
    plain = served.get("/metrics")
    assert plain[0] == 200
    assert plain[1].startswith("text/plain")
    by_name = {family.name: family for family in parse_plain(plain[2])}
    hits = [
        sample.value
        for sample in by_name["embedq_cache_lookups"].samples
        if sample.name.endswith("_total") and sample.labels["outcome"] == "hit"
    ]
    assert hits == [3]

    accept = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    status, content_type, body = served.get("/metrics", Accept=accept)
    assert status == 200
    assert content_type.startswith("application/openmetrics-text")
    assert "embedq_cache_lookups" in {family.name for family in parse_openmetrics(body)}


def test_other_paths_are_404_and_queries_are_ignored(served: Served) -> None:
    assert served.json("/")[0] == 404
    assert served.json("/metrics/../secret")[0] == 404
    assert served.json("/readyz?verbose=1")[0] == 503
    assert served.get("/livez", method="HEAD")[2] == ""
    assert served.get("/livez", method="POST")[0] == 501


def test_a_peer_that_says_nothing_or_nonsense_does_not_stop_the_others(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ("127.0.0.1", served.server.port)
    with socket.create_connection(address), socket.create_connection(address) as rude:
        rude.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        for _ in range(20):
            with socket.create_connection(address) as gone:
                gone.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert served.json("/livez")[0] == 200
    assert capsys.readouterr() == ("", "")


def test_more_connections_than_there_may_be_make_the_oldest_give_way(served: Served) -> None:
    address = ("127.0.0.1", served.server.port)
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        # No more than may wait to be accepted: the kernel tries one that is too many again after a second.
        held = [stack.enter_context(socket.create_connection(address)) for _ in range(120)]
        for each in held:
            with contextlib.suppress(OSError):
                each.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        assert served.json("/livez")[0] == 200
        held[0].settimeout(patient(10))
        with contextlib.suppress(ConnectionResetError):
            assert held[0].recv(1) == b""  # it was hung up
        assert threading.active_count() - before < 100
        assert len(served.server._server._connections) <= 32


def test_a_connection_has_so_long_in_all_however_it_spends_its_time() -> None:
    connections = Connections(most=2, longest_s=10)
    first, second, third = (socket.socket() for _ in range(3))
    try:
        assert connections.add(first, 0) == []
        assert connections.add(second, 5) == []
        assert connections.overdue(10) == []
        assert connections.overdue(10.1) == [first]
        assert connections.overdue(10.1) == []
        assert connections.add(first, 11) == []
        assert connections.add(third, 12) == [second]
        connections.remove(first)
        connections.remove(second)
        assert len(connections) == 1
    finally:
        for each in (first, second, third):
            each.close()


def test_a_peer_that_sends_a_byte_now_and_then_is_hung_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq_consumer.telemetry.health._REQUEST_S", 0.3)
    one = Served()
    try:
        with socket.create_connection(("127.0.0.1", one.server.port), timeout=patient(20)) as slow:
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - began < patient(20):
                    slow.sendall(b"x")
                    readable, _, _ = select.select([slow], [], [], 0.05)
                    if readable and slow.recv(1) == b"":
                        break
            assert time.monotonic() - began < patient(20)
    finally:
        one.server.close()


def test_a_head_without_an_end_is_not_read_to_it(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=patient(10)) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            for n in range(50):
                peer.sendall(b"X-%d: " % n + b"x" * 1000 + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(100).startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
    assert served.json("/livez")[0] == 200


def test_each_answer_ends_its_connection(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=patient(10)) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while piece := peer.recv(4096):
            answer += piece
    assert b"Connection: close" in answer


async def test_it_answers_while_the_event_loop_is_stuck(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.json, "/livez").result(timeout=patient(30))
        # the loop is blocked until then
    assert answer[0] == 200


def test_a_metric_that_cannot_be_read_is_logged_and_the_next_scrape_answered(
    served: Served, written: io.StringIO
) -> None:
    logs.configure("info", stream=written)
    broken = Gauge("broken", "Fails at each scrape.", registry=served.metrics.registry)
    broken.set_function(lambda: 1 / 0)
    with pytest.raises(http.client.HTTPException):
        served.get("/metrics")
    assert [line["event"] for line in lines(written)] == ["http_answer_failed"]
    served.metrics.registry.unregister(broken)
    assert served.get("/metrics")[0] == 200


def test_a_taken_port_is_an_error_at_once(served: Served) -> None:
    with pytest.raises(CannotListen, match=r"^HTTP_PORT: expected a port that is free, .* is in use"):
        HealthServer(served.server.port, served.metrics.registry, served.health, host="127.0.0.1")


def test_after_close_nothing_listens_and_the_port_is_free(served: Served) -> None:
    one = HealthServer(0, served.metrics.registry, served.health, host="127.0.0.1")
    one.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", one.port), timeout=patient(5))
    HealthServer(one.port, served.metrics.registry, served.health, host="127.0.0.1").close()


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Where configured logs go; the process's own configuration is put back afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, structlog.get_config(), warnings.showwarning
    yield io.StringIO()
    root.handlers[:], root.level = before[0], before[1]
    structlog.configure(**before[2])
    logging.captureWarnings(False)
    for name in logs._CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.contextvars.clear_contextvars()


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_an_event_is_one_line_of_json_with_its_context(written: io.StringIO) -> None:
    logs.configure("info", stream=written)
    structlog.contextvars.bind_contextvars(replica="r1")
    structlog.get_logger("embedq_consumer.batching.batch_loop").info(
        "batch_encoded", jobs=12, note="two\nlines"
    )
    (line,) = lines(written)
    stamp = line.pop("timestamp")
    assert stamp.endswith("Z")
    assert "T" in stamp
    assert line == {
        "level": "info",
        "event": "batch_encoded",
        "logger": "embedq_consumer.batching.batch_loop",
        "replica": "r1",
        "jobs": 12,
        "note": "two\nlines",
    }
    assert list(lines(written)[0])[:3] == ["timestamp", "level", "event"]


def test_libraries_go_the_same_way_and_the_chatty_ones_only_from_warning_on(written: io.StringIO) -> None:
    logs.configure("debug", stream=written)
    logging.getLogger("some.library").info("started %s", "well")
    logging.getLogger("aiokafka.consumer.fetcher").info("chatter")
    logging.getLogger("aiokafka.consumer.fetcher").warning("broker gone")
    assert [(line["logger"], line["level"], line["event"]) for line in lines(written)] == [
        ("some.library", "info", "started well"),
        ("aiokafka.consumer.fetcher", "warning", "broker gone"),
    ]


def test_the_level_holds_for_both_kinds_of_loggers(written: io.StringIO) -> None:
    logs.configure("error", stream=written)
    structlog.get_logger("a").warning("quiet")
    logging.getLogger("b").warning("quiet")
    logging.getLogger("aiokafka").warning("quiet")
    structlog.get_logger("a").error("loud")
    assert [line["event"] for line in lines(written)] == ["loud"]


def test_configuring_again_replaces(written: io.StringIO) -> None:
    logs.configure("info", stream=written)
    logs.configure("info", stream=written)
    structlog.get_logger("a").info("once")
    assert len(lines(written)) == 1


def test_an_exception_is_a_field_of_its_line(written: io.StringIO) -> None:
    logs.configure("info", stream=written)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        structlog.get_logger("a").exception("task_died")
        logging.getLogger("b").exception("library died")
    assert ["RuntimeError: broken" in line["exception"] for line in lines(written)] == [True, True]


def test_values_without_a_json_form_are_named_and_not_quoted(written: io.StringIO) -> None:
    logs.configure("info", stream=written)
    structlog.get_logger("a").info(
        "event", path=Path("/models/m"), vector=np.ones(3, np.float32), blob=b"secret", error=ValueError("x")
    )
    (line,) = lines(written)
    assert (line["path"], line["vector"], line["blob"], line["error"]) == (
        "/models/m",
        "<ndarray>",
        "<bytes>",
        "x",
    )


def test_stdout_is_the_default(written: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    assert logging.getLogger().handlers[0].stream is sys.stdout  # type: ignore[attr-defined]
    structlog.get_logger("a").info("event")
    assert json.loads(capsys.readouterr().out)["event"] == "event"
