"""Whether work on a few texts begins while the cache is asked for them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from embedq_consumer.engine import Text

_TEXTS: Final = 4
_CHARACTERS: Final = 2_000
"""Limits of what is tokenized before it is known to be needed: some 0.2 ms of a thread."""

SHORT_BYTES: Final = 512
"""Of the lone text that runs before it is known to be needed: a hundred tokens, and never more than its bytes."""
_SHORT_TOKENS: Final = 128
_QUICK_S: Final = 0.025
"""Whoever comes while a text runs in vain waits for no longer."""


class HeadStart:
    """Decides what a lone job's texts may do before the cache has answered: become tokens, and a lone short one run.

    Invariants:
        - Nothing begins but once for each time that the cache lacked a text: no more is done in vain than was needed, and
          nothing where the cache has every text.
        - A text runs only on a device that has nothing else to do, and once micro-batches of few tokens are known to be quick
          there: whoever comes meanwhile waits for one of these at most.
    """

    def __init__(self) -> None:
        self.pays = False
        """Whether the cache lacked a text since something began before it was asked."""
        self._seconds: float | None = None

    def lacked(self) -> None:
        """The cache lacked a text."""
        self.pays = True

    def ran(self, tokens: int, seconds: float) -> None:
        """A micro-batch of so many tokens took so long."""
        if tokens <= _SHORT_TOKENS:
            self._seconds = seconds

    def begin(self, texts: Sequence[Text]) -> bool:
        """Whether these become tokens now; then nothing else begins until the cache lacks a text."""
        if not self.pays or not 0 < len(texts) <= _TEXTS:
            return False
        if sum(len(text.text) + len(text.prompt) for text in texts) > _CHARACTERS:
            return False
        self.pays = False
        return True

    def may_run(self, texts: Sequence[Text]) -> bool:
        """Whether these, which become tokens, run as well, where the device has nothing to do, and nothing else is under way."""
        if self._seconds is None or self._seconds > _QUICK_S or len(texts) > 1:
            return False
        (text,) = texts
        return text.chunk is None and _most_bytes(text) <= SHORT_BYTES


def _most_bytes(text: Text) -> int:
    return len(text.text.encode(errors="replace")) + len(text.prompt.encode(errors="replace"))
