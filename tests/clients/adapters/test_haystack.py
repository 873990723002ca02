"""What Haystack does with a component: runs it alone and in a pipeline, with an event loop and without, and writes it into a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from embedq_sdk import InvalidArgument
from tests.helpers.fake_service import OLD, FakeService, expected
from tests.helpers.lazily import lazily

if TYPE_CHECKING:
    import haystack.utils

    from embedq_sdk.adapters import haystack as adapter
else:
    haystack = lazily("haystack")
    adapter = lazily("embedq_sdk.adapters.haystack")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("haystack") is None, reason="needs Haystack"),
    pytest.mark.filterwarnings("default"),  # what Haystack deprecates in itself is no matter of ours
]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Not in an event loop."""
    _ = adapter.EmbedqTextEmbedder


def test_a_query_is_sent_as_a_query(service: FakeService) -> None:
    embedder = adapter.EmbedqTextEmbedder(
        "fake:9092", query_instruction="find", prefix="<", suffix=">", model="m", model_version=OLD
    )
    embedder.warm_up()
    found = embedder.run("q")
    assert found["embedding"] == expected("<q>").tolist()
    assert found["meta"] == {
        "model": "m",
        "model_version": OLD,
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    assert (service.received[0].job.input_type, service.received[0].job.instruction) == ("query", "find")
    assert service.received[0].job.model_version == OLD


def test_documents_are_sent_as_documents_with_the_fields_that_are_asked_for(service: FakeService) -> None:
    documents = [
        haystack.Document(content="one", meta={"title": "T", "page": 3, "none": None}),
        haystack.Document(content="two"),
        haystack.Document(content=None),
    ]
    embedder = adapter.EmbedqDocumentEmbedder(
        "fake:9092", meta_fields_to_embed=["title", "none", "page"], embedding_separator=" | "
    )
    found = embedder.run(documents)
    assert service.received[0].texts == ["T | 3 | one", "two", ""]
    assert service.received[0].job.input_type == "document"
    assert [each.embedding for each in found["documents"]] == [
        expected(text).tolist() for text in ("T | 3 | one", "two", "")
    ]
    assert [each.id for each in found["documents"]] == [each.id for each in documents]
    assert [each.embedding for each in documents] == [None] * 3
    assert embedder.run([]) == {"documents": [], "meta": {}}


async def test_components_run_in_an_event_loop(service: FakeService) -> None:
    found = await adapter.EmbedqTextEmbedder("fake:9092").run_async("q")
    assert found["embedding"] == expected("q").tolist()
    embedder = adapter.EmbedqDocumentEmbedder("fake:9092")
    embedded = await embedder.run_async([haystack.Document(content="d")])
    assert embedded["documents"][0].embedding == expected("d").tolist()
    assert (await embedder.run_async([]))["documents"] == []


@pytest.mark.parametrize(
    ("embedder", "given", "advice"),
    [
        ("EmbedqTextEmbedder", lambda: [haystack.Document(content="d")], "EmbedqDocumentEmbedder"),
        ("EmbedqDocumentEmbedder", lambda: "q", "EmbedqTextEmbedder"),
        ("EmbedqDocumentEmbedder", lambda: ["q"], "EmbedqTextEmbedder"),
    ],
)
def test_the_wrong_kind_of_input_is_answered_with_the_right_component(
    embedder: str, given: Callable[[], Any], advice: str
) -> None:
    with pytest.raises(TypeError, match=advice):
        getattr(adapter, embedder)("fake:9092").run(given())


LOADING: dict[str, Any] = {"allowed_modules": ["embedq_sdk.adapters.haystack"]}
"""Haystack 3 imports no module of others on a file's word alone."""


def a_pipeline(**settings: Any) -> haystack.Pipeline:
    pipeline = haystack.Pipeline()
    pipeline.add_component(
        "query", adapter.EmbedqTextEmbedder("fake:9092", query_instruction="find", **settings)
    )
    pipeline.add_component("documents", adapter.EmbedqDocumentEmbedder("fake:9092", lane="bulk", **settings))
    return pipeline


def test_a_pipeline_is_written_and_read_with_the_name_of_its_secret(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    settings: dict[str, Any] = {
        "timeout": 60.0,
        "sasl_plain_password": haystack.utils.Secret.from_env_var("KAFKA_PASSWORD"),
        "settings": {"security_protocol": "SASL_PLAINTEXT", "sasl_plain_username": "u"},
    }
    written = a_pipeline(**settings).dumps()
    assert "hunter2" not in written
    assert "KAFKA_PASSWORD" in written
    again = haystack.Pipeline.loads(written, **LOADING)
    assert again.dumps() == written
    found = again.run({"query": {"text": "q"}, "documents": {"documents": [haystack.Document(content="d")]}})
    assert found["query"]["embedding"] == expected("q").tolist()
    assert found["documents"]["documents"][0].embedding == expected("d").tolist()
    assert {job.topic for job in service.received} == {"embed.jobs", "embed.jobs.bulk"}


def test_a_pipeline_without_a_login_is_written_and_read(service: FakeService) -> None:
    written = a_pipeline().dumps()
    assert haystack.Pipeline.loads(written, **LOADING).dumps() == written


def test_a_wrong_setting_is_refused_when_it_is_made() -> None:
    with pytest.raises(InvalidArgument, match="dimensions"):
        adapter.EmbedqTextEmbedder("fake:9092", dimensions=3)
    with pytest.raises(InvalidArgument, match="as a Secret") as raised:
        adapter.EmbedqTextEmbedder("fake:9092", settings={"sasl_plain_password": "hunter2"})
    assert "hunter2" not in str(raised.value)
