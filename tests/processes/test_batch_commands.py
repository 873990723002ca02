"""`embedq run` as a process, with a fake service in it instead of Kafka: killed, stopped, and gone on with by the same command."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from embedq_batch.command import run
from embedq_batch.content.addresses import typed
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.manifest.store import glance
from tests.helpers.batch_runs import a_table, assert_vectors
from tests.helpers.fake_service import OLD
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.support import patient, wait_for

PROGRAM = """
import os
import sys
from embedq_batch.running import runner, writing
from embedq_batch.command import {command} as command
from embedq_sdk import client
from tests.helpers.fake_service import FakeService
from tests.helpers.fake_transport import FakeTransport

client.KafkaTransport = FakeTransport
left = int(os.environ.get("ANSWERED", sys.maxsize))
answers = FakeService.answers

def some_answers(self, received):
    global left
    left -= len(received.texts)
    return answers(self, received) if left >= 0 else []

FakeService.answers = some_answers
runner._WRITE_ROWS, writing._FLUSH_ROWS = 200, 400
command(prog_name="embedq {command}")
"""


def started(
    *arguments: str, command: str = "run", stdin: int = subprocess.DEVNULL, answered: int = sys.maxsize
) -> subprocess.Popen[bytes]:
    """The command; its service answers so many texts, so that it cannot end before a test has seen it at work."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(command=command), *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"EMBEDQ_KAFKA_SERVERS": "fake:9092", "ANSWERED": str(answered)},
    )


def ended(process: subprocess.Popen[bytes], given: bytes | None = None) -> tuple[int, str]:
    _, told = process.communicate(given, timeout=patient(60))
    assert b"Traceback" not in told, told.decode()
    return process.returncode, told.decode()


def done_rows(manifest: Path) -> int:
    try:
        return glance(manifest)[2].done
    except sqlite3.Error:  # not there yet, or not yet a whole one
        return 0


def test_a_run_that_is_killed_goes_on_by_the_same_command(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(4000)]
    out = tmp_path / "out.parquet"
    manifest = tmp_path / "out.parquet.embedq" / MANIFEST
    command = ("--from", a_table(tmp_path / "in.parquet", texts), "--to", str(out), "--batch-size", "16")
    chance = random.Random(7)
    for _ in range(2):
        more = chance.randrange(1, 700)
        target = done_rows(manifest) + more
        process = started(
            *command, answered=more + 1000
        )  # a flush, and what is written before one, come late
        wait_for(lambda: done_rows(manifest) >= target, what="some rows")  # noqa: B023
        process.kill()
        process.communicate()
    before = done_rows(manifest)
    assert not out.exists()

    code, told = ended(started(*command, "--check", "20"))

    assert code == 0
    assert f"{before:,} done before" in told
    assert "check of 20 rows: 0 missing, 0 different" in told
    assert_vectors(out, dict(enumerate(texts)), OLD)


def test_ctrl_c_says_how_far_it_came_and_what_to_type(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(20_000)]
    manifest = tmp_path / "out.jsonl.embedq" / MANIFEST
    table = a_table(tmp_path / "in.parquet", texts)
    process = started("--from", table, "--to", str(tmp_path / "out.jsonl"), answered=10_000)
    wait_for(lambda: done_rows(manifest) > 0, what="some rows")
    process.send_signal(signal.SIGINT)
    code, told = ended(process)

    assert code == 130
    assert " of 20,000 rows, " in told
    assert f"this goes on: embedq --from {tmp_path}/in.parquet --to" in told
    listed = started(str(tmp_path), command="runs")
    out, _ = listed.communicate(timeout=patient(60))
    assert f"out.jsonl: stopped, {done_rows(manifest):,} of 20,000 rows".encode() in out
    assert b"goes on with: embedq --from" in out


def test_json_lines_come_from_standard_input(tmp_path: Path) -> None:
    lines = b"".join(
        msgspec.json.encode({"id": f"r{n}", "title": "T", "body": str(n)}) + b"\n" for n in range(50)
    )
    process = started(
        *("--from", "-", "--to", str(tmp_path / "out.parquet"), "--id-column", "id"),
        *("--template", "{title}: {body}", "--keep", "body"),
        stdin=subprocess.PIPE,
    )
    code, told = ended(process, lines)

    assert (code, told.count("\n")) == (0, 1)
    assert told.startswith("embedq: complete: 50 rows under sha256:aaaa")
    assert ", 0.0 s of the device), 0 done before" in told
    assert_vectors(tmp_path / "out.parquet", {f"r{n}": f"T: {n}" for n in range(50)}, OLD)
    assert pq.read_table(tmp_path / "out.parquet").column("body").to_pylist() == [str(n) for n in range(50)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "{no}.parquet", "--to", "{out}"), "no such file"),
        (("--from", "{source}", "--to", "x.xlsx"), "`to`: expected"),
        (("--from", "{source}", "--to", "{out}", "--text-column", "body"), "no column 'body' among text"),
        (("--from", "{source}", "--to", "{out}", "--template", "{{text"), "`template`: expected"),
        (("--from", "{source}", "--to", "{out}", "--dimensions", "5"), "`dimensions`: expected"),
        (("--from", "{source}", "--to", "{out}", "--chunk-tokens", "5"), "--chunk-tokens is for"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("embedq_sdk.client.KafkaTransport", FakeTransport)
    names = {
        "no": tmp_path / "no",
        "source": a_table(tmp_path / "in.parquet", ["a"]),
        "out": tmp_path / "out.parquet",
    }

    done = CliRunner().invoke(
        run, [argument.format(**names) for argument in arguments], env={"EMBEDQ_KAFKA_SERVERS": "fake:9092"}
    )

    assert done.exit_code in (1, 2)
    assert said in done.output
    assert "Traceback" not in done.output


def test_a_command_is_kept_without_its_secrets() -> None:
    given = [
        "run",
        "--to",
        "postgresql://me:secret@db/x#docs",
        "--from=qdrant:https://me:secret@db#a",
        "-x y",
    ]

    shown = typed([*given, "--sasl-password", "secret", "--oauth-client-secret=secret"])

    assert shown == (
        "embedq run --to 'postgresql://me@db/x#docs' '--from=qdrant:https://me@db#a' '-x y' "
        "--sasl-password '…' '--oauth-client-secret=…'"
    )


def test_two_runs_do_not_work_on_one_output(tmp_path: Path) -> None:
    """The first one waits for its standard input; the second one is refused, and disturbs nothing."""
    out = tmp_path / "out.parquet"
    first = started("--from", "-", "--to", str(out), stdin=subprocess.PIPE)
    assert first.stdin is not None
    first.stdin.write(b'{"text": "one"}\n')
    first.stdin.flush()
    wait_for((tmp_path / "out.parquet.embedq" / MANIFEST).exists, what="the manifest")
    second, told = ended(started("--from", a_table(tmp_path / "in.parquet", ["a"]), "--to", str(out)))
    code, _ = ended(first, b'{"text": "two"}\n')

    assert second == 1
    assert "in use: another process" in told
    assert code == 0
    assert_vectors(out, {0: "one", 1: "two"}, OLD)
