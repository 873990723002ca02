"""Texts to token ids, exactly as sentence-transformers makes them, but in batches, off the GIL and from any thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, normalizers

from embedq_consumer.engine import ModelError, Text, TextTooLong, Tokens
from embedq_consumer.engine.directory import ModelDirectory

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """A fast tokenizer with no state that a call changes: truncation and padding are off for good, the cut is ours.

    A text that spells a special token (`<|im_end|>`) is read as that token, and blanks at either end stay: both are
    what sentence-transformers does. A cut never removes the special tokens that the post-processor adds
    (`<|endoftext|>`, `[CLS]`, `[SEP]`).
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._front, self._behind = _added_tokens(tokenizer)
        if self._front + self._behind >= max_tokens:
            raise ModelError(f"the limit of {max_tokens} tokens leaves no room between the special tokens")

    @classmethod
    def load(cls, directory: ModelDirectory, max_tokens: int) -> TextTokenizer:
        """The tokenizer of `directory`.

        transformers builds it, as it does for sentence-transformers: its classes may replace parts of `tokenizer.json`
        by what `tokenizer_config.json` asks for.
        """
        from transformers import AutoTokenizer

        file = directory.checkpoint / "tokenizer.json"
        try:
            wrapper = AutoTokenizer.from_pretrained(
                str(directory.checkpoint), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(f"{file}: {_first_line(error)}") from error
        backend: Any = getattr(wrapper, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(f"{file}: {type(wrapper).__name__} is not a fast tokenizer")
        if directory.lower_case:
            rest = [backend.normalizer] if backend.normalizer is not None else []
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
        return cls(backend, max_tokens)

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        """Tokens of each text, in order. Safe to call from many threads at once."""
        encodings = self._tokenizer.encode_batch_fast([text.prompt + text.text for text in texts])
        return [self._fit(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _fit(self, text: Text, encoding: Encoding) -> Tokens | TextTooLong:
        ids: npt.NDArray[np.int32] = np.array(encoding.ids, dtype=np.int32)
        if len(ids) <= self._max_tokens:
            return Tokens(ids)
        if text.truncate == "error":
            return TextTooLong(tokens=len(ids), limit=self._max_tokens)
        end = len(ids) - self._behind
        room = self._max_tokens - self._front - self._behind
        if text.truncate == "end":
            kept = [ids[: self._front + room], ids[end:]]
        else:
            prompt = self._prompt_tokens(text)
            # A prompt that fills the limit by itself leaves nothing to keep of the text: then it is cut like the text.
            prompt = prompt if prompt < room else 0
            kept = [ids[: self._front + prompt], ids[end - (room - prompt) :]]
        return Tokens(np.concatenate(kept), truncated=True)

    def _prompt_tokens(self, text: Text) -> int:
        """How many of the first tokens belong to the prompt; one that straddles the border does."""
        if not text.prompt:
            return 0
        offsets = self._tokenizer.encode(text.prompt + text.text, add_special_tokens=False).offsets
        return sum(begin < len(text.prompt) for begin, _ in offsets)


def _added_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens the post-processor puts in front of and behind a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    added = len(full) - len(bare)
    for front in range(added + 1):
        if full[front : front + len(bare)] == bare:
            return front, added - front
    raise ModelError("tokenizer.json: post_processor: expected one that only adds tokens around the text")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
