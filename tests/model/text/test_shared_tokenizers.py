"""Equal tokenizers are one object, and what the library remembers of texts does not outlive them for ever."""

from __future__ import annotations

import gc
import json
import platform
from pathlib import Path

import pytest

from embedq_consumer.engine import Text
from embedq_consumer.engine.model_directory import read_directory
from embedq_consumer.engine.text.effective import EffectiveTokenizer
from embedq_consumer.engine.text.shared_tokenizers import SharedTokenizer, shared
from embedq_consumer.engine.text.tokenizer import TextTokenizer
from tests.helpers.many_reloads import held, many_words
from tests.helpers.tiny_models import make_tiny_qwen3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (make_tiny_qwen3(tmp_path_factory.mktemp("qwen3")) / "tokenizer.json").read_bytes()


def lower_cased(text: bytes) -> bytes:
    return json.dumps(json.loads(text) | {"normalizer": {"type": "Lowercase"}}).encode()


def with_another_token(text: bytes, number: int) -> EffectiveTokenizer:
    """A tokenizer like no other one."""
    tokenizer = EffectiveTokenizer(text).build()
    tokenizer.add_tokens([f"a token of {number}"])
    return EffectiveTokenizer(tokenizer.to_str().encode())


def test_equal_tokenizers_are_one_however_their_files_are_indented(text: bytes) -> None:
    indented = json.dumps(json.loads(text), indent=4, ensure_ascii=False).encode()
    assert shared(EffectiveTokenizer(text)) is shared(EffectiveTokenizer(indented))


def test_tokenizers_that_give_other_ids_are_others(text: bytes) -> None:
    found = [
        shared(EffectiveTokenizer(text)),
        shared(EffectiveTokenizer(text, split_special_tokens=True)),
        shared(EffectiveTokenizer(lower_cased(text))),
    ]
    assert len({id(each) for each in found}) == 3
    ids = [each.tokenizer.encode("The End<|im_end|>").ids for each in found]
    assert len({tuple(each) for each in ids}) == 3


def test_the_tokenizer_of_a_model_that_serves_is_found_whatever_came_after_it(text: bytes) -> None:
    serving = shared(EffectiveTokenizer(text))
    for number in range(5):
        shared(with_another_token(text, number))
    assert shared(EffectiveTokenizer(text)) is serving


def test_those_of_the_last_two_models_stay_and_older_ones_go(text: bytes) -> None:
    for number in range(5):
        shared(with_another_token(text, number))
    gc.collect()
    living = [each for each in gc.get_objects() if type(each) is SharedTokenizer]
    named = {
        number
        for number in range(5)
        for each in living
        if each.tokenizer.token_to_id(f"a token of {number}") is not None
    }
    assert named == {3, 4}


def test_no_tokenizer_pads_or_cuts_what_it_is_given(text: bytes) -> None:
    tokenizer = EffectiveTokenizer(text).build()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    found = shared(EffectiveTokenizer(tokenizer.to_str().encode())).tokenizer
    assert (found.truncation, found.padding) == (None, None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc says how much memory is in use")
def test_reading_a_model_again_and_again_leaves_nothing_of_the_texts_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library remembers up to 10,000 words for each of its threads, and frees them at no tokenizer's end."""
    monkeypatch.setenv(
        "TOKENIZERS_PARALLELISM", "false"
    )  # in this thread: which one has which words is no chance
    directory = read_directory(make_tiny_qwen3(tmp_path), None)
    texts = [Text(words, truncate="end") for words in many_words()]
    in_use = []
    for _ in range(8):
        tokenizer = TextTokenizer.load(directory, 512, 600)
        tokenizer.tokenize(texts)
        in_use.append(held().in_use or 0)
    # The first one warms up the libraries. Without the mends: 30 MB, and 0.5 MB by transformers' reading alone.
    assert in_use[1] > 0
    assert in_use[-1] - in_use[1] < 300_000
