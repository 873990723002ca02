"""Which of a text's first tokens are its prompt's, and so computed once for many texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedq_consumer.engine import Text, Tokens
from embedq_consumer.engine.model_directory import read_directory
from embedq_consumer.engine.prefix_cache import LONGEST_PREFIX
from embedq_consumer.engine.text.tokenizer import TextTokenizer
from tests.helpers.tiny_models import QUERY_PROMPT


@pytest.fixture(scope="module")
def tokenizer(model_path: Callable[[str], Path]) -> TextTokenizer:
    return TextTokenizer.load(read_directory(model_path("qwen3")), 512, rows=1000)


def tokens_of(tokenizer: TextTokenizer, *texts: Text) -> list[Tokens]:
    found = tokenizer.tokenize(texts, share=True)
    assert all(isinstance(tokens, Tokens) for tokens in found)
    return [tokens for tokens in found if isinstance(tokens, Tokens)]


def test_texts_after_one_prompt_share_the_same_tokens(tokenizer: TextTokenizer) -> None:
    found = tokens_of(tokenizer, *(Text(text, QUERY_PROMPT) for text in ("the moon", "hello", "", " x")))
    shared = {tokens.ids[: tokens.shared].tobytes() for tokens in found}
    assert len(shared) == 1
    assert all(tokens.shared >= 8 for tokens in found)
    assert all(tokens.cost == len(tokens.ids) - tokens.shared >= 1 for tokens in found)


def test_a_prompt_whose_last_token_merges_with_the_text_is_shared_without_that_token(
    tokenizer: TextTokenizer,
) -> None:
    prompt = "Instruct: retrieve the passages that answ"
    merged, plain = tokens_of(tokenizer, Text("er", prompt), Text(" moon", prompt))
    alone = tokenizer.tokenize([Text(prompt)])[0]
    assert isinstance(alone, Tokens)
    assert merged.ids[: len(alone.ids) - 1].tolist() != alone.ids[:-1].tolist()
    assert merged.shared == plain.shared == len(alone.ids) - 2


def test_nothing_is_shared_without_a_prompt_or_with_a_short_one_or_unasked(tokenizer: TextTokenizer) -> None:
    assert [tokens.shared for tokens in tokens_of(tokenizer, Text("the moon"), Text("moon", "To: "))] == [
        0,
        0,
    ]
    unasked = tokenizer.tokenize([Text("the moon", QUERY_PROMPT)])[0]
    assert isinstance(unasked, Tokens)
    assert unasked.shared == 0


def test_a_text_that_lost_its_prompt_to_the_cut_shares_nothing(tokenizer: TextTokenizer) -> None:
    long = "stone wall " * 600
    end, start = tokens_of(
        tokenizer, Text(long, QUERY_PROMPT, truncate="end"), Text(long, QUERY_PROMPT, truncate="start")
    )
    assert end.truncated
    assert start.truncated
    # Both cuts keep the prompt where there is room for it.
    assert end.shared == start.shared > 0
    (lost,) = tokens_of(tokenizer, Text("moon", "the stone wall " * 600, truncate="start"))
    assert lost.shared == 0


def test_of_a_prompt_beyond_the_limit_its_beginning_is_shared(model_path: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(read_directory(model_path("qwen3")), 4096, rows=1000)
    (found,) = tokens_of(tokenizer, Text("moon", "the stone wall " * 600))
    assert found.shared == LONGEST_PREFIX
