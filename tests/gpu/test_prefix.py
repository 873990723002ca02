"""Shared prefixes, the deterministic mode and long texts on CUDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import Encoder, Quantization, Text, Tokens, load_encoder
from tests.helpers.encoders import normalized
from tests.helpers.tiny_models import QUERY_PROMPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]
LEAST: dict[Quantization, float] = {"none": 0.9999, "fp8": 0.995}


def ids_of(random: np.random.Generator, length: int) -> Ids:
    return random.integers(3, SHAPES["tiny"]["vocabulary"], length).astype(np.int32)


def with_prefix(prefix: Ids, own: list[Ids]) -> list[Tokens]:
    return [Tokens(np.concatenate([prefix, ids])) for ids in own]


def whole(texts: list[Tokens]) -> list[Tokens]:
    return [Tokens(text.ids, whole=True) for text in texts]


def cosines(found: Vectors, wanted: Vectors) -> Vectors:
    product: Vectors = (normalized(found) * normalized(wanted)).sum(axis=1)
    return product


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("shape"), "tiny")


@pytest.fixture(scope="module", params=["none", "fp8"])
def quantization(request: pytest.FixtureRequest) -> Quantization:
    found: Quantization = request.param
    return found


@pytest.fixture(scope="module")
def encoder(path: Path, quantization: Quantization) -> Encoder:
    return load_encoder(path, device="cuda", quantization=quantization)


@pytest.fixture(scope="module")
def deterministic(path: Path, quantization: Quantization) -> Encoder:
    return load_encoder(path, device="cuda", quantization=quantization, deterministic=True)


def test_queries_after_one_instruction_have_the_vectors_of_whole_texts(
    encoder: Encoder, quantization: Quantization
) -> None:
    places = [one + other for one in "abcdefgh" for other in "ijklmnop"]
    texts = [Text(f"how far is the moon from {place}?", QUERY_PROMPT) for place in places]

    def tokens_of() -> list[Tokens]:
        return [tokens for tokens in encoder.tokenize(texts) if isinstance(tokens, Tokens)]

    found = tokens_of()
    assert len(found) == len(texts)
    assert [tokens.cost for tokens in found] == [len(tokens.ids) for tokens in found]
    wanted = encoder.submit(whole(found)).result()
    for _ in range(3):
        assert cosines(encoder.submit(found).result(), wanted).min() >= LEAST[quantization]
    # Now it is known that they cost less.
    assert all(tokens.shared > 8 for tokens in tokens_of())


def test_instructions_that_differ_in_their_last_words_share_the_first_ones(
    encoder: Encoder, quantization: Quantization
) -> None:
    random = np.random.default_rng(8)
    common, tenants = ids_of(random, 40), [ids_of(random, 20) for _ in range(6)]
    texts = [
        text
        for number, tenant in enumerate(tenants)
        for text in with_prefix(
            np.concatenate([common, tenant]), [ids_of(random, 15) for _ in range(2 if number else 40)]
        )
    ]
    wanted = encoder.submit(whole(texts)).result()
    for order in (list(range(len(texts))), random.permutation(len(texts)).tolist()):
        found = encoder.submit([texts[i] for i in order]).result()
        assert cosines(found, wanted[order]).min() >= LEAST[quantization]
    # The tenant of many texts has its own words shared, too, which were computed behind the common ones.
    known = encoder._graphs.known_prefixes([texts[0].ids, texts[-1].ids])  # type: ignore[attr-defined]
    assert known == [60, 40]


def test_no_position_among_other_prefixes_changes_a_vector(
    encoder: Encoder, quantization: Quantization
) -> None:
    random = np.random.default_rng(2)
    prefixes = [ids_of(random, n) for n in (25, 8, 100, 1000)]
    others = [
        text
        for prefix in prefixes
        for text in with_prefix(prefix, [ids_of(random, n) for n in (1, 2, 15, 63, 64, 65, 300)])
    ]
    others += [Tokens(ids_of(random, n)) for n in (1, 40, 700)]
    text = with_prefix(prefixes[0], [ids_of(random, 15)])[0]
    wanted = encoder.submit(whole([text])).result()
    for position in range(len(others) + 1):
        batch = [*others[:position], text, *others[position:]]
        found = encoder.submit(batch).result()[position : position + 1]
        assert cosines(found, wanted).min() >= LEAST[quantization], position
    wanted = encoder.submit(whole(others)).result()
    assert cosines(encoder.submit(others).result(), wanted).min() >= LEAST[quantization]


def test_more_prefixes_than_the_pool_holds_and_more_texts_than_a_part(
    encoder: Encoder, quantization: Quantization
) -> None:
    random = np.random.default_rng(3)
    prefixes = [ids_of(random, n) for n in random.integers(8, 1025, 12).tolist()]
    texts = [
        text
        for prefix in prefixes
        for text in with_prefix(prefix, [ids_of(random, int(n)) for n in random.integers(1, 60, 90)])
    ]
    order = random.permutation(len(texts)).tolist()
    shuffled = [texts[i] for i in order]
    wanted = encoder.submit(whole(shuffled)).result()
    pending = [encoder.submit(shuffled[begin : begin + 150]) for begin in range(0, len(shuffled), 150)]
    found = np.concatenate([part.result() for part in pending])
    assert cosines(found, wanted).min() >= LEAST[quantization]


def test_a_text_after_a_prefix_may_be_longer_than_the_largest_graph(
    encoder: Encoder, quantization: Quantization
) -> None:
    random = np.random.default_rng(4)
    texts = with_prefix(ids_of(random, 200), [ids_of(random, n) for n in (20_000, 15, 15)])
    wanted = encoder.submit(whole(texts)).result()
    assert cosines(encoder.submit(texts).result(), wanted).min() >= LEAST[quantization]


def test_deterministic_vectors_are_the_same_bits_whatever_else_is_in_the_batch(
    deterministic: Encoder,
) -> None:
    random = np.random.default_rng(5)
    lengths = [1, 2, 15, 16, 17, 40, 63, 64, 65, 127, 128, 129, 500, 1000, 1024, 1025, 1500, 3000]
    texts = [Tokens(ids_of(random, n)) for n in lengths]
    alone = np.concatenate([deterministic.submit([text]).result() for text in texts])
    for _ in range(12):
        order = random.permutation(len(texts)).tolist()
        found = deterministic.submit([texts[i] for i in order]).result()
        assert np.array_equal(found, alone[order])
    many = [Tokens(ids_of(random, int(n))) for n in random.integers(1, 90, 400)]
    for place in (0, 1, 57, 399):
        found = deterministic.submit([*many[:place], texts[5], *many[place:]]).result()[place]
        assert np.array_equal(found, alone[5])


def test_deterministic_vectors_have_a_version_of_their_own_and_are_near_the_others(
    encoder: Encoder, deterministic: Encoder, quantization: Quantization
) -> None:
    assert encoder.model_version != deterministic.model_version
    random = np.random.default_rng(6)
    texts = [Tokens(ids_of(random, n)) for n in (3, 40, 300, 2000)]
    found, wanted = (one.submit(texts).result() for one in (deterministic, encoder))
    assert cosines(found, wanted).min() >= (0.9995 if quantization == "none" else LEAST["fp8"])


def test_texts_of_32k_tokens_among_others_keep_memory_within_bounds(encoder: Encoder) -> None:
    random = np.random.default_rng(7)

    def run(batches: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(batches):
            lengths = np.clip(random.lognormal(np.log(180), 0.9, 20), 8, 2048).astype(int)
            lengths[random.random(20) < 0.1] = random.integers(30_000, 32_769)
            vectors = encoder.submit([Tokens(ids_of(random, int(n))) for n in lengths]).result()
            assert np.isfinite(vectors).all()
        return torch.cuda.max_memory_reserved()

    run(5)
    torch.cuda.empty_cache()
    early, late = run(10), run(30)
    assert late <= 1.25 * early
