"""The loads that an engine is measured with, as token ids: each text's lengths are what matters, its ids are random."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from embedq_consumer.engine import Tokens

INSTRUCTION = 25
"""Tokens of the instruction before each query; its last one may merge with the text, so it is not shared."""
COMMON = 40
"""Tokens that the instructions of all tenants begin with; `NAMED` more, with the tenant's name, are its own."""
NAMED = 20
TENANTS = 1000
LONGEST = 32_768


def _log_normal(count: int, seed: int = 0) -> list[int]:
    """Documents: 3,000 of them are 808,910 tokens, 270 on average, 2,048 at most."""
    random = Random(seed)
    return [min(2048, max(8, int(random.lognormvariate(math.log(180), 0.9)))) for _ in range(count)]


LENGTHS: dict[str, Callable[[], Sequence[int]]] = {
    "log-normal": lambda: _log_normal(3000),
    "queries": lambda: [INSTRUCTION + 15] * 16_000,
    "queries apart": lambda: [INSTRUCTION + 15] * 8000,
    "tenants": lambda: [COMMON + NAMED + 40] * 8000,
    "tenants apart": lambda: [COMMON + NAMED + 40] * 4000,
    "forty": lambda: [40] * 12_000,
    "512": lambda: [512] * 1000,
    "duplicates": lambda: _log_normal(3000),
    "8k": lambda: [8192] * 40,
    "32k": lambda: [LONGEST] * 6,
    "mixed 32k": lambda: _mixed(),
}
"""By name; `queries` share an instruction, `tenants` the first tokens of one; `… apart` are such texts without sharing them."""


def _mixed(batches: int = 200, budget: int = 16_384) -> list[int]:
    """What fills 200 micro-batches, of which every tenth is one text of 32,768 tokens."""
    lengths: list[int] = []
    documents = iter(_log_normal(20_000, seed=1))
    for batch in range(batches):
        if batch % 10 == 9:
            lengths.append(LONGEST)
            continue
        room = budget
        while room > 0:
            length = min(room, next(documents))
            lengths.append(length)
            room -= length
    return lengths


def corpus(name: str, vocabulary: int) -> list[Tokens]:
    """The texts of one load, in the order in which they come."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, vocabulary, length).astype(np.int32) for length in LENGTHS[name]()]
    if name == "duplicates":  # nine of ten texts were there before
        distinct = ids[: len(ids) // 10]
        ids = [
            distinct[i] if i < len(distinct) else distinct[random.integers(len(distinct))]
            for i in range(len(ids))
        ]
    shared = 0
    if name.startswith("queries"):
        shared = INSTRUCTION - 1
        for text in ids:
            text[:INSTRUCTION] = ids[0][:INSTRUCTION]
    if name.startswith("tenants"):
        shared = COMMON
        names = random.integers(3, vocabulary, (TENANTS, NAMED)).astype(np.int32)
        for text in ids:
            text[:COMMON] = ids[0][:COMMON]
            text[COMMON : COMMON + NAMED] = names[random.integers(TENANTS)]
    # `shared` is what the service's tokenizer finds once a few of them have run.
    apart = name.endswith("apart")
    return [Tokens(text, shared=0 if apart else shared, whole=apart) for text in ids]
