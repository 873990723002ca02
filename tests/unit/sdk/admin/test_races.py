"""Commands that are written at once: one is followed, its writer alone is told so, and compaction keeps it."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_sdk.admin.control import FoundCommand, LostRace, _take_part
from embedq_shared.messages import Control


def a_command(name: str, version: int = 1) -> Control:
    return Control(alias="default", version=version, path=f"/{name}", command_id=name)


class ControlTopic:
    """All writers' records, in the order in which they came."""

    def __init__(self) -> None:
        self.commands: list[Control] = []

    async def write(self, command: Control) -> int:
        await _some_steps()
        self.commands.append(command)
        offset = len(self.commands) - 1
        await _some_steps()
        return offset


class Reader:
    """One writer's, which has read the topic up to where it was before anybody wrote. A poll may bring later records too."""

    def __init__(self, topic: ControlTopic) -> None:
        self._topic = topic
        self._position = 0

    async def read_back(self, offset: int) -> list[FoundCommand]:
        await _some_steps()
        found = [
            FoundCommand(number, command)
            for number, command in enumerate(self._topic.commands)
            if number >= self._position
        ]
        self._position = len(self._topic.commands)
        return found


async def _some_steps() -> None:
    for _ in range(random.randrange(4)):
        await asyncio.sleep(0)


async def _outcome(topic: ControlTopic, command: Control) -> bool:
    try:
        await _take_part(Reader(topic), command, topic.write)  # type: ignore[arg-type]
    except LostRace:
        return False
    return True


async def _race(versions: list[int]) -> tuple[list[str], list[Control]]:
    topic = ControlTopic()
    commands = [a_command(f"c{number}", version) for number, version in enumerate(versions)]
    won = await asyncio.gather(*(_outcome(topic, command) for command in commands))
    return [command.command_id for command, its in zip(commands, won, strict=True) if its], topic.commands


@pytest.mark.parametrize("seed", range(5))
def test_of_twenty_writers_one_learns_that_its_command_is_followed(seed: int) -> None:
    random.seed(seed)
    winners, written = asyncio.run(_race([7] * 20))

    assert winners == [written[0].command_id]
    assert written[-1].command_id == winners[0], "compaction would keep another one"


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_last_record_is_always_what_replicas_follow(versions: list[int], chance: random.Random) -> None:
    random.seed(chance.random())
    winners, written = asyncio.run(_race(versions))

    followed = max(written, key=lambda command: command.version)
    assert written[-1].command_id == followed.command_id
    assert followed.command_id in winners
