"""Where a text is cut into ranges of at most `size` tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_shared.grouping import batched_by

__all__ = ["Offsets", "Range", "cut", "spans_of", "windows_of"]

Range = tuple[int, int]
"""[begin, end)."""
Offsets = npt.NDArray[np.int64]
"""For each token, a character of the text."""

_ENDS: Final = frozenset(".!?…。！？")
_CLOSING: Final = frozenset("\"'”’»)]}」』")
_NEEDS_NO_BLANK: Final = frozenset("。！？")


def cut(text: str, begins: Offsets, ends: Offsets, size: int) -> list[Range]:
    """Consecutive ranges of at most `size` tokens that hold all of them; token i covers text[begins[i]:ends[i]].

    A range ends after the last sentence that ends in its last quarter, else after the last word there, else where it is
    full. It never ends between tokens that share a character: such a group stays whole, even if it is larger than `size`.
    """
    free = _free(begins, ends)
    found: list[Range] = []
    begin, count = 0, len(begins)
    while count - begin > size:
        end = begin + size
        least = end - size // 4
        ends_at = [at for at in range(end, least - 1, -1) if free[at]]
        at = (
            next((at for at in ends_at if _is_sentence_end(text, begins[at])), None)
            or next((at for at in ends_at if _is_word_end(text, begins[at])), None)
            or next(iter(ends_at), None)
            or next((at for at in range(least - 1, begin, -1) if free[at]), None)
            or next((at for at in range(end + 1, count) if free[at]), count)
        )
        found.append((begin, at))
        begin = at
    if begin < count:
        found.append((begin, count))
    return found


def spans_of(ranges: Sequence[Range], begins: Offsets, length: int) -> list[Range]:
    """The characters of each range: they cover a text of `length` characters; spaces between two belong to the first."""
    borders = [0, *(int(begins[begin]) for begin, _ in ranges[1:]), length]
    return list(pairwise(borders))


def windows_of(ranges: Sequence[Range], size: int) -> Iterator[list[Range]]:
    """Consecutive ranges in groups of at most `size` tokens; a larger range is a group of its own."""
    return batched_by(ranges, lambda found: found[1] - found[0], size)


def _free(begins: Offsets, ends: Offsets) -> npt.NDArray[np.bool_]:
    """Before which tokens a range may end: those that begin with a character that no earlier token touches."""
    reached = np.maximum.accumulate(np.concatenate([[0], ends[:-1]]))
    return (begins >= reached) & (ends > begins) & (begins > 0)


def _is_word_end(text: str, at: int) -> bool:
    return text[at - 1].isspace() or text[at].isspace()


def _is_sentence_end(text: str, at: int) -> bool:
    """Whether a sentence, or a line, ends before the character `at`."""
    before = at - 1
    while before >= 0 and text[before].isspace():
        if text[before] == "\n":
            return True
        before -= 1
    blank = before < at - 1 or text[at].isspace()
    while before > 0 and text[before] in _CLOSING:
        before -= 1
    return before >= 0 and text[before] in (_ENDS if blank else _NEEDS_NO_BLANK)
