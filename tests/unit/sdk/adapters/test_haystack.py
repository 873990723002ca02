"""What Haystack does with a component: runs it alone and in a pipeline, with an event loop and without, and writes it into a file."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default")  # what Haystack deprecates in itself is no matter of ours
haystack = pytest.importorskip("haystack")

from haystack import Document, Pipeline
from haystack.utils import Secret

from embedq_sdk import InvalidArgument
from embedq_sdk.adapters.haystack import EmbedqDocumentEmbedder, EmbedqTextEmbedder
from tests.helpers.fake_service import OLD, FakeService, expected


def test_a_query_is_sent_as_a_query(service: FakeService) -> None:
    embedder = EmbedqTextEmbedder(
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
        Document(content="one", meta={"title": "T", "page": 3, "none": None}),
        Document(content="two"),
        Document(content=None),
    ]
    embedder = EmbedqDocumentEmbedder(
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
    found = await EmbedqTextEmbedder("fake:9092").run_async("q")
    assert found["embedding"] == expected("q").tolist()
    embedder = EmbedqDocumentEmbedder("fake:9092")
    embedded = await embedder.run_async([Document(content="d")])
    assert embedded["documents"][0].embedding == expected("d").tolist()
    assert (await embedder.run_async([]))["documents"] == []


@pytest.mark.parametrize(
    ("embedder", "given", "advice"),
    [
        (EmbedqTextEmbedder, [Document(content="d")], "EmbedqDocumentEmbedder"),
        (EmbedqDocumentEmbedder, "q", "EmbedqTextEmbedder"),
        (EmbedqDocumentEmbedder, ["q"], "EmbedqTextEmbedder"),
    ],
)
def test_the_wrong_kind_of_input_is_answered_with_the_right_component(
    embedder: Any, given: Any, advice: str
) -> None:
    with pytest.raises(TypeError, match=advice):
        embedder("fake:9092").run(given)


LOADING: dict[str, Any] = {"allowed_modules": ["embedq_sdk.adapters.haystack"]}
"""Haystack 3 imports no module of others on a file's word alone."""


def a_pipeline(**settings: Any) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("query", EmbedqTextEmbedder("fake:9092", query_instruction="find", **settings))
    pipeline.add_component("documents", EmbedqDocumentEmbedder("fake:9092", lane="bulk", **settings))
    return pipeline


def test_a_pipeline_is_written_and_read_with_the_name_of_its_secret(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    settings: dict[str, Any] = {
        "timeout": 60.0,
        "sasl_plain_password": Secret.from_env_var("KAFKA_PASSWORD"),
        "settings": {"security_protocol": "SASL_PLAINTEXT", "sasl_plain_username": "u"},
    }
    written = a_pipeline(**settings).dumps()
    assert "hunter2" not in written
    assert "KAFKA_PASSWORD" in written
    again = Pipeline.loads(written, **LOADING)
    assert again.dumps() == written
    found = again.run({"query": {"text": "q"}, "documents": {"documents": [Document(content="d")]}})
    assert found["query"]["embedding"] == expected("q").tolist()
    assert found["documents"]["documents"][0].embedding == expected("d").tolist()
    assert {job.topic for job in service.received} == {"embed.jobs", "embed.jobs.bulk"}


def test_a_pipeline_without_a_login_is_written_and_read(service: FakeService) -> None:
    written = a_pipeline().dumps()
    assert Pipeline.loads(written, **LOADING).dumps() == written


def test_a_wrong_setting_is_refused_when_it_is_made() -> None:
    with pytest.raises(InvalidArgument, match="dimensions"):
        EmbedqTextEmbedder("fake:9092", dimensions=3)
    with pytest.raises(InvalidArgument, match="as a Secret") as raised:
        EmbedqTextEmbedder("fake:9092", settings={"sasl_plain_password": "hunter2"})
    assert "hunter2" not in str(raised.value)
