"""The cache of Kafka's files: complete or absent, whatever happens to those who fill it."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from msgspec.structs import replace

from embedq_sdk.dev import DevStackError
from embedq_sdk.dev.jars import KafkaFiles, cache_directory, fetch, find_kafka, kept_connections
from tests.helpers.http_server import serving
from tests.helpers.support import patient, wait_for


@pytest.fixture
def empty(tmp_path: Path) -> KafkaFiles:
    return find_kafka({"EMBEDQ_CACHE_DIR": str(tmp_path / "cache")})


def test_files_come_over_a_connection_that_stays_open() -> None:
    from jgo.util import http

    connections: list[object] = []

    class Repository(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            connections.append(self.client_address)
            super().setup()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"jar")

        def log_message(self, *_: object) -> None: ...

    with serving(Repository) as server:
        url = f"http://127.0.0.1:{server.server_port}/a.jar"
        with kept_connections():
            answers = [http.get(url, timeout=patient(30)) for _ in range(3)]
    assert [answer.content for answer in answers] == [b"jar"] * 3
    assert len(connections) == 1


def put_files(files: KafkaFiles, directory: Path) -> None:
    for folder, name in (("jars", "a.jar"), ("jars", "b.jar"), ("formatted", "bootstrap.checkpoint")):
        (directory / folder).mkdir(exist_ok=True)
        (directory / folder / name).write_bytes(files.version.encode() * 1000)


def ignore(line: str) -> None:
    pass


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"EMBEDQ_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/h"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/h"}, "/b/embedq"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/embedq"),  # as the XDG specification asks
        ({"HOME": "/h"}, "/h/.cache/embedq"),
    ],
)
def test_the_cache_lies_where_the_user_keeps_his(
    environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", environ["HOME"])
    assert cache_directory(environ) == Path(expected)


def test_many_who_find_the_cache_empty_fill_it_once(empty: KafkaFiles) -> None:
    fills: list[Path] = []
    together = threading.Barrier(8)

    def fill(files: KafkaFiles, directory: Path) -> None:
        fills.append(directory)
        put_files(files, directory)

    def one(_: int) -> bool:
        together.wait(10)
        fetch(empty, ignore, fill)
        return empty.complete

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(8)))
    assert len(fills) == 1
    assert not fills[0].exists()  # it was renamed into place


def test_a_failed_fill_leaves_nothing_and_the_next_one_works(empty: KafkaFiles) -> None:
    def fail(files: KafkaFiles, directory: Path) -> None:
        put_files(files, directory)
        raise DevStackError("no network")

    with pytest.raises(DevStackError, match="no network"):
        fetch(empty, ignore, fail)
    assert not empty.complete
    assert [path.name for path in empty.directory.parent.iterdir()] == ["kafka-4.1.0.lock"]
    fetch(empty, ignore, put_files)
    assert empty.complete


def test_one_killed_half_way_leaves_nothing_that_looks_complete(empty: KafkaFiles) -> None:
    program = f"""
import sys, time
from pathlib import Path
from embedq_sdk.dev.jars import fetch, find_kafka
def fill(files, directory):
    (directory / "jars").mkdir()
    (directory / "jars" / "a.jar").write_bytes(b"half")
    time.sleep(600)
fetch(find_kafka({{"EMBEDQ_CACHE_DIR": {str(empty.directory.parent)!r}}}), print, fill)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: any(empty.directory.parent.glob(".kafka-*/jars/a.jar")))
        finally:
            process.kill()
    assert not empty.complete
    fetch(empty, ignore, put_files)  # its lock went with it
    assert empty.complete
    assert list(empty.directory.parent.glob(".kafka-*")) == []


@pytest.mark.parametrize("damage", ["shorten", "remove"])
def test_a_damaged_cache_is_filled_again(empty: KafkaFiles, damage: str) -> None:
    fetch(empty, ignore, put_files)
    jar = empty.directory / "jars" / "a.jar"
    jar.write_bytes(b"") if damage == "shorten" else jar.unlink()
    assert not empty.complete
    fetch(empty, ignore, put_files)
    assert empty.complete


def test_a_complete_cache_is_left_alone(empty: KafkaFiles) -> None:
    fetch(empty, ignore, put_files)
    said: list[str] = []

    def fill(files: KafkaFiles, directory: Path) -> None:
        raise AssertionError("filled again")

    fetch(empty, said.append, fill)
    assert said == []


def test_a_cache_that_cannot_be_written_is_told_with_the_variable_that_moves_it(
    empty: KafkaFiles, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    files = replace(empty, directory=tmp_path / "file" / "kafka-4.1.0")
    with pytest.raises(DevStackError, match="set EMBEDQ_CACHE_DIR"):
        fetch(files, ignore, put_files)
