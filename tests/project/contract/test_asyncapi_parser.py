"""The AsyncAPI project's own parser accepts the document."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedq_sdk.dev.jars import cache_directory
from tests.helpers.support import patient
from tools.schemas import SPEC

HERE = Path(__file__).parent
LOCK = HERE / "package-lock.json"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def modules() -> Path:
    """A folder outside the source tree with the pinned parser installed, kept between runs."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"no {command} on the PATH: the AsyncAPI project's parser is a Node.js package")
    folder = (
        cache_directory(os.environ) / f"asyncapi-parser-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / "lock"):
        if not (folder / "complete").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name, folder / name)
            done = subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=patient(100),
                check=False,
            )
            if done.returncode and any(
                sign in done.stderr
                for sign in ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH")
            ):
                pytest.skip("npm reaches no registry, and the AsyncAPI project's parser is not installed yet")
            assert done.returncode == 0, done.stderr
            (folder / "complete").touch()
    return folder


def parse(document: Path, modules: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", str(HERE / "parse_asyncapi.mjs"), str(document), str(modules)],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )


def test_the_asyncapi_parser_accepts_the_document(modules: Path) -> None:
    done = parse(SPEC / "asyncapi.yaml", modules)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == found["warnings"] == []
    assert found["version"] == "3.0.0"
    assert set(found["topics"]) == {
        "embed.jobs",
        "embed.jobs.bulk",
        "embed.results",
        "embed.replies",
        "embed.control",
        "embed.status",
        "embed.dlq",
        None,
    }


@pytest.mark.parametrize(
    ("right", "wrong"), [("action: send", "action: publish"), ("./job.schema.json", "./no_such_file.json")]
)
def test_the_asyncapi_parser_refuses_a_broken_document(
    modules: Path, tmp_path: Path, right: str, wrong: str
) -> None:
    shutil.copytree(SPEC, tmp_path / "spec")
    document = tmp_path / "spec" / "asyncapi.yaml"
    text = document.read_text(encoding="utf-8")
    assert right in text
    document.write_text(text.replace(right, wrong), encoding="utf-8")
    done = parse(document, modules)
    assert done.returncode == 1
    assert json.loads(done.stdout)["errors"] != []


def test_the_lock_file_names_no_registry() -> None:
    packages = json.loads(LOCK.read_text(encoding="utf-8"))["packages"]
    assert len(packages) > 1
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []
