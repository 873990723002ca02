"""Interactive texts are tokenized before bulk ones that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.engine import Text, TextTooLong, Tokens
from tests.helpers.in_flight import Model
from tests.helpers.support import wait_until


class Gated(Model):
    """A tokenizer that notes which texts it begins with, and waits at a gate for those that say so."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []
        self.gate = threading.Event()

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        self.begun.append(texts[0].text)
        if texts[0].text.startswith("bulk"):
            assert self.gate.wait(30)
        return [Tokens(np.zeros(1, np.int32)) for _ in texts]


@pytest.fixture
def gated() -> Gated:
    return Gated()


async def test_an_interactive_call_overtakes_bulk_calls_that_wait(gated: Gated) -> None:
    tokenizing = TokenizerPool()
    try:
        calls: list[asyncio.Task[Any]] = [
            asyncio.create_task(tokenizing.run("bulk", gated, [Text(f"bulk {number}")]))
            for number in range(8)
        ]
        await wait_until(lambda: len(gated.begun) == 2, what="both threads at the gate")
        calls.append(asyncio.create_task(tokenizing.run("interactive", gated, [Text("urgent")])))
        await asyncio.sleep(0)  # it is in the threads' queue
        gated.gate.set()
        await asyncio.gather(*calls)
    finally:
        gated.gate.set()
        await asyncio.to_thread(tokenizing.close)
    assert gated.begun.index("urgent") <= 3
    assert [text for text in gated.begun if text != "urgent"] == [f"bulk {number}" for number in range(8)]


async def test_a_call_that_fails_lets_the_next_one_run() -> None:
    class Failing(Model):
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
            raise RuntimeError("no")

    tokenizing = TokenizerPool()
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no"):
                await tokenizing.run("bulk", Failing(), [Text("a")])
    finally:
        await asyncio.to_thread(tokenizing.close)
