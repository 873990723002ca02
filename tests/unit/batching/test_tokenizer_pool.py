"""Texts become tokens in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.engine import Text, TextTooLong, Tokens
from tests.helpers.in_flight import Model


async def test_a_call_that_fails_lets_the_next_one_run() -> None:
    class Failing(Model):
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
            raise RuntimeError("no")

    tokenizing = TokenizerPool()
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no"):
                await tokenizing.run(Failing(), [Text("a")])
    finally:
        await asyncio.to_thread(tokenizing.close)
