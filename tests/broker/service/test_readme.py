"""What the README shows, run as it stands there."""

from __future__ import annotations

import asyncio
import re
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

README = (Path(__file__).parents[3] / "README.md").read_text()


async def test_the_python_examples_run(models: Path, tmp_path: Path) -> None:
    # The examples use the default topic prefix: a stack of their own keeps other tests out of it.
    with_imports = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)).replace(
        "localhost:9092", "{servers}"
    )
    stored: list[tuple[int, Any, str]] = []

    def endless() -> Iterator[str]:
        yield from (f"text {number}" for number in range(40))

    stack = DevStack(environ={})
    await asyncio.to_thread(stack.start)
    try:
        await create_topics(stack.kafka_servers, partitions=2, reply_partitions=2)
        replica = Replica(stack, Topics(), models / "qwen-a", tmp_path / "log")
        async with replicas(replica):
            source = with_imports.replace("{servers}", stack.kafka_servers)
            imports = [line for line in source.splitlines() if line.startswith("from ")]
            body = "\n".join(line for line in source.splitlines() if not line.startswith("from "))
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

    hidden = found["vector"].shape[0]
    assert found["vector"].dtype == np.float32
    assert found["one"].shape == (hidden,)
    assert found["many"].shape == (2, 256)
    np.testing.assert_allclose(np.linalg.norm(found["many"], axis=1), 1, atol=1e-5)
    assert found["told"].model_versions[0].startswith("sha256:")
    assert len(found["array"].vectors) == 3
    assert len(found["spans"]) > 9
    assert found["spans"][0].end == found["spans"][1].start > 256
    assert found["whole"].shape == (hidden,)
    assert sorted(index for index, _, _ in stored) == list(range(40))


def test_every_setting_named_exists() -> None:
    named = {name.removeprefix("EMBEDQ_").lower() for name in re.findall(r"`(EMBEDQ_[A-Z_]+)`", README)}
    assert named <= set(Settings.__struct_fields__)
