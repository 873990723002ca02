"""Texts that begin alike, in float32: what is read of a shared prefix gives the vector of the text alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.prefixes import PooledQwen3
from embedq_consumer.engine import Encoder, Text, Tokens, load_encoder
from embedq_consumer.engine.text.prompts import prompt_for
from embedq_shared.messages import Job
from tests.helpers.encoders import normalized

Ids = npt.NDArray[np.int32]

TENANTS = ("Ahrens & Sons", "Baltic Wharf", "the harbour office", "C")
INSTRUCTION = (
    "Given a question about a contract, retrieve the clauses that answer it, and prefer those that are in force today, "
    "whatever language they are written in, for the customer {}"
)


@pytest.fixture(scope="module")
def encoder(model_path: Callable[[str], Path]) -> Encoder:
    return load_encoder(model_path("qwen3"), device="cpu")


@pytest.fixture
def pooled(model_path: Callable[[str], Path]) -> PooledQwen3:
    return PooledQwen3(model_path("qwen3"))


def tokens_of(encoder: Encoder, texts: list[Text]) -> list[Ids]:
    found = [each for each in encoder.tokenize(texts) if isinstance(each, Tokens)]
    assert len(found) == len(texts)
    return [each.ids for each in found]


def instructed(encoder: Encoder, tenant: str, count: int) -> list[Text]:
    job = Job(input="?", instruction=INSTRUCTION.format(tenant))
    prompt = prompt_for(job, encoder)
    return [
        Text(f" what does clause {n} of {tenant} say about delay?"[n % 7 :], prompt) for n in range(count)
    ]


def test_texts_of_tenants_have_the_vectors_that_each_has_alone(encoder: Encoder, pooled: PooledQwen3) -> None:
    texts = [
        text for n, tenant in enumerate(TENANTS) for text in instructed(encoder, tenant, 12 if n else 40)
    ]
    texts += [Text("hello"), Text(""), Text("Instruct: another one\nQuery: moon"), *texts[:3]]
    ids = tokens_of(encoder, texts)
    order = np.random.default_rng(0).permutation(len(ids)).tolist()
    alone = normalized(np.concatenate([encoder.encode([one]) for one in ids]))
    for begin in range(0, len(ids), 40):
        batch = order[begin : begin + 40]
        found = normalized(pooled.shared([ids[i] for i in batch]))
        assert np.abs(found - alone[batch]).max() <= 1e-5
    assert pooled.saved > sum(map(len, ids)) / 3


def test_the_proof_above_would_notice_a_wrong_prefix(encoder: Encoder, pooled: PooledQwen3) -> None:
    ids = tokens_of(encoder, instructed(encoder, TENANTS[0], 40))
    alone = normalized(np.concatenate([encoder.encode([one]) for one in ids]))
    pooled.shared(ids)
    pooled._pool[:] = pooled._pool.roll(1, dims=3)
    assert np.abs(normalized(pooled.shared(ids)) - alone).max() > 1e-3


def test_the_tokenizer_counts_what_is_not_in_the_pool(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graphs:
        shares_prefixes = True

        def known_prefixes(self, texts: list[Ids]) -> list[int]:
            return [min(3, max(0, len(ids) - 1)) for ids in texts]

    monkeypatch.setattr(encoder, "_graphs", Graphs())
    found = encoder.tokenize([Text("the harbour of the moon"), Text("stone " * 9000)])
    assert isinstance(found[0], Tokens)
    assert found[0].shared == 3
    assert found[0].cost == len(found[0].ids) - 3
    assert not isinstance(found[1], Tokens)  # too long, and no less so
