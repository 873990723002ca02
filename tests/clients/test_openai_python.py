"""OpenAI's own Python package, with nothing changed but its address."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from embedq_sdk.blocking import EmbedClient
from embedq_sdk.embeddings import Vectors
from tests.clients.conftest import ALIAS, TEXTS, same_bits
from tests.helpers.lazily import lazily
from tests.helpers.support import patient

if TYPE_CHECKING:
    import openai
else:
    openai = lazily("openai")

pytestmark = pytest.mark.kafka


@pytest.fixture
def client(v1: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=v1, api_key="none", max_retries=0, timeout=patient(60)) as client:
        yield client


def test_its_defaults_get_the_sdks_vectors_to_the_last_bit(client: openai.OpenAI, expected: Vectors) -> None:
    """By default it asks for base64, and decodes it."""
    answer = client.embeddings.create(model=ALIAS, input=TEXTS)
    assert [each.index for each in answer.data] == list(range(len(TEXTS)))
    assert same_bits([each.embedding for each in answer.data], expected)
    assert answer.model == ALIAS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > len(TEXTS)


def test_floats_are_the_shortest_decimals_of_the_same_vectors(
    client: openai.OpenAI, expected: Vectors
) -> None:
    answer = client.embeddings.create(model=ALIAS, input=TEXTS, encoding_format="float")
    rows = [each.embedding for each in answer.data]
    assert np.array_equal(np.array(rows, dtype=np.float32), expected)


def test_one_text_and_fewer_dimensions(client: openai.OpenAI, embedq: EmbedClient) -> None:
    answer = client.embeddings.create(model=ALIAS, input="the tide", dimensions=64, user="somebody")
    assert same_bits(answer.data[0].embedding, embedq.embed("the tide", dimensions=64))


def test_what_only_embedq_has_is_an_extra_field_or_header(client: openai.OpenAI, embedq: EmbedClient) -> None:
    answer = client.embeddings.with_raw_response.create(
        model=ALIAS,
        input="who wrote it?",
        extra_body={"instruction": "find the author"},
        extra_headers={"x-embedq-lane": "bulk", "x-request-timeout": f"{patient(60):.0f}"},
    )
    found = embedq.embed_detailed("who wrote it?", instruction="find the author")
    assert same_bits(answer.parse().data[0].embedding, found.vectors[0])
    assert answer.headers["x-embedq-model-version"] == found.model_version


def test_token_ids_are_refused_with_what_to_do_instead(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
        client.embeddings.create(model=ALIAS, input=[[9906, 1917]])


def test_an_error_is_the_packages_own_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="another", input="x")
    assert (unknown.value.code, unknown.value.type) == ("unknown_model", "not_found_error")
    with pytest.raises(openai.BadRequestError) as wide:
        client.embeddings.create(model=ALIAS, input="x", dimensions=4096)
    assert wide.value.param == "dimensions"


def test_the_models_are_those_that_are_alive(client: openai.OpenAI, embedq: EmbedClient) -> None:
    (model,) = client.models.list()
    assert model.id == ALIAS
    assert (
        client.models.retrieve(ALIAS).model_dump()["model_version"]
        == embedq.embed_detailed("x").model_version
    )


async def test_the_async_client_too(v1: str, expected: Vectors) -> None:
    async with openai.AsyncOpenAI(base_url=v1, api_key="none", max_retries=0, timeout=patient(60)) as client:
        answers = await asyncio.gather(
            *(client.embeddings.create(model=ALIAS, input=text) for text in TEXTS),
            client.embeddings.create(model=ALIAS, input=TEXTS),
        )
    assert same_bits([answer.data[0].embedding for answer in answers[:-1]], expected)
    assert same_bits([each.embedding for each in answers[-1].data], expected)
