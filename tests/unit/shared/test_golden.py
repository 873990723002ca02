"""Golden files are what is read, and no larger than that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.golden import MOST_BYTES, Golden, GoldenText, cosine_of, decode_golden, encode_golden

TEXTS = st.builds(
    GoldenText,
    text=st.text(max_size=20),
    embedding=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5),
    input_type=st.sampled_from([None, "query", "document"]),
)


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    min_cosine=st.floats(-1, 1),
    version=st.none() | st.just("sha256:" + "0" * 64),
)
def test_what_is_written_is_read_to_seven_digits(
    texts: list[GoldenText], min_cosine: float, version: str | None
) -> None:
    content = encode_golden(Golden(texts=texts, min_cosine=min_cosine, model_version=version))
    found = decode_golden(content)
    assert (found.min_cosine, found.model_version) == (min_cosine, version)
    assert [(each.text, each.input_type) for each in found.texts] == [
        (each.text, each.input_type) for each in texts
    ]
    for each, given_text in zip(found.texts, texts, strict=True):
        np.testing.assert_allclose(each.embedding, given_text.embedding, atol=1e-7)


def test_a_text_has_a_line_of_its_own_and_what_is_the_default_is_left_out() -> None:
    content = encode_golden(Golden(texts=[GoldenText(text=text, embedding=[0.6, 0.8]) for text in "ab"]))
    assert content.decode().splitlines() == [
        '{"texts":[',
        '{"text":"a","embedding":[0.6,0.8]},',
        '{"text":"b","embedding":[0.6,0.8]}',
        "]}",
    ]
    json.loads(content)


def test_what_could_not_be_read_is_not_written() -> None:
    long = GoldenText(text="a" * MOST_BYTES, embedding=[1.0])
    with pytest.raises(ValueError, match="at most 4,194,304 bytes"):
        encode_golden(Golden(texts=[long]))


def test_a_vector_is_compared_as_far_as_the_stored_one_goes() -> None:
    wanted = GoldenText(text="a", embedding=[3.0, 4.0])
    assert cosine_of(wanted, np.array([0.6, 0.8, 9.0], dtype=np.float32)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="vectors of 2 dimensions, the model gives 1"):
        cosine_of(wanted, np.array([1.0], dtype=np.float32))
