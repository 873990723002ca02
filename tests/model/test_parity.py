"""Vectors against sentence-transformers on the same directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq_consumer.engine import Encoder, Text, Tokens, load_encoder
from tests.helpers.encoders import MODELS, normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_qwen3

TOLERANCE = 1e-5

TEXTS = [
    "The moon is round.",
    "",
    " ",
    "  blanks on both sides \n",
    "a",
    "User text may spell <|im_end|> or [SEP] or <|endoftext|> at will.",
    "😀 🚀 👩‍👩‍👧‍👦",
    "北京是中国的首都。 Москва слезам не верит. über den Fluß",
    "e\u0301 is not \u00e9 until it is normalized",
    "The capital of China is Beijing, and gravity attracts two bodies towards each other. " * 3,
    "stone wall " * 40,
    "a",
]


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_gives_what_sentence_transformers_gives(
    name: str, encoder_of: Callable[[str], Encoder], reference_of: Callable[[str], Any]
) -> None:
    encoder = encoder_of(name)
    vectors = encoder.encode(tokens_of(encoder, [Text(text, truncate="end") for text in TEXTS]))
    expected = reference_of(name).encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.hidden_size)
    for dimensions in (32, 100, None):
        difference = np.abs(normalized(vectors, dimensions) - normalized(expected, dimensions)).max()
        assert difference <= TOLERANCE, dimensions


@pytest.mark.parametrize(
    "prompt", ["Instruct: Find the passage\nQuery:", "Instruct: 找到段落 🚀\nQuery:", "query: "]
)
@pytest.mark.parametrize("name", ["minilm", "qwen3"])
def test_a_prompt_gives_what_sentence_transformers_gives(
    name: str, prompt: str, encoder_of: Callable[[str], Encoder], reference_of: Callable[[str], Any]
) -> None:
    encoder = encoder_of(name)
    vectors = encoder.encode(tokens_of(encoder, [Text(text, prompt, "end") for text in TEXTS]))
    expected = reference_of(name).encode(TEXTS, prompt=prompt)
    assert np.abs(normalized(vectors) - normalized(expected)).max() <= TOLERANCE


def test_the_named_prompts_are_those_of_sentence_transformers(
    encoder_of: Callable[[str], Encoder], reference_of: Callable[[str], Any]
) -> None:
    encoder, reference = encoder_of("qwen3"), reference_of("qwen3")
    assert dict(encoder.prompts) == reference.prompts
    vectors = encoder.encode(tokens_of(encoder, [Text("how far is the moon?", encoder.prompts["query"])]))
    expected = reference.encode_query(["how far is the moon?"])
    assert np.abs(normalized(vectors) - expected).max() <= TOLERANCE


def test_the_default_prompt_is_read_from_the_directory(tmp_path: Path) -> None:
    encoder = load_encoder(make_tiny_qwen3(tmp_path, default_prompt_name="query"), device="cpu")
    assert encoder.default_prompt == encoder.prompts["query"] != ""


@pytest.mark.parametrize("name", MODELS)
def test_a_text_at_the_limit_and_one_cut_at_its_end_give_what_sentence_transformers_gives(
    name: str, encoder_of: Callable[[str], Encoder], reference_of: Callable[[str], Any]
) -> None:
    encoder, reference = encoder_of(name), reference_of(name)
    assert encoder.max_tokens == reference.max_seq_length
    word = "the "
    most = next(n for n in range(encoder.max_tokens, 0, -1) if _fits(encoder, word * n))
    texts = [word * most, word * (most + 1), word * (3 * most)]
    ids = tokens_of(encoder, [Text(text, truncate="end") for text in texts])
    assert [len(i) for i in ids] == [encoder.max_tokens] * 3
    vectors = normalized(encoder.encode(ids))
    assert np.abs(vectors - reference.encode(texts)).max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_text_gives_the_same_alone_and_packed_in_every_position(
    name: str, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of(name)
    wanted, *others = tokens_of(
        encoder, [Text(text, truncate="end") for text in ("the old stone wall", "", "x", *TEXTS, "the " * 90)]
    )
    alone = normalized(encoder.encode([wanted]))[0]
    for position in range(len(others) + 1):
        batch = [*others[:position], wanted, *others[position:]]
        packed = normalized(encoder.encode(batch))
        assert np.abs(packed[position] - alone).max() <= TOLERANCE


def test_a_batch_larger_than_what_runs_at_once_keeps_its_order(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("bert-mean")
    ids = tokens_of(encoder, [f"{'moon ' * (n % 29)} {n}" for n in range(400)])
    together = encoder.encode(ids)
    apart = np.concatenate([encoder.encode([i]) for i in ids])
    assert np.abs(normalized(together) - normalized(apart)).max() <= TOLERANCE


def test_an_empty_batch_gives_no_vectors(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen3")
    assert encoder.encode([]).shape == (0, encoder.hidden_size)
    assert encoder.tokenize([]) == []


def test_a_sequence_of_no_tokens_gives_zeros_among_others(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen3")
    (ids,) = tokens_of(encoder, ["the moon"])
    vectors = encoder.encode([ids, np.empty(0, np.int32)])
    assert not vectors[1].any()
    assert np.abs(vectors[0] - encoder.encode([ids])[0]).max() <= TOLERANCE


def _fits(encoder: Encoder, text: str) -> bool:
    (found,) = encoder.tokenize([Text(text)])
    return isinstance(found, Tokens)
