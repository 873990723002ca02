"""Models whose tokenizers are equal share one object of the `tokenizers` library.

Since its version 0.23 a byte-pair encoding remembers words in a map of each thread that has run it, by a number of its own
(`BPE_LOCAL_CACHE` in its src/models/bpe/model.rs), and nothing removes them: neither the end of the tokenizer nor
`_clear_cache`, and its own threads end with the process. With a tokenizer of its own, each reload under load would leave up to
10,000 words behind for each core: 17 MB on a host of sixteen.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import Final
from weakref import WeakValueDictionary

from tokenizers import Tokenizer

from embedq_consumer.engine.text.effective import EffectiveTokenizer

__all__ = ["SharedTokenizer", "shared"]

_KEPT: Final = 2
"""Tokenizers that stay although no model has them: those of the last models, of which an operator may come back to one. One of
151,000 tokens takes 40 MB."""


class SharedTokenizer:
    """One tokenizer of the library, without truncation or padding. Nobody changes it: other threads may be using it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer: Final = tokenizer


_books = Lock()
_in_use: WeakValueDictionary[str, SharedTokenizer] = WeakValueDictionary()
_last: deque[SharedTokenizer] = deque(maxlen=_KEPT)


def shared(effective: EffectiveTokenizer) -> SharedTokenizer:
    """The one that gives these ids, made if there is none. From any thread. Raises what the Rust side raises."""
    digest = effective.digest
    with _books:
        found = _in_use.get(digest)
        if found is None:
            tokenizer = effective.build()
            tokenizer.no_truncation()
            tokenizer.no_padding()
            found = _in_use[digest] = SharedTokenizer(tokenizer)
        if found in _last:
            _last.remove(found)
        _last.append(found)
        return found
