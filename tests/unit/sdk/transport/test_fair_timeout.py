"""A deadline that the event loop itself was late for is put off once."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_sdk.transport.fair_timeout import fair_timeout, put_off


async def test_an_answer_that_came_while_the_loop_stood_still_is_taken() -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def heard() -> None:
        # As a socket's transport does: it reads in one turn, and whoever waits for the answer gets it turns later.
        loop.call_soon(loop.call_soon, answer.set_result, "yes")

    async with fair_timeout(0.2):
        loop.call_later(0.1, heard)
        loop.call_soon(time.sleep, 0.5)
        assert await answer == "yes"


async def test_who_never_answers_is_not_waited_for_without_end() -> None:
    for stall_s in (0.0, 0.1):
        asyncio.get_running_loop().call_soon(time.sleep, stall_s)
        with pytest.raises(TimeoutError):
            async with fair_timeout(0.01):
                await asyncio.Event().wait()


async def test_what_the_block_raises_comes_out_and_the_end_is_forgotten() -> None:
    with pytest.raises(ZeroDivisionError):
        async with fair_timeout(0.01):
            raise ZeroDivisionError
    await asyncio.sleep(0.05)


@given(st.floats(-1.0, 1e6), st.floats(0.0, 1e3))
def test_it_is_put_off_by_as_much_as_it_was_late_and_no_more_than_twice_as_long(
    late: float, seconds: float
) -> None:
    assert put_off(late, seconds) == max(0.0, min(late, seconds))
