"""Texts become tokens in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.engine import Text, TextTooLong, Tokens
from tests.helpers.in_flight import Model


class Noting(Model):
    """Notes the thread of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[threading.Thread] = []

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        self.threads.append(threading.current_thread())
        return [Tokens(np.zeros(1, np.int32)) for _ in texts]


@pytest.mark.parametrize(
    ("texts", "at_once"),
    [
        (["a" * 512], True),
        (["a" * 128] * 4, True),
        (["a"] * 5, False),
        (["a" * 513], False),
    ],
)
async def test_a_quick_call_needs_no_thread(texts: list[str], at_once: bool) -> None:
    model, tokenizing = Noting(), TokenizerPool()
    try:
        assert len(await tokenizing.run(model, [Text(text) for text in texts])) == len(texts)
    finally:
        await asyncio.to_thread(tokenizing.close)
    assert (model.threads == [threading.current_thread()]) == at_once


async def test_a_prompt_counts_as_its_text_does() -> None:
    model, tokenizing = Noting(), TokenizerPool()
    try:
        await tokenizing.run(model, [Text("a" * 500, prompt="query: " * 2)])
    finally:
        await asyncio.to_thread(tokenizing.close)
    assert model.threads != [threading.current_thread()]


@pytest.mark.parametrize("text", ["a", "a" * 600])
async def test_a_call_that_fails_lets_the_next_one_run(text: str) -> None:
    class Failing(Model):
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
            raise RuntimeError("no")

    tokenizing = TokenizerPool()
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no"):
                await tokenizing.run(Failing(), [Text(text)])
    finally:
        await asyncio.to_thread(tokenizing.close)
