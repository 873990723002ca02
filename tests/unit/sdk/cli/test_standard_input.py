"""Standard input that comes late, in pieces, or from a file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster

from embedq_sdk.cli.standard_input import InputLines
from tests.helpers.support import wait_until


@pytest.fixture(autouse=True)
def reading(blocking_calls: BlockBuster) -> None:
    """What is ready does not block, which nobody can see from the call."""
    blocking_calls.functions["os.read"].can_block_in("embedq_sdk/cli/standard_input.py", "_fill")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # the test closed it


async def test_the_loop_goes_on_while_no_line_is_there(pipe: tuple[int, int]) -> None:
    here, there = pipe
    lines = InputLines(here)
    waiting = asyncio.create_task(lines.ready())
    os.write(there, b"on")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    os.write(there, b"e\ntwo\nth")
    await wait_until(waiting.done, what="a line")
    assert [next(lines), next(lines)] == [b"one\n", b"two\n"]
    os.close(there)
    await lines.ready()
    assert list(lines) == [b"th"]
    await lines.ready()  # the end is no wait


async def test_an_empty_input_ends(pipe: tuple[int, int]) -> None:
    here, there = pipe
    os.close(there)
    assert list(await InputLines(here).ready()) == []


async def test_a_regular_file_is_always_ready(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"one\n\nlast")
    with open(tmp_path / "in", "rb") as file:
        lines = await InputLines(file.fileno()).ready()
        assert list(lines) == [b"one\n", b"\n", b"last"]


def test_the_first_line_can_be_looked_at_before_it_is_whole(pipe: tuple[int, int]) -> None:
    here, there = pipe
    os.write(there, b"PAR1" + bytes(100))
    assert InputLines(here).readline(50) == b"PAR1" + bytes(100)
