"""Frameworks with their own OpenAI embedders, unchanged: LangChain, LlamaIndex, Haystack, LiteLLM. docs/gateway.md has each set-up."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from embedq_sdk.embeddings import Vectors
from tests.clients.conftest import ALIAS, TEXTS, same_bits
from tests.helpers.support import patient

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,  # some take ten seconds to import
    # They are as they are: what they deprecate in each other is no matter of ours.
    pytest.mark.filterwarnings("default"),
]


async def test_langchain_openai(v1: str, expected: Vectors) -> None:
    from langchain_openai import OpenAIEmbeddings

    with httpx.Client() as http:  # those that a framework makes by itself, nobody can close
        async with httpx.AsyncClient() as async_http:
            embeddings = OpenAIEmbeddings(
                model=ALIAS,
                base_url=v1,
                api_key="none",  # type: ignore[arg-type]
                check_embedding_ctx_length=False,  # otherwise it sends another model's token ids
                timeout=patient(60),
                max_retries=0,
                http_client=http,
                http_async_client=async_http,
            )
            assert same_bits(await asyncio.to_thread(embeddings.embed_documents, TEXTS), expected)
            assert same_bits(await embeddings.aembed_documents(TEXTS), expected)
            assert same_bits(await embeddings.aembed_query(TEXTS[0]), expected[0])


async def test_llama_index_openai_like(v1: str, expected: Vectors) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    texts = [text for text in TEXTS if text]  # it refuses to embed nothing
    rows = expected[[n for n, text in enumerate(TEXTS) if text]]
    with httpx.Client() as http:
        async with httpx.AsyncClient() as async_http:
            model = OpenAILikeEmbedding(
                model_name=ALIAS,
                api_base=v1,
                api_key="none",
                timeout=patient(60),
                max_retries=0,
                http_client=http,
                async_http_client=async_http,
            )
            assert same_bits(await asyncio.to_thread(model.get_text_embedding_batch, texts), rows)
            assert same_bits(await model.aget_text_embedding_batch(texts), rows)
            assert same_bits(await model.aget_query_embedding(TEXTS[0]), expected[0])


async def test_haystack_openai(v1: str, expected: Vectors) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    settings: dict[str, Any] = {
        "api_key": Secret.from_token("none"),
        "model": ALIAS,
        "api_base_url": v1,
        "timeout": patient(60),
        "max_retries": 0,
    }
    query = OpenAITextEmbedder(**settings)
    found = await asyncio.to_thread(query.run, text=TEXTS[0])
    assert np.array_equal(np.array(found["embedding"], dtype=np.float32), expected[0])
    documents = OpenAIDocumentEmbedder(**settings, progress_bar=False)
    embedded = await asyncio.to_thread(documents.run, documents=[Document(content=text) for text in TEXTS])
    query.close()
    documents.close()
    rows = [each.embedding for each in embedded["documents"]]
    assert np.array_equal(np.array(rows, dtype=np.float32), expected)
    assert embedded["meta"]["model"] == ALIAS


async def test_litellm(v1: str, expected: Vectors) -> None:
    import litellm

    settings: dict[str, Any] = {
        "model": f"openai/{ALIAS}",
        "api_base": v1,
        "api_key": "none",
        "max_retries": 0,
    }
    answers: list[Any] = [
        await asyncio.to_thread(lambda: litellm.embedding(input=TEXTS, **settings)),
        await litellm.aembedding(input=TEXTS, **settings),
    ]
    for answer in answers:
        rows = [each["embedding"] for each in answer.data]
        assert np.array_equal(np.array(rows, dtype=np.float32), expected)
        assert answer.usage.total_tokens > len(TEXTS)
