"""`embedq embed` as a process, with a fake service in it instead of Kafka: what comes out while something goes in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from tests.helpers.fake_service import expected
from tests.helpers.support import patient, wait_for

PROGRAM = """
from embedq_sdk import client
from embedq_sdk.cli import main
from tests.helpers.fake_transport import FakeTransport

client.KafkaTransport = FakeTransport
main()
"""
ENVIRON = os.environ | {"EMBEDQ_KAFKA_SERVERS": "fake:9092"}


def started(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "embed", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRON,
    )


def test_a_line_is_answered_while_the_next_one_is_still_awaited() -> None:
    process = started("-", "--with-text")
    assert process.stdin is not None
    assert process.stdout is not None
    for text in ("one", "two"):
        process.stdin.write(text.encode() + b"\n")
        process.stdin.flush()
        line = msgspec.json.decode(process.stdout.readline())
        assert line["text"] == text
        assert np.array_equal(np.float32(line["embedding"]), expected(text))
    rest, told = process.communicate(b"three", timeout=patient(60))
    assert msgspec.json.decode(rest)["text"] == "three"
    assert (process.returncode, told) == (0, b"")


def test_a_file_as_standard_input_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "t{n}", "id": {n}}}\n' for n in range(3000)))
    with open(tmp_path / "rows.jsonl", "rb") as rows:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "embed", "-", "--format", "jsonl", "--with-text"],
            stdin=rows,
            capture_output=True,
            env=ENVIRON,
            timeout=patient(60),
            check=True,
        )
    lines = [msgspec.json.decode(line) for line in done.stdout.splitlines()]
    assert [(line["id"], line["text"]) for line in lines] == [(n, f"t{n}") for n in range(3000)]


def test_a_bad_line_is_named() -> None:
    _, told = started("-", "--format", "jsonl").communicate(b'{"text": "one"}\nno\n', timeout=patient(60))
    assert told.startswith(b"embedq: -: line 2: expected a JSON object")
    assert told.count(b"\n") == 1


def ended(*arguments: str) -> tuple[int, bytes]:
    process = started(*arguments)
    _, told = process.communicate(b"", timeout=patient(60))
    return process.returncode, told


def test_a_file_is_written_once_and_again_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert ended("one", "two", "--out", str(out)) == (0, b"")
    before = out.read_bytes()

    code, told = ended("three", "--out", str(out))
    assert (code, told.count(b"\n")) == (2, 1)
    assert b"exists: give another name, or --force" in told
    assert out.read_bytes() == before

    assert ended("three", "--out", str(out), "--force") == (0, b"")
    assert len(out.read_bytes().splitlines()) == 1


def test_no_texts_are_an_empty_file(tmp_path: Path) -> None:
    assert ended("-", "--out", str(tmp_path / "out.jsonl")) == (0, b"")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_what_was_written_before_ctrl_c_stays_and_is_told(tmp_path: Path) -> None:
    process = started("-", "--out", str(tmp_path / "out.jsonl"))
    assert process.stdin is not None
    process.stdin.write(b"text\n" * 100)
    process.stdin.flush()
    part = tmp_path / "out.jsonl.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 0, what="the part")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=patient(60))

    assert process.returncode != 0
    assert b"Traceback" not in told
    assert not (tmp_path / "out.jsonl").exists()
    assert f"{len(part.read_bytes().splitlines())} texts are in {part}".encode() in told
