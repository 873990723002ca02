"""Texts to token ids, as sentence-transformers makes them on transformers 4, but in batches, off the GIL and from any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from embedq_consumer.engine.api import Chunked, Failed, ModelError, Piece, Text, TextTooLong, Tokens
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.safety.panics import first_line, panics_caught
from embedq_consumer.engine.text.chunking import cut, spans_of, windows_of
from embedq_consumer.engine.text.effective import EffectiveTokenizer, effective_tokenizer
from embedq_consumer.engine.text.shared_tokenizers import shared
from embedq_consumer.engine.text.transformers_reading import differs_from_transformers

__all__ = ["TextTokenizer"]

_PROBES = (
    "",
    " ",
    "\0\x1b\ufffd\u200b\u202e",
    "The harbour pilot boards the ship two miles before the breakwater. 0123456789 " * 40,
    "Straße café naïve Łódź αβγ Москва עברית العربية हिन्दी ไทย 한국어 日本語 汉字 ነው ქართული",
    "👩\u200d👩\u200d👧 🛂 ﷽ ﬁ ½ ℵ 𝔘𝔫𝔦 𐍈 \U0010fffd",
    "def f(x): return {x: [x ** 2]}  # <|im_end|> [MASK] </s> <pad> <mask>",
    "".join(map(chr, (*range(0x20, 0xD800, 97), *range(0xE000, 0x20000, 997)))),
)
"""Texts of every kind: nothing, controls, many scripts, emoji, code, what spells special tokens, and characters of all planes."""

Encode = Callable[[list[str]], list[Encoding]]
Found = TypeVar("Found")


class TextTokenizer:
    """A fast tokenizer without mutable state: truncation and padding are off, and texts are cut here.

    A text that spells a special token (`<|im_end|>`) is read as that token, and whitespace at either end stays: both as
    sentence-transformers does. A cut never removes the special tokens that the post-processor adds
    (`<|endoftext|>`, `[CLS]`, `[SEP]`).
    """

    def __init__(self, effective: EffectiveTokenizer, max_tokens: int, rows: int) -> None:
        """`rows` of the embedding table: the ids that the model knows are those below it.

        Raises:
            ModelError: the limit leaves no room for a text, or every text would get a token that the model does not know.
        """
        self.effective = effective
        self._shared = shared(effective)  # which ends with the last model that has it
        self._tokenizer = tokenizer = self._shared.tokenizer
        self._max_tokens = max_tokens
        self._rows = rows
        self._before, self._after = _added_tokens(tokenizer)
        if self._before + self._after >= max_tokens:
            raise ModelError(f"the limit of {max_tokens} tokens leaves no room between the special tokens")
        for number in tokenizer.encode("").ids:
            if number >= rows:
                raise ModelError(
                    f"every text gets the token {tokenizer.id_to_token(number)!r} of id {number}, but the embedding table has "
                    f"{rows} rows"
                )
        self._beyond = sorted(number for number in tokenizer.get_added_tokens_decoder() if number >= rows)
        """Ids that a text may have and the model does not know: those of added tokens."""

    @classmethod
    def load(cls, directory: ModelDirectory, max_tokens: int, rows: int) -> TextTokenizer:
        """The tokenizer of `directory`, tried on texts of every kind, and compared with what transformers makes of it.

        Raises:
            ModelError: the files are malformed, the tokenizer does not take every text, or it is not this model's.
        """
        file = directory.checkpoint / "tokenizer.json"
        effective = effective_tokenizer(directory)
        try:
            with panics_caught():
                tokenizer = cls(effective, max_tokens, rows)
                tokenizer.refuse_foreign_vocabulary()
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(f"{file}: {first_line(error)}") from error
        tokenizer.prove(str(file))
        if note := differs_from_transformers(directory, tokenizer._tokenizer, _PROBES):
            tokenizer.effective = effective.noting(note)
        return tokenizer

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should know of how the files were read."""
        if not self._beyond:
            return self.effective.notes
        shown = ", ".join(map(str, self._beyond[:3])) + (", …" if len(self._beyond) > 3 else "")
        note = f"added tokens have the ids {shown}, but the embedding table has {self._rows} rows: a text that spells one fails"
        return (*self.effective.notes, note)

    def refuse_foreign_vocabulary(self) -> None:
        """Added tokens may be rare; those of the vocabulary itself come up in any text.

        Raises:
            ModelError: the vocabulary has ids beyond the embedding table.
        """
        token, number = max(
            self._tokenizer.get_vocab(with_added_tokens=False).items(),
            key=lambda entry: entry[1],
            default=("", -1),
        )
        if number >= self._rows:
            raise ModelError(
                f"the vocabulary has the token {token[:80]!r} of id {number}, but the embedding table has {self._rows} rows"
            )

    def prove(self, file: str) -> None:
        """Tokenize texts of every kind: those of jobs will be of every kind.

        Raises:
            ModelError: it fails on one, for instance because it lacks its own unknown token.
        """
        for found in self.tokenize([Text(text, truncate="end") for text in _PROBES]):
            if isinstance(found, Failed) and found.beyond is None:
                raise ModelError(f"{file}: the tokenizer does not take every text: {found.reason}")

    def token_types(self) -> set[int]:
        """The types (segments) that the post-processor gives the tokens of a text; 0 is what models take for granted."""
        return set(self._tokenizer.encode("a").type_ids)

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong | Failed]:
        """Tokens of each text, in order. Safe to call from many threads at once."""

        def tokens_of(text: Text, encoding: Encoding) -> Tokens | TextTooLong | Failed:
            found = self._fit(text, encoding)
            return (self._unknown(found.ids) or found) if isinstance(found, Tokens) else found

        return _each(self._tokenizer.encode_batch_fast, texts, tokens_of)

    def _unknown(self, ids: npt.NDArray[np.int32]) -> Failed | None:
        """The failure of a text with a token that the model does not know."""
        if not self._beyond or (found := int(ids.max(initial=0))) < self._rows:
            return None
        return Failed(f"the id {found} is beyond the model's {self._rows} embeddings", (found, self._rows))

    def chunk(self, texts: Sequence[Text], *, end_token: bool) -> list[Chunked | TextTooLong | Failed]:
        """Windows of each text; see `Encoder.chunk`. With `end_token`, the last span of a window includes the special tokens
        after the text. Safe to call from many threads at once."""
        return _each(
            self._tokenizer.encode_batch, texts, lambda text, encoding: self._chunk(text, encoding, end_token)
        )

    def _chunk(self, text: Text, encoding: Encoding, end_token: bool) -> Chunked | TextTooLong | Failed:
        if text.chunk is None:
            raise RuntimeError("a text without `chunk`. This is a bug.")
        ids: npt.NDArray[np.int32] = np.array(encoding.ids, dtype=np.int32)
        if unknown := self._unknown(ids):
            return unknown
        end = len(ids) - self._after
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[self._before : end]
        offsets -= len(text.prompt)
        # A token that prompt and text share (a space before a word) is the text's, or it would belong to no piece.
        prompt = int(np.count_nonzero(np.maximum.accumulate(offsets[:, 1]) <= 0))
        begins, ends = np.maximum(offsets[prompt:].T, 0)
        head = self._before + prompt
        around = head + self._after
        if 2 * around > self._max_tokens:
            return TextTooLong(tokens=around, limit=self._max_tokens // 2)
        room = self._max_tokens - around
        late = text.chunk.mode == "late"
        size = min(text.chunk.tokens or room, room)
        # Windows shorter than the prompt would be mostly prompt: a small job could ask for a day of work.
        ranges = cut(text.text, begins, ends, size if late else max(size, prompt))
        if not ranges:
            return Chunked((Tokens(ids),), (Piece(0, len(text.text), 0),))
        windows = []
        for group in windows_of(ranges, room) if late else ([found] for found in ranges):
            first, last = group[0][0], group[-1][1]
            if last - first > room:  # one character of more tokens than the model takes
                return TextTooLong(tokens=last - first + around, limit=self._max_tokens)
            row = np.concatenate([ids[:head], ids[head + first : head + last], ids[end:]])
            spans = [(begin - first + head, stop - first + head) for begin, stop in group] if late else []
            if spans and end_token:
                spans[-1] = (spans[-1][0], len(row))
            windows.append(Tokens(row, spans=tuple(spans)))
        characters = spans_of(ranges, begins, len(text.text))
        pieces = [Piece(*span, stop - begin) for span, (begin, stop) in zip(characters, ranges, strict=True)]
        return Chunked(tuple(windows), tuple(pieces))

    def _fit(self, text: Text, encoding: Encoding) -> Tokens | TextTooLong:
        ids: npt.NDArray[np.int32] = np.array(encoding.ids, dtype=np.int32)
        if len(ids) <= self._max_tokens:
            return Tokens(ids)
        if text.truncate == "error":
            return TextTooLong(tokens=len(ids), limit=self._max_tokens)
        end = len(ids) - self._after
        room = self._max_tokens - self._before - self._after
        if text.truncate == "end":
            kept = [ids[: self._before + room], ids[end:]]
        else:
            prompt = self._prompt_tokens(text)
            # A prompt that fills the limit by itself would leave nothing of the text: then it is cut like the text.
            prompt = prompt if prompt < room else 0
            kept = [ids[: self._before + prompt], ids[end - (room - prompt) :]]
        return Tokens(np.concatenate(kept), truncated=True)

    def _prompt_tokens(self, text: Text) -> int:
        """How many of the first tokens belong to the prompt, including one that straddles the border."""
        if not text.prompt:
            return 0
        offsets = self._tokenizer.encode(text.prompt + text.text, add_special_tokens=False).offsets
        return sum(begin < len(text.prompt) for begin, _ in offsets)


def _added_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens the post-processor adds before and after a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    added = len(full) - len(bare)
    for front in range(added + 1):
        if full[front : front + len(bare)] == bare:
            return front, added - front
    raise ModelError("tokenizer.json: post_processor: expected one that only adds tokens around the text")


def _each(
    encode: Encode, texts: Sequence[Text], make: Callable[[Text, Encoding], Found]
) -> list[Found | Failed]:
    """What `make` makes of each text's encoding. A call that fails is repeated in halves, until the text that fails is alone."""
    if not texts:
        return []
    try:
        with panics_caught():
            encodings = encode([text.prompt + text.text for text in texts])
            return [make(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
    except Exception as error:  # noqa: BLE001  # the Rust side raises plain Exception; a text must cost no other one its vector
        if len(texts) == 1:
            return [Failed(first_line(error))]
    middle = len(texts) // 2
    return _each(encode, texts[:middle], make) + _each(encode, texts[middle:], make)
