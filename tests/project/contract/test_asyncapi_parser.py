"""The AsyncAPI project's own parser accepts the document."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.node_modules import node_modules
from tests.helpers.support import patient
from tools.schemas import SPEC

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LOCKS = sorted(ROOT.glob("tests/**/package-lock.json"))


BREACHES = (("action: send", "action: publish"), ("./job.schema.json", "./no_such_file.json"))
"""What is written in the document, and what a broken copy of it says instead."""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the parser says of the document, then of each broken copy: in one process, since the parser takes seconds to start.

    It is installed, pinned, in a folder outside the source tree, kept between runs.
    """
    modules = node_modules(HERE, "asyncapi-parser", "the AsyncAPI project's parser")
    documents = [SPEC / "asyncapi.yaml"]
    text = documents[0].read_text(encoding="utf-8")
    for right, wrong in BREACHES:
        assert right in text
        copy = Path(shutil.copytree(SPEC, tmp_path_factory.mktemp("broken") / "spec")) / "asyncapi.yaml"
        copy.write_text(text.replace(right, wrong), encoding="utf-8")
        documents.append(copy)
    done = subprocess.run(
        ["node", str(HERE / "parse_asyncapi.mjs"), str(modules), *map(str, documents)],
        capture_output=True,
        text=True,
        timeout=patient(100),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_the_asyncapi_parser_accepts_the_document(parsed: list[dict[str, Any]]) -> None:
    found = parsed[0]
    assert found["understood"]
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


@pytest.mark.parametrize("number", range(len(BREACHES)), ids=[wrong for _, wrong in BREACHES])
def test_the_asyncapi_parser_refuses_a_broken_document(parsed: list[dict[str, Any]], number: int) -> None:
    assert parsed[1 + number]["errors"] != []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.parent.name)
def test_a_lock_file_names_no_registry(lock: Path) -> None:
    packages = json.loads(lock.read_text(encoding="utf-8"))["packages"]
    assert len(packages) > 1
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []
