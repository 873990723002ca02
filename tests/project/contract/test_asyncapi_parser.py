"""The AsyncAPI project's own parser accepts the document."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.node_modules import node_modules
from tests.helpers.support import patient
from tools.schemas import SPEC

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LOCKS = sorted(ROOT.glob("tests/**/package-lock.json"))


@pytest.fixture(scope="module")
def modules() -> Path:
    """A folder outside the source tree with the pinned parser installed, kept between runs."""
    return node_modules(HERE, "asyncapi-parser", "the AsyncAPI project's parser")


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


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.parent.name)
def test_a_lock_file_names_no_registry(lock: Path) -> None:
    packages = json.loads(lock.read_text(encoding="utf-8"))["packages"]
    assert len(packages) > 1
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []
