"""The pages' examples of clients and adapters, run as they stand there but for the addresses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest

from embedq_sdk.blocking import EmbedClient
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT: Final = Path(__file__).parents[2]
TEXTS: Final = ["the tide", "the moon", "a court"]
EXAMPLES: Final = [
    pytest.param(source, id=f"{page}-{n}")
    for page in ("python", "gateway")
    for n, source in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_does_what_it_says(
    source: str,
    url: str,
    stack: DevStack,
    topics: Topics,
    embedq: EmbedClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(map(_line, TEXTS)))
    stored: list[int] = []
    names: dict[str, Any] = {"texts": TEXTS, "store": lambda index, vector: stored.append(index)}
    prefix = f"topic_prefix={topics.prefix!r}"
    if "EmbedqEmbedding(" in source or "EmbedqTextEmbedder(" in source:
        prefix = f"settings=dict({prefix})"
    program = source.replace('"localhost:9092"', f"{stack.kafka_servers!r}, {prefix}").replace(
        "http://127.0.0.1:8080", url
    )
    exec(compile(program, "page", "exec"), names)  # noqa: S102  # the pages are ours
    documents, query = embedq.embed(TEXTS), embedq.embed("Where does the Danube end?", input_type="query")
    for name, wanted in {"found": documents, "vectors": documents, "query": query, "vector": query}.items():
        if name in names:
            assert np.array_equal(np.asarray(names[name], dtype=np.float32), wanted), name
    if "embedded" in names:
        assert [each.content for each in names["embedded"]] == TEXTS
        assert all(each.embedding for each in names["embedded"])
    if "store(" in source:
        assert stored == [0, 1, 2]
    if "batches.create(" in source:
        results = [
            msgspec.json.decode(line) for line in (tmp_path / "vectors.jsonl").read_bytes().splitlines()
        ]
        assert {each["custom_id"] for each in results} == set(TEXTS)


def _line(text: str) -> bytes:
    """A line of a batch."""
    body = {"model": "default", "input": text}
    return msgspec.json.encode({"custom_id": text, "method": "POST", "url": "/v1/embeddings", "body": body})
