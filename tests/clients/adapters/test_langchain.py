"""LangChain's own unit suite, and what the adapter asks of the service."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.unit_tests import EmbeddingsUnitTests

from embedq_sdk import InvalidArgument
from embedq_sdk.adapters.langchain import EmbedqEmbeddings
from embedq_sdk.blocking import EmbedClient
from tests.helpers.fake_service import OLD, FakeService, expected, rows

TEXTS = ["a", "b", ""]


class TestStandard(EmbeddingsUnitTests):
    """What LangChain asks of every integration."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EmbedqEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"servers": "localhost:9092", "model": "m"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"EMBEDQ_KAFKA_SERVERS": "kafka:9092"}, {}, {"servers": "kafka:9092"}


def test_queries_and_documents_are_sent_as_what_they_are(service: FakeService) -> None:
    embeddings = EmbedqEmbeddings(
        "fake:9092",
        model="m",
        model_version=OLD,
        dimensions=32,
        query_instruction="find",
        truncate="end",
        lane="bulk",
    )
    assert embeddings.embed_query("q") == expected("q", 32).tolist()
    assert embeddings.embed_documents(TEXTS) == [expected(text, 32).tolist() for text in TEXTS]
    query, documents = service.received
    assert (query.job.input_type, query.job.instruction, query.job.truncate) == ("query", "find", "end")
    assert (documents.job.input_type, documents.job.instruction) == ("document", None)
    assert {(job.job.model, job.job.model_version) for job in service.received} == {("m", OLD)}
    assert all(job.topic == "embed.jobs.bulk" for job in service.received)


def test_no_documents_ask_nothing(service: FakeService) -> None:
    assert EmbedqEmbeddings("fake:9092").embed_documents([]) == []
    assert service.received == []


def test_the_async_calls_work_in_one_event_loop_after_the_other(service: FakeService) -> None:
    embeddings = EmbedqEmbeddings(client=EmbedClient("fake:9092"))
    for _ in range(2):
        assert asyncio.run(embeddings.aembed_query("q")) == expected("q").tolist()
        assert asyncio.run(embeddings.aembed_documents(TEXTS)) == rows(TEXTS).tolist()
    assert asyncio.run(embeddings.aembed_documents([])) == []
    assert embeddings.embed_query("q") == expected("q").tolist()


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("dimensions", {"dimensions": 3}),
        ("lane", {"lane": "express"}),
        ("timeout", {"timeout": 0}),
        ("topic_prefx", {"topic_prefx": "x"}),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_made(named: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=named):
        EmbedqEmbeddings("fake:9092", **settings)


def test_an_address_that_is_nowhere_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBEDQ_KAFKA_SERVERS", raising=False)
    with pytest.raises(InvalidArgument, match="EMBEDQ_KAFKA_SERVERS"):
        EmbedqEmbeddings()
