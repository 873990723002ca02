"""A short slice of each fuzz, and that the fuzzer finds what it is there for.

A million inputs each: `python -m tests.fuzz --decoder all`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz.decoders import DECODERS, Decoder
from tests.fuzz.fuzzer import fuzz, report
from tests.helpers.support import patient

_SLICE = {"model": 500}
_INPUTS = 4000
"""Of the others: a second or two each."""


@pytest.fixture
def seed() -> int:
    """CI judges a change, so it tries the same inputs before and after it; everywhere else new ones are tried."""
    return 1 if "CI" in os.environ else random.randrange(10**6)


@pytest.fixture(params=list(DECODERS))
def decoder(request: pytest.FixtureRequest, seed: int) -> Iterator[Decoder]:
    made = DECODERS[request.param](seed)
    yield made
    made.close()


def test_a_decoder_raises_only_what_it_documents_and_is_quick_and_keeps_nothing(decoder: Decoder) -> None:
    found = fuzz(decoder, _SLICE.get(decoder.name, _INPUTS), slow_s=patient(1))
    assert not found.problems, report(decoder.name, decoder.seed, found)
    assert len(found.outcomes) > 1  # some pass and some do not, or it would test one branch alone


def test_equal_seeds_give_equal_inputs(decoder: Decoder) -> None:
    again = DECODERS[decoder.name](decoder.seed)
    try:
        assert [decoder.input(n) for n in range(100)] == [again.input(n) for n in range(100)]
        assert decoder.input(50) == again.input(50)  # whatever was drawn before
    finally:
        again.close()


class Planted(Decoder):
    """Breaks at some of its inputs."""

    name = "planted"

    def __init__(self, fault: str) -> None:
        super().__init__(seed=1)
        self._fault = fault
        self._kept: list[bytes] = []

    def input(self, number: int) -> int:
        return number

    def decode(self, given: Any) -> str:
        if self._fault == "raises" and given % 10 == 3:
            raise KeyError("oops")
        if self._fault == "slow" and given == 7:
            begun = time.thread_time()
            while time.thread_time() - begun < 0.05:
                pass
        if self._fault == "grows":
            self._kept.append(b"x" * 1_000_000)  # mapped anew, and touched
        return "well"


def test_an_exception_that_nobody_documented_is_found_once_and_counted() -> None:
    found = fuzz(Planted("raises"), 100)
    (problem,) = found.problems
    assert (problem.kind, problem.number) == ("KeyError", 3)
    assert found.outcomes == {"well": 90, "FINDING": 10}
    assert "10 times, first --only 3" in report("planted", 1, found)


def test_a_slow_input_is_found() -> None:
    found = fuzz(Planted("slow"), 100, slow_s=0.04)
    assert [(problem.kind, problem.number) for problem in found.problems] == [("slow", 7)]


def test_memory_that_grows_is_found() -> None:
    found = fuzz(Planted("grows"), 300, growth_bytes=100_000_000)
    assert [problem.kind for problem in found.problems] == ["growth"]


def test_without_a_fault_nothing_is_found() -> None:
    assert not fuzz(Planted("none"), 300).problems
