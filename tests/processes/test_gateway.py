"""The gateway as a process, where Kafka is away: it listens, says why it is not ready, and leaves in order."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trustme

from tests.helpers.support import patient, wait_for


@contextmanager
def gateway(log: Path, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The process, gone at the end whatever happens. There is no Kafka at its address."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")} | {
        "EMBEDQ_KAFKA_SERVERS": "127.0.0.1:1",
        "EMBEDQ_GATEWAY_PORT": "0",
        "EMBEDQ_GATEWAY_DRAIN_DELAY_S": "0",
        **{f"EMBEDQ_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()},
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedq_gateway"], env=environ, stdout=out, stderr=out
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def url(log: Path) -> str:
    """Where it listens, as its log says."""

    def found() -> str | None:
        lines = log.read_bytes().splitlines()
        events = [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]
        return next((event["url"] for event in events if event["event"] == "listening"), None)

    wait_for(lambda: found() is not None, within=60, what=f"a gateway that listens: {log.read_text()}")
    where = found()
    assert where is not None
    return where


def test_without_kafka_it_answers_with_503_and_leaves_with_code_0(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with gateway(log) as process, httpx.Client(base_url=url(log), timeout=patient(60)) as http:
        assert http.get("/livez").status_code == 200
        assert http.get("/readyz").status_code == 503
        answer = http.post("/v1/embeddings", json={"input": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(patient(60)) == 0
    assert '"event":"leaving"' in log.read_text()
    assert '"status":503' in log.read_text()


def test_over_tls_a_client_that_trusts_the_authority_is_served_and_another_is_not(tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in own.cert_chain_pems))
    own.private_key_pem.write_to_path(key)
    log = tmp_path / "log"
    with gateway(log, tls_certfile=certificate, tls_keyfile=key):
        port = url(log).rpartition(":")[2]
        assert url(log).startswith("https://")
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        with httpx.Client(verify=trusting, timeout=patient(60)) as http:
            assert http.get(f"https://localhost:{port}/livez").status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://localhost:{port}/livez", timeout=patient(60))


def refused(log: Path, **settings: Any) -> str:
    """What it says where it cannot start."""
    with gateway(log, **settings) as process:
        assert process.wait(patient(60)) == 2
    return log.read_text()


def test_what_keeps_it_from_starting_is_told_in_a_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "log", worker=2) == (
        "embedq: unknown setting EMBEDQ_GATEWAY_WORKER; did you mean EMBEDQ_GATEWAY_WORKERS?\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path / "log", port=port)
    assert "EMBEDQ_GATEWAY_PORT: cannot listen on 127.0.0.1" in said
    assert "Traceback" not in said
    said = refused(tmp_path / "log", tls_certfile=tmp_path / "none.pem")
    assert said.startswith(
        "embedq: EMBEDQ_GATEWAY_TLS_CERTFILE, EMBEDQ_GATEWAY_TLS_KEYFILE: expected readable PEM"
    )


def test_the_garbage_collector_leaves_alone_what_stays() -> None:
    """Each full collection would halt all requests for as long as it walks through every library."""
    program = (
        "import gc; from embedq_gateway.app import create; create({'EMBEDQ_KAFKA_SERVERS': '127.0.0.1:1'}); "
        "print(gc.get_freeze_count(), len(gc.get_objects()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    frozen, others = map(int, done.stdout.split())
    assert frozen > 10_000
    assert others < 1_000
