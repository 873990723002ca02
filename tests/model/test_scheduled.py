"""The benchmark of the scheduler gives what the encoder gives, so its figures mean something."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.scheduled import scheduled, straight
from embedq_consumer.engine import Encoder, Text, Tokens


def test_scheduled_texts_get_the_encoders_own_vectors_and_equal_ones_are_computed_once(
    encoder_of: Callable[[str], Encoder],
) -> None:
    encoder = encoder_of("qwen3")
    words = ["the", "pilot", "boards", "a", "ship", "two", "miles", "before", "breakwater"]
    found = encoder.tokenize([Text(" ".join(words[: 1 + n % 9]) + f" {n % 6}") for n in range(60)])
    texts = [tokens for tokens in found if isinstance(tokens, Tokens)]
    texts.append(Tokens(np.tile(texts[0].ids, 40)))  # over the budget
    seconds, vectors, stats = scheduled(encoder, texts, 64)
    _, expected = straight(encoder, texts, 64)
    assert seconds > 0
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert stats["computed_texts"] == len({tokens.ids.tobytes() for tokens in texts}) < len(texts)
    assert stats["micro_batches"] > 3
    assert 0 < stats["fill"] <= 1
