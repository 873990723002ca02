"""Interactive texts are tokenized before bulk ones that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from embedq_consumer.batching.tokenizer_pool import TokenizerPool
from embedq_consumer.engine import Encoder, Text, Tokens
from tests.helpers.support import wait_until


class Gated:
    """A tokenizer that notes which texts it begins with, and waits at a gate for those that say so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = threading.Event()

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens]:
        self.begun.append(texts[0].text)
        if texts[0].text.startswith("bulk"):
            assert self.gate.wait(30)
        return [Tokens(np.zeros(1, np.int32)) for _ in texts]


@pytest.fixture
def gated() -> Gated:
    return Gated()


async def test_an_interactive_call_overtakes_bulk_calls_that_wait(gated: Gated) -> None:
    tokenizing = TokenizerPool()
    encoder = cast("Encoder", gated)
    try:
        calls: list[asyncio.Task[Any]] = [
            asyncio.create_task(tokenizing.run("bulk", encoder, [Text(f"bulk {number}")]))
            for number in range(8)
        ]
        await wait_until(lambda: len(gated.begun) == 2, what="both threads at the gate")
        calls.append(asyncio.create_task(tokenizing.run("interactive", encoder, [Text("urgent")])))
        await asyncio.sleep(0)  # it is in the threads' queue
        gated.gate.set()
        await asyncio.gather(*calls)
    finally:
        gated.gate.set()
        await asyncio.to_thread(tokenizing.close)
    assert gated.begun.index("urgent") <= 3
    assert [text for text in gated.begun if text != "urgent"] == [f"bulk {number}" for number in range(8)]


async def test_a_call_that_fails_lets_the_next_one_run() -> None:
    class Failing:
        def tokenize(self, texts: Sequence[Text]) -> list[Tokens]:
            raise RuntimeError("no")

    tokenizing = TokenizerPool()
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no"):
                await tokenizing.run("bulk", cast("Encoder", Failing()), [Text("a")])
    finally:
        await asyncio.to_thread(tokenizing.close)
