"""Where a text is cut into pieces of so many tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine.text.chunking import Range, spans_of, windows_of
from embedq_consumer.engine.text.chunking import cut as cut_places

Tokenized = tuple[str, list[int], list[int]]
"""A text, and where its tokens begin and end."""

_LETTERS = st.sampled_from(list("abcdefgh  .,!?\n\"')北。😀é"))


@st.composite
def tokenized(draw: st.DrawFn) -> Tokenized:
    """Any text in tokens: of one character or several, several to one character, characters without any between them."""
    text = draw(st.text(_LETTERS, max_size=120))
    begins: list[int] = []
    ends: list[int] = []
    at = 0
    while at < len(text):
        length = draw(st.integers(0, 4))
        width = min(max(1, length), len(text) - at)
        for _ in range(draw(st.sampled_from([1, 1, 1, 1, 3, 20])) if length == 1 else bool(length)):
            begins.append(at)
            ends.append(at + width)
        at += width
    return text, begins, ends


def cut(text: str, begins: list[int], ends: list[int], size: int) -> list[Range]:
    return cut_places(text, np.array(begins, np.int64), np.array(ends, np.int64), size)


def words(text: str) -> Tokenized:
    """One token for each word and each mark behind it, as a tokenizer that drops blanks makes them."""
    places = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
    return text, [begin for begin, _ in places], [end for _, end in places]


def pieces(tokens: Tokenized, size: int) -> list[str]:
    """The text of each span."""
    text, begins, ends = tokens
    return [
        text[begin:end] for begin, end in spans_of(cut(text, begins, ends, size), np.array(begins), len(text))
    ]


@given(tokenized(), st.integers(8, 40))
def test_ranges_hold_every_token_once_and_spans_every_character(tokens: Tokenized, size: int) -> None:
    text, begins, ends = tokens
    ranges = cut(text, begins, ends, size)
    assert [token for begin, end in ranges for token in range(begin, end)] == list(range(len(begins)))
    assert "".join(pieces(tokens, size)) == text
    if begins:
        spans = spans_of(ranges, np.array(begins), len(text))
        assert all(begin < end for begin, end in spans)
        for (first, last), (start, stop) in zip(ranges, spans, strict=True):
            assert all(start <= begins[token] and ends[token] <= stop for token in range(first, last))


@given(tokenized(), st.integers(8, 40))
def test_a_range_has_more_tokens_than_asked_for_only_where_they_share_characters(
    tokens: Tokenized, size: int
) -> None:
    text, begins, ends = tokens
    for first, last in cut(text, begins, ends, size):
        if last - first > size:
            assert all(max(ends[first:token]) > begins[token] for token in range(first + 1, last))


@given(tokenized(), st.integers(8, 40))
def test_a_range_before_the_last_is_at_least_three_quarters_full_of_single_tokens(
    tokens: Tokenized, size: int
) -> None:
    text = tokens[0]
    single = list(range(len(text)))
    for first, last in cut(text, single, [at + 1 for at in single], size)[:-1]:
        assert size - size // 4 <= last - first <= size


@given(tokenized(), st.integers(8, 40), st.integers(8, 200))
def test_windows_keep_their_spans_in_order_and_within_their_size(
    tokens: Tokenized, size: int, room: int
) -> None:
    ranges = cut(*tokens, size)
    windows = list(windows_of(ranges, room))
    assert [found for window in windows for found in window] == ranges
    for window in windows:
        assert len(window) == 1 or window[-1][1] - window[0][0] <= room


def test_a_span_ends_behind_a_sentence_in_its_last_quarter() -> None:
    text = "one two three four five six seven. eight nine ten eleven twelve."
    assert pieces(words(text), 9) == [
        "one two three four five six seven. ",
        "eight nine ten eleven twelve.",
    ]


def test_a_sentence_that_ends_before_the_last_quarter_does_not_end_a_span() -> None:
    text = "one two. three four five six seven eight nine ten eleven"
    assert pieces(words(text), 9)[0] == "one two. three four five six seven eight "


@pytest.mark.parametrize("mark", ["!", "?", '."', ".)", "…", "\n"])
def test_sentences_end_with_more_than_a_full_stop(mark: str) -> None:
    head = "a b c d e f g h i j k l m n" + mark
    text = f"{head} o p q r s"
    assert pieces(words(text), 17)[0].strip() == head.strip()


def test_a_number_with_a_point_is_no_end_of_a_sentence() -> None:
    text = "one two three four five six 3.14 eight nine ten"
    assert pieces(words(text), 9)[0] == "one two three four five six 3.14 "


def test_words_of_several_tokens_are_not_cut() -> None:
    text = "aaa bbb ccc ddd eee"
    begins = [at for at, letter in enumerate(text) if letter != " "]
    assert pieces((text, begins, [at + 1 for at in begins]), 8) == ["aaa bbb ", "ccc ddd ", "eee"]


def test_a_word_longer_than_the_last_quarter_is_cut_where_the_span_is_full() -> None:
    text = "a" * 20
    single = list(range(20))
    assert pieces((text, single, [at + 1 for at in single]), 8) == ["a" * 8, "a" * 8, "a" * 4]


def test_texts_without_blanks_end_spans_behind_their_own_full_stop() -> None:
    text = "北京是中国的首都。莫斯科很大。"
    single = list(range(len(text)))
    assert pieces((text, single, [at + 1 for at in single]), 10)[0] == "北京是中国的首都。"


def test_a_character_of_several_tokens_stays_whole() -> None:
    text = "😀" * 6
    begins = [at for at in range(6) for _ in range(3)]
    assert pieces((text, begins, [at + 1 for at in begins]), 8) == ["😀" * 2] * 3


def test_a_character_of_more_tokens_than_a_span_is_a_span_alone() -> None:
    text = "aXb"
    begins = [0, *[1] * 12, 2]
    assert cut(text, begins, [at + 1 for at in begins], 8) == [(0, 1), (1, 13), (13, 14)]


def test_no_tokens_make_no_ranges() -> None:
    assert cut("  ", [], [], 8) == []
