"""Shared prefixes without a device: which tokens are shared, which prefixes are held, and what is copied where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as kernels are defined, Triton's own among them
pytest.importorskip("triton")

from embedq_consumer.engine import Text, Tokens
from embedq_consumer.engine.cuda_graphs import best_fit, fill, fill_shared, input_length, shared_length
from embedq_consumer.engine.kernels import fused_ops as kernels
from embedq_consumer.engine.model_directory import read_directory
from embedq_consumer.engine.prefix_cache import LONGEST_PREFIX, MARGIN, PrefixCache, key_ends, moves_of
from embedq_consumer.engine.text.tokenizer import TextTokenizer
from tests.helpers.tiny_models import QUERY_PROMPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Ids = npt.NDArray[np.int32]


def ids_of(*numbers: int) -> Ids:
    return np.array(numbers, dtype=np.int32)


def text_of(prefix: Ids, own: int = 3) -> Tokens:
    return Tokens(np.concatenate([prefix, np.arange(own, dtype=np.int32)]), shared=len(prefix))


def prefix_of(number: int, length: int = 10) -> Ids:
    return np.full(length, number, dtype=np.int32)


# --- which tokens are shared


@pytest.fixture(scope="module")
def tokenizer(model_path: Callable[[str], Path]) -> TextTokenizer:
    return TextTokenizer.load(read_directory(model_path("qwen3")), 512)


def tokens_of(tokenizer: TextTokenizer, *texts: Text) -> list[Tokens]:
    found = tokenizer.tokenize(texts, share=True)
    assert all(isinstance(tokens, Tokens) for tokens in found)
    return [tokens for tokens in found if isinstance(tokens, Tokens)]


def test_texts_behind_one_prompt_share_the_same_tokens(tokenizer: TextTokenizer) -> None:
    found = tokens_of(tokenizer, *(Text(text, QUERY_PROMPT) for text in ("the moon", "hello", "", " x")))
    shared = {tokens.ids[: tokens.shared].tobytes() for tokens in found}
    assert len(shared) == 1
    assert all(tokens.shared >= 8 for tokens in found)
    assert all(tokens.cost == len(tokens.ids) - tokens.shared >= 1 for tokens in found)


def test_a_prompt_whose_last_token_merges_with_the_text_is_shared_in_front_of_it(
    tokenizer: TextTokenizer,
) -> None:
    prompt = "Instruct: retrieve the passages that answ"
    merged, plain = tokens_of(tokenizer, Text("er", prompt), Text(" moon", prompt))
    alone = tokenizer.tokenize([Text(prompt)])[0]
    assert isinstance(alone, Tokens)
    assert merged.ids[: len(alone.ids) - 1].tolist() != alone.ids[:-1].tolist()
    assert merged.shared == plain.shared == len(alone.ids) - 2


def test_nothing_is_shared_without_a_prompt_or_with_a_short_one_or_unasked(tokenizer: TextTokenizer) -> None:
    assert [tokens.shared for tokens in tokens_of(tokenizer, Text("the moon"), Text("moon", "To: "))] == [
        0,
        0,
    ]
    unasked = tokenizer.tokenize([Text("the moon", QUERY_PROMPT)])[0]
    assert isinstance(unasked, Tokens)
    assert unasked.shared == 0


def test_a_text_that_lost_its_prompt_to_the_cut_shares_nothing(tokenizer: TextTokenizer) -> None:
    long = "stone wall " * 600
    end, start = tokens_of(
        tokenizer, Text(long, QUERY_PROMPT, truncate="end"), Text(long, QUERY_PROMPT, truncate="start")
    )
    assert end.truncated
    assert start.truncated
    # Both cuts keep the prompt where there is room for it.
    assert end.shared == start.shared > 0
    (lost,) = tokens_of(tokenizer, Text("moon", "the stone wall " * 600, truncate="start"))
    assert lost.shared == 0


def test_of_a_prompt_beyond_the_limit_its_beginning_is_shared(model_path: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(read_directory(model_path("qwen3")), 4096)
    (found,) = tokens_of(tokenizer, Text("moon", "the stone wall " * 600))
    assert found.shared == LONGEST_PREFIX


# --- which prefixes are held


def test_a_prefix_is_computed_once_two_texts_have_come_with_it() -> None:
    pool = PrefixCache(64)
    assert pool.place([text_of(prefix_of(1))]) == ([None], [])
    places, new = pool.place([text_of(prefix_of(1))])
    assert [prefix.ids.tolist() for prefix in new] == [prefix_of(1).tolist()]
    assert places[0] is not None
    assert places[0].tolist() == new[0].rows.tolist()
    places, new = pool.place([text_of(prefix_of(1)), Tokens(ids_of(1, 2)), text_of(prefix_of(2))])
    assert new == []
    assert [rows is None for rows in places] == [False, True, True]
    places, new = pool.place([text_of(prefix_of(3))] * 2)
    assert len(new) == 1
    assert all(rows is not None for rows in places)


def test_the_least_recently_used_prefix_makes_room() -> None:
    pool = PrefixCache(31)
    for number in (1, 2, 3):
        pool.place([text_of(prefix_of(number))] * 2)
    pool.place([text_of(prefix_of(1))])
    _, new = pool.place([text_of(prefix_of(4))] * 2)
    assert len(new) == 1
    held = [pool.place([text_of(prefix_of(number))])[0][0] is not None for number in (1, 3, 4)]
    assert held == [True, True, True]
    # 2 is gone; it was worth computing before, and has to show that it still is.
    assert pool.place([text_of(prefix_of(2))])[0] == [None]


def test_a_prefix_without_room_beside_the_others_of_its_batch_is_not_shared() -> None:
    pool = PrefixCache(26)
    pool.place([text_of(prefix_of(9))] * 2)
    batch = [text_of(prefix_of(number)) for number in (9, 1, 2) for _ in range(2)]
    places, new = pool.place(batch)
    assert [rows is None for rows in places] == [False, False, False, False, True, True]
    assert len(new) == 1


def test_a_prefix_that_could_not_be_computed_leaves_its_rows() -> None:
    pool = PrefixCache(11)
    for _ in range(3):
        _, new = pool.place([text_of(prefix_of(1))] * 2)
        assert len(new) == 1
        pool.forget(new[0])


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=12), max_size=30))
def test_no_two_prefixes_that_are_held_have_a_row_in_common(batches: list[list[tuple[int, int]]]) -> None:
    pool = PrefixCache(40)
    rows_of: dict[bytes, list[int]] = {}
    for batch in batches:
        texts = [text_of(prefix_of(number, length)) for number, length in batch]
        places, new = pool.place(texts)
        computed = {prefix.ids.tobytes(): prefix.rows.tolist() for prefix in new}
        used: dict[bytes, list[int]] = {}
        for text, rows in zip(texts, places, strict=True):
            if rows is not None:
                key = text.ids[: text.shared].tobytes()
                assert len(rows) == text.shared
                # What is read was computed just now, or by an earlier batch and not overwritten since.
                assert rows.tolist() == computed.get(key, rows_of.get(key))
                used[key] = rows.tolist()
        assert computed.keys() <= used.keys()
        assert all(0 < row < 40 for rows in used.values() for row in rows)
        taken = [row for rows in used.values() for row in rows]
        assert len(set(taken)) == len(taken)
        written = {row for rows in computed.values() for row in rows}
        rows_of = {key: rows for key, rows in rows_of.items() if not written & set(rows)} | computed


# --- what is copied where

TEXTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=12)


def laid_out(texts: list[tuple[int, int]], kept: Ids | None) -> tuple[Ids, list[Ids], Ids, int]:
    """(inputs, prefixes, lengths, size) of a part of texts, (own tokens, tokens of the prefix) each."""
    lengths = np.array([own for own, _ in texts], dtype=np.int32)
    size, rooms = -(-int(lengths.sum()) // 16) * 16, 16
    random = np.random.default_rng(0)
    prefixes = [random.integers(0, 500, n).astype(np.int32) for _, n in texts]
    room = 4 * size + 128 + MARGIN
    inputs = np.full(shared_length(size, rooms, room), -7, dtype=np.int32)
    whole = inputs[: input_length(size, rooms)]
    fill(whole, [np.arange(n, dtype=np.int32) for n in lengths.tolist()], lengths, size, rooms)
    used = fill_shared(inputs, prefixes, lengths, kept, size, rooms)
    assert (inputs[used:] == -7).all()
    return inputs, prefixes, lengths, size


@given(TEXTS, st.booleans())
def test_keys_of_each_text_lie_side_by_side_with_its_prefix_in_front(
    texts: list[tuple[int, int]], keeps: bool
) -> None:
    kept = np.arange(900, 900 + texts[0][0], dtype=np.int32) if keeps else None
    inputs, prefixes, lengths, size = laid_out(texts, kept)
    positions, cu = inputs[size : 2 * size], inputs[2 * size + 16 : 2 * size + 33]
    begin = -(-input_length(size, 16) // 16) * 16
    ends, count = inputs[begin : begin + 17], int(inputs[begin + 32])
    moves = inputs[begin + 48 : begin + 48 + 2 * count].reshape(-1, 2)
    targets = moves[:, 1].tolist()
    assert len(set(targets)) == len(targets)
    found = dict(zip(targets, moves[:, 0].tolist(), strict=True))
    for place, (own, prefix) in enumerate(zip(lengths.tolist(), prefixes, strict=True)):
        wanted = [*(-1 - prefix).tolist(), *range(cu[place], cu[place] + own)]
        assert [found[row] for row in range(ends[place], ends[place + 1])] == wanted
        here = positions[cu[place] : cu[place + 1]]
        assert here.tolist() == list(range(len(prefix), len(prefix) + own))
    # The tail that no text uses has keys too, and behind the last of all is the pool's row of zeros.
    assert ends[-1] == size + sum(map(len, prefixes))
    assert (np.diff(ends) >= 0).all()
    for place in range(len(texts), 16):
        assert [found[row] for row in range(ends[place], ends[place + 1])] == list(
            range(cu[place], cu[place + 1])
        )
    assert all(found[row] == -1 for row in range(ends[-1], ends[-1] + MARGIN))
    stored = {-1 - target: source for target, source in found.items() if target < 0}
    assert stored == ({900 + n: n for n in range(texts[0][0])} if keeps else {})


@given(st.lists(st.tuples(st.integers(1, 900), st.sampled_from([0, 25, 300])), max_size=200))
def test_parts_keep_within_the_room_for_prefixes(texts: list[tuple[int, int]]) -> None:
    lengths, prefixes = [own for own, _ in texts], [prefix for _, prefix in texts]
    parts = best_fit(lengths, 2048, 40, prefixes=prefixes, prefix_room=1000)
    assert sorted(index for part in parts for index in part) == list(range(len(texts)))
    for part in parts:
        assert sum(prefixes[index] for index in part) <= 1000
        assert sum(lengths[index] for index in part) <= 2048


# --- the kernel


@pytest.mark.parametrize("width", [96, 512, 2560])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_are_moved_as_told(width: int) -> None:
    texts = [(5, 3), (2, 0), (7, 4), (1, 4)]
    prefixes = [np.array(rows, dtype=np.int32) for rows in ([4, 9, 2], [], [7, 8, 1, 30], [7, 8, 1, 30])]
    cu = np.array([0, *np.cumsum([own for own, _ in texts]), 16, 16], dtype=np.int32)
    kept = np.array([20, 21, 22], dtype=np.int32)
    moves = torch.from_numpy(moves_of(cu, prefixes, kept)).to(DEVICE)
    count = torch.tensor([len(moves)], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(16, 32 + width, generator=generator).bfloat16().to(DEVICE)
    pool = torch.randn(40, width, generator=generator).bfloat16().to(DEVICE)
    keys = torch.full((int(key_ends(cu, prefixes)[-1]) + MARGIN + 5, width), torch.nan).bfloat16().to(DEVICE)
    wanted_keys, wanted_pool = keys.clone(), pool.clone()
    pool[0] = 0
    wanted_pool[0] = 0
    own = wide[:, 32:]
    kernels.move_rows_reference(own, wanted_pool, wanted_keys, moves, count)
    kernels.move_rows(own, pool, keys, moves, count)
    assert torch.equal(pool, wanted_pool)
    assert torch.equal(keys[:-5], wanted_keys[:-5])
    assert keys[-5:].isnan().all()
    assert torch.equal(pool[20:23], own[:3])
    assert torch.equal(keys[:3], pool[[4, 9, 2]])
    assert not keys[-5 - MARGIN : -5].any()
