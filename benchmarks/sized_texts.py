"""Texts of wanted lengths in tokens, for the service, which takes no ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.texts import sentences


def sized_texts(model: Path, lengths: Sequence[int], seed: int = 0) -> tuple[list[str], list[int]]:
    """Different texts of known words, and what the model's own tokenizer makes of each: tokens, special ones included.

    A text is within a token or two of its wanted length.
    """
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = sorted({word for line in sentences() for word in line.split() if word.isalpha()})
    alone = len(tokenizer.encode("the", add_special_tokens=False).ids)
    special = len(tokenizer.encode("the").ids) - alone
    cost = {
        word: len(tokenizer.encode(f"the {word}", add_special_tokens=False).ids) - alone for word in words
    }
    short = [word for word in words if cost[word] <= 2] or sorted(words, key=lambda word: cost[word])[:20]
    random = Random(seed)
    texts: list[str] = []
    known: set[str] = set()
    for length in lengths:
        while True:
            found, left = ["the"], length - special - alone
            while left > 0:
                word = random.choice(words if left > 12 else short)
                found.append(word)
                left -= cost[word]
            text = " ".join(found)
            if text not in known:
                break
            length += 1  # so few tokens have been spelled in every way already
        known.add(text)
        texts.append(text)
    counts: list[int] = []
    for begin in range(0, len(texts), 10_000):
        counts += [len(found.ids) for found in tokenizer.encode_batch(texts[begin : begin + 10_000])]
    return texts, counts
