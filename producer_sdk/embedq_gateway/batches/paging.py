"""Lists that are read a page at a time, by the name of the last thing seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

_AT_ONCE: Final = 16
"""Documents of a list that are asked for together."""

Document = TypeVar("Document")


def ordered(names: Sequence[str], after: str | None, newest_first: bool) -> list[str]:
    """Names in the order of a list, from behind the one named `after`, whether it is there or not."""
    kept = sorted(names, reverse=newest_first)
    if after is None:
        return kept
    return [name for name in kept if (name < after if newest_first else name > after)]


async def documents(
    names: Sequence[str], get: Callable[[str], Awaitable[Document | None]]
) -> AsyncGenerator[Document, None]:
    """The documents of these names in their order, without those that are gone. No more is asked for than is taken."""
    for start in range(0, len(names), _AT_ONCE):
        for document in await asyncio.gather(*map(get, names[start : start + _AT_ONCE])):
            if document is not None:
                yield document
