"""Texts become tokens in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.engine import Text, TextTooLong, Tokens
from tests.helpers.in_flight import Model
from tests.helpers.support import wait_until


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


async def test_a_tokenizer_that_hangs_on_a_short_text_is_seen_and_holds_nobody_up() -> None:
    """On the event loop nothing would be left that could end the process, and the job with it."""
    goes_on = threading.Event()

    class Hanging(Model):
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
            goes_on.wait()
            raise RuntimeError("at last")

    tokenizing = TokenizerPool()
    call = asyncio.create_task(tokenizing.run(Hanging(), [Text("a")]))
    try:
        await wait_until(lambda: tokenizing.busy_since is not None, what="a call that runs")
        assert not call.done()
    finally:
        goes_on.set()
        with pytest.raises(RuntimeError, match="at last"):
            await call
        await asyncio.to_thread(tokenizing.close)
