"""Clients that are not Python: OpenAI's own for Node.js, Spring AI, and curl as the pages show it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from embedq_sdk.embeddings import Vectors
from tests.clients.conftest import TEXTS, same_bits
from tests.helpers.node_modules import NO_NETWORK, node_modules
from tests.helpers.support import patient

pytestmark = pytest.mark.kafka

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LISTED = [text for text in TEXTS if text]
"""Without the empty one, which Spring AI refuses to send."""


def ran(*command: str, seconds: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=patient(seconds), check=False, cwd=cwd
    )


@pytest.fixture(scope="module")
def listed(expected: Vectors) -> Vectors:
    return expected[[n for n, text in enumerate(TEXTS) if text]]


# Some of the README's and the gateway page's commands name the default address, and some show the answer.
@pytest.mark.parametrize("page", ["README.md", "docs/gateway.md"])
def test_curl_as_the_pages_show_it(page: str, url: str, expected: Vectors) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on the PATH")
    lines = re.findall(
        r"^curl (.*/v1/embeddings.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert lines
    for line in lines:
        arguments = [part.replace("http://127.0.0.1:8080", url) for part in shlex.split(line)]
        done = ran("curl", "-sS", "--fail-with-body", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        (item,) = json.loads(done.stdout)["data"]
        assert len(item["embedding"]) == expected.shape[1]


@pytest.mark.slow
def test_openai_for_node(v1: str, expected: Vectors) -> None:
    folder = node_modules(HERE / "node", "openai-node", "OpenAI's client")
    done = ran("node", str(HERE / "node" / "embed.mjs"), v1, str(folder), *TEXTS)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert same_bits(said["vectors"], expected)  # it asks for base64, as the Python package does
    assert np.array_equal(np.array(said["floats"], dtype=np.float32), expected)
    assert said["models"] == ["default"]
    assert said["refused"] == {"kind": "NotFoundError", "status": 404, "code": "unknown_model"}


@pytest.fixture(scope="module")
def spring_ai(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The class path of Spring AI, from Maven."""
    for command in ("mvn", "java"):
        if shutil.which(command) is None:
            pytest.skip(f"no {command} on the PATH: Spring AI is a Maven package")
    found = tmp_path_factory.mktemp("spring") / "classpath"
    pom = str(HERE / "spring" / "pom.xml")
    done = ran(
        "mvn", "-q", "-B", "-f", pom, "dependency:build-classpath", f"-Dmdep.outputFile={found}", seconds=300
    )
    if done.returncode and any(
        sign in done.stdout for sign in ("Unknown host", "Network is unreachable", "Connect to", *NO_NETWORK)
    ):
        pytest.skip("Maven reaches no repository, and Spring AI is not in the local one yet")
    assert done.returncode == 0, done.stdout + done.stderr
    return found.read_text().strip()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_spring_ai(spring_ai: str, url: str, listed: Vectors) -> None:
    done = ran("java", "-cp", spring_ai, str(HERE / "spring" / "Embed.java"), url, *LISTED, seconds=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = [np.array(line[1:], dtype=np.int64) for line in lines if line[:1] == ["vector"]]
    bits = np.stack(rows).astype(np.uint32, casting="unsafe").view(np.float32)
    assert np.array_equal(bits, listed)
    assert int(next(line[1] for line in lines if line[:1] == ["tokens"])) > len(LISTED)
