"""Token ids against transformers' tokenizers, and what a cut keeps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq_consumer.engine import Encoder, Text, TextTooLong, Tokens, Truncate
from tests.helpers.encoders import MODELS, tokens_of
from tests.model.test_parity import TEXTS

LONG = "The children 😀 are playing near the old stone wall, 北京是中国的首都; " * 60


@pytest.fixture(scope="module")
def hugging_face(model_path: Callable[[str], Path]) -> Callable[[str], Any]:
    from transformers import AutoTokenizer

    return lambda name: AutoTokenizer.from_pretrained(str(model_path(name)), local_files_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_transformers(
    name: str, encoder_of: Callable[[str], Encoder], hugging_face: Callable[[str], Any]
) -> None:
    encoder = encoder_of(name)
    texts = [text for text in TEXTS if len(text) < 100]
    assert [ids.tolist() for ids in tokens_of(encoder, texts)] == hugging_face(name)(texts)["input_ids"]


@pytest.mark.parametrize(("truncate", "side"), [("end", "right"), ("start", "left")])
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_gives_the_ids_of_transformers_truncation(
    name: str,
    truncate: Truncate,
    side: str,
    encoder_of: Callable[[str], Encoder],
    hugging_face: Callable[[str], Any],
) -> None:
    encoder, tokenizer = encoder_of(name), hugging_face(name)
    tokenizer.truncation_side = side
    (found,) = encoder.tokenize([Text(LONG, truncate=truncate)])
    expected = tokenizer(LONG, truncation=True, max_length=encoder.max_tokens)["input_ids"]
    assert isinstance(found, Tokens)
    assert found.truncated
    assert found.ids.dtype == np.int32
    assert found.ids.tolist() == expected


def test_a_text_over_the_limit_is_refused_alone_with_both_numbers(
    encoder_of: Callable[[str], Encoder], hugging_face: Callable[[str], Any]
) -> None:
    encoder = encoder_of("qwen3")
    fine, refused, also_fine = encoder.tokenize([Text("a"), Text(LONG), Text("a")])
    assert refused == TextTooLong(
        tokens=len(hugging_face("qwen3")(LONG)["input_ids"]), limit=encoder.max_tokens
    )
    assert isinstance(fine, Tokens)
    assert isinstance(also_fine, Tokens)
    assert fine.ids.tolist() == also_fine.ids.tolist()
    assert not fine.truncated


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_a_cut_keeps_the_final_special_token(
    truncate: Truncate, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of("qwen3")
    (empty,) = tokens_of(encoder, [""])
    (cut,) = tokens_of(encoder, [Text(LONG, truncate=truncate)])
    assert len(empty) == 1
    assert cut[-1] == empty[0]
    assert len(cut) == encoder.max_tokens


def test_a_cut_at_the_start_keeps_the_instruction_and_the_end_of_the_text(
    encoder_of: Callable[[str], Encoder],
) -> None:
    encoder = encoder_of("qwen3")
    prompt = "Instruct: Find it\nQuery:"
    (whole,) = tokens_of(encoder, [Text("", prompt)])
    (plain,) = tokens_of(encoder, [Text(LONG, truncate="start")])
    (cut,) = tokens_of(encoder, [Text(LONG, prompt, "start")])
    kept = len(whole) - 1
    assert cut[:kept].tolist() == whole[:kept].tolist()
    assert cut[kept:].tolist() == plain[kept:].tolist()
    assert len(cut) == encoder.max_tokens


def test_a_prompt_that_fills_the_limit_is_cut_like_the_text(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen3")
    (cut,) = tokens_of(encoder, [Text("the end", LONG, "start")])
    (expected,) = tokens_of(encoder, [Text(f"{LONG}the end", truncate="start")])
    assert cut.tolist() == expected.tolist()


def test_many_threads_may_tokenize_at_once(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen3")
    jobs = [
        [Text(f"{text} {n}", prompt, truncate) for text in TEXTS]
        for n in range(20)
        for prompt in ("", "Query: ")
        for truncate in ("start", "end")
    ]
    expected = [[ids.tolist() for ids in tokens_of(encoder, job)] for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: [ids.tolist() for ids in tokens_of(encoder, job)], jobs))
    assert found == expected
