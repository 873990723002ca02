"""embedq's adapters with a real Kafka and model: LangChain's own integration suite, and a search in each framework."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests

from embedq_sdk.adapters.langchain import EmbedqEmbeddings
from embedq_sdk.blocking import EmbedClient
from embedq_sdk.dev import DevStack
from embedq_sdk.embeddings import Vectors
from embedq_shared.topics import Topics
from tests.clients.conftest import TEXTS, same_bits
from tests.helpers.support import patient

pytestmark = [pytest.mark.kafka, pytest.mark.filterwarnings("default")]

DOCUMENTS = [
    "The tide rises and falls because of the moon.",
    "Bread dough rises because yeast makes gas.",
    "A court may set a verdict aside.",
]
QUERY = "Why does the sea level change twice a day?"


class TestStandard(EmbeddingsIntegrationTests):
    """What LangChain asks of every integration."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EmbedqEmbeddings

    @pytest.fixture
    def model(self, embedq: EmbedClient) -> Embeddings:
        return EmbedqEmbeddings(client=embedq, timeout=patient(60))


async def test_langchain_finds_the_document(
    embedq: EmbedClient, stack: DevStack, topics: Topics, expected: Vectors
) -> None:
    embeddings = EmbedqEmbeddings(
        stack.kafka_servers, topic_prefix=topics.prefix, connect_timeout=patient(10), timeout=patient(60)
    )
    store = await InMemoryVectorStore.afrom_texts(DOCUMENTS, embeddings)
    (found,) = await store.asimilarity_search(QUERY, k=1)
    assert found.page_content == DOCUMENTS[0]
    assert same_bits(await embeddings.aembed_documents(TEXTS), expected)
    assert same_bits(await asyncio.to_thread(embeddings.embed_documents, TEXTS), expected)


@pytest.mark.slow  # it takes ten seconds to import
async def test_llama_index_finds_the_node(
    embedq: EmbedClient, stack: DevStack, topics: Topics, expected: Vectors
) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    from embedq_sdk.adapters.llama_index import EmbedqEmbedding

    model = EmbedqEmbedding(
        servers=stack.kafka_servers,
        settings={"topic_prefix": topics.prefix, "connect_timeout": patient(10)},
        timeout=patient(60),
    )
    nodes = [TextNode(text=text) for text in DOCUMENTS]
    index = await asyncio.to_thread(VectorStoreIndex, nodes, embed_model=model)
    (found,) = await index.as_retriever(similarity_top_k=1).aretrieve(QUERY)
    assert found.node.get_content() == DOCUMENTS[0]
    assert same_bits(await model.aget_text_embedding_batch(TEXTS), expected)


@pytest.mark.slow
async def test_haystack_finds_the_document(
    embedq: EmbedClient, stack: DevStack, topics: Topics, expected: Vectors
) -> None:
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from embedq_sdk.adapters.haystack import EmbedqDocumentEmbedder, EmbedqTextEmbedder

    settings = {"topic_prefix": topics.prefix, "connect_timeout": patient(10)}
    documents = EmbedqDocumentEmbedder(stack.kafka_servers, settings=settings, timeout=patient(60))
    store = InMemoryDocumentStore()
    embedded = await documents.run_async([Document(content=text) for text in DOCUMENTS])
    store.write_documents(embedded["documents"])
    pipeline = Pipeline()
    pipeline.add_component(
        "query", EmbedqTextEmbedder(stack.kafka_servers, settings=settings, timeout=patient(60))
    )
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("query.embedding", "retriever.query_embedding")
    found = await asyncio.to_thread(pipeline.run, {"query": {"text": QUERY}})
    assert found["retriever"]["documents"][0].content == DOCUMENTS[0]
    again = await asyncio.to_thread(documents.run, [Document(content=text) for text in TEXTS])
    assert same_bits([each.embedding for each in again["documents"]], expected)
