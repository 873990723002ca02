"""What LlamaIndex does with an embedding model: queries, nodes, batches, storing it, sending it to a worker."""

from __future__ import annotations

import importlib.util
import pickle
from typing import TYPE_CHECKING

import pytest

from embedq_sdk import InvalidArgument
from tests.helpers.fake_service import OLD, FakeService, expected, rows
from tests.helpers.lazily import lazily

if TYPE_CHECKING:
    from embedq_sdk.adapters import llama_index as adapter
else:
    adapter = lazily("embedq_sdk.adapters.llama_index")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llama_index") is None, reason="needs LlamaIndex"),
    pytest.mark.filterwarnings("default"),  # what LlamaIndex deprecates in itself is no matter of ours
]
TEXTS = [f"node {n}" for n in range(100)]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Not in an event loop."""
    _ = adapter.EmbedqEmbedding


async def test_queries_and_nodes_are_sent_as_what_they_are(service: FakeService) -> None:
    model = adapter.EmbedqEmbedding(
        servers="fake:9092", query_instruction="find", dimensions=32, model_version=OLD
    )
    assert await model.aget_query_embedding("q") == expected("q", 32).tolist()
    assert await model.aget_text_embedding("t") == expected("t", 32).tolist()
    assert {job.job.model_version for job in service.received} == {OLD}
    assert [(job.job.input_type, job.job.instruction) for job in service.received] == [
        ("query", "find"),
        ("document", None),
    ]


def test_a_batch_is_under_way_at_once(service: FakeService) -> None:
    model = adapter.EmbedqEmbedding(servers="fake:9092")
    assert model.get_text_embedding_batch(TEXTS) == rows(TEXTS).tolist()
    assert [len(job.texts) for job in service.received] == [32, 32, 32, 4]
    assert model.get_query_embedding("q") == expected("q").tolist()
    assert model.get_text_embedding("q") == expected("q").tolist()


async def test_a_batch_in_an_event_loop(service: FakeService) -> None:
    model = adapter.EmbedqEmbedding(servers="fake:9092", embed_batch_size=50)
    assert await model.aget_text_embedding_batch(TEXTS) == rows(TEXTS).tolist()


def test_nodes_are_embedded_as_a_transformation(service: FakeService) -> None:
    """With their metadata, as LlamaIndex puts it."""
    from llama_index.core.schema import TextNode

    (node,) = adapter.EmbedqEmbedding(servers="fake:9092")([TextNode(text="t", metadata={"title": "T"})])
    (text,) = service.received[0].texts
    assert "title: T" in text
    assert node.embedding == expected(text).tolist()


def test_it_is_stored_without_its_login(service: FakeService) -> None:
    login = {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_plain_username": "u",
        "sasl_plain_password": "hunter2",
    }
    model = adapter.EmbedqEmbedding(servers="fake:9092", model="m", lane="bulk", settings=login)
    assert "hunter2" not in f"{model.to_dict()} {model!r} {model}"
    plain = adapter.EmbedqEmbedding(servers="fake:9092", model="m", lane="bulk", timeout=60)
    again = adapter.EmbedqEmbedding.from_dict(plain.to_dict())
    assert (again.model, again.lane, again.timeout) == ("m", "bulk", 60)
    assert again.get_text_embedding("t") == expected("t").tolist()


def test_it_is_sent_to_a_worker(service: FakeService) -> None:
    model = adapter.EmbedqEmbedding(servers="fake:9092")
    model.get_text_embedding("t")
    assert pickle.loads(pickle.dumps(model)).get_text_embedding("t") == expected("t").tolist()


def test_a_wrong_setting_is_refused_when_it_is_made() -> None:
    with pytest.raises(InvalidArgument, match="dimensions"):
        adapter.EmbedqEmbedding(servers="fake:9092", dimensions=3)
    with pytest.raises(ValueError, match="lane"):
        adapter.EmbedqEmbedding(servers="fake:9092", lane="express")
