"""What the README shows, run as it stands there."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest

from embedq_consumer.settings import Settings
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.service_process import Replica, replicas

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


async def printed_by(program: str, stack: DevStack) -> str:
    """What a program prints in an interpreter of its own, where the address of the stack is exported."""
    environ = {**os.environ, "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env=environ, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_first_block_runs_as_it_is_pasted() -> None:
    """Without the target's set-up, which made the interpreter that runs this test."""
    block = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0]
    assert block == "make demo\n"
    recipe = re.findall(r"^demo: setup.*\n\t@(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe == ["$(BIN)/python -m demo"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "demo", cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def test_the_python_examples_run_as_they_are_pasted(models: Path, tmp_path: Path) -> None:
    # The examples use the default topic prefix: a stack of their own keeps other tests out of it.
    complete, source = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    stored: list[tuple[int, Any, str]] = []

    def endless() -> Iterator[str]:
        yield from (f"text {number}" for number in range(40))

    stack = DevStack(environ={})
    await asyncio.to_thread(stack.start)
    try:
        await create_topics(stack.kafka_servers, partitions=2, reply_partitions=2)
        replica = Replica(stack, Topics(), models / "qwen", tmp_path / "log")
        async with replicas(replica):
            assert "float32" in await printed_by(complete, stack)
            source = source.replace("localhost:9092", stack.kafka_servers)
            imports = [line for line in source.splitlines() if line.startswith(("from ", "import "))]
            body = "\n".join(
                line for line in source.splitlines() if not line.startswith(("from ", "import "))
            )
            names: dict[str, Any] = {
                "texts": ["a", "b", "c"],
                "book": "The moon is round, and the old stone wall is near. " * 600,
                "endless": endless,
                "store": lambda *found: stored.append(found),
            }
            program = "\n".join([*imports, "async def main():", indent(body, "    "), "    return locals()"])
            exec(compile(program, "README.md", "exec"), names)  # noqa: S102  # the README is ours
            found = await names["main"]()
    finally:
        await asyncio.to_thread(stack.close)

    (hidden,) = found["one"].shape
    assert found["one"].dtype == np.float32
    assert found["many"].shape == (2, 256)
    np.testing.assert_allclose(np.linalg.norm(found["many"], axis=1), 1, atol=1e-5)
    assert found["detailed"].model_versions[0].startswith("sha256:")
    assert (found["array"].shape, found["array"].dtype) == ((3, hidden), np.float32)
    assert len(found["spans"]) > 9
    assert found["spans"][0].end == found["spans"][1].start > 256
    assert found["whole"].shape == (hidden,)
    assert sorted(index for index, _, _ in stored) == list(range(40))


def test_every_setting_named_exists() -> None:
    named = {name.removeprefix("EMBEDQ_").lower() for name in re.findall(r"`(EMBEDQ_[A-Z_]+)`", README)}
    assert named <= set(Settings.__struct_fields__)
