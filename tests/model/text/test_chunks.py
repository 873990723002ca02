"""Chunks against transformers' own hidden states and sentence-transformers' own vectors, and where their borders lie."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer.engine import Chunked, Encoder, Text, TextTooLong, Tokens
from embedq_shared.messages import Chunking
from tests.helpers.encoders import MODELS, normalized

TOLERANCE = 1e-5
LATE = ["minilm", "qwen3", "bert-mean"]
PROMPT = "Instruct: Find it\nQuery:"

STORY = (
    "The children are playing near the old stone wall. Gravity attracts two bodies towards each other! "
    "北京是中国的首都。 Москва слезам не верит. 😀 👩‍👩‍👧‍👦 e\u0301 and <|im_end|>, über den Fluß? "
)


def chunked(encoder: Encoder, text: str, chunk: Chunking, prompt: str = "") -> Chunked:
    (found,) = encoder.chunk([Text(text, prompt, chunk=chunk)])
    assert isinstance(found, Chunked), found
    return found


def late(tokens: int = 32) -> Chunking:
    return Chunking("late", tokens)


def vectors_of(encoder: Encoder, windows: tuple[Tokens, ...]) -> npt.NDArray[np.float32]:
    return encoder.submit(windows).result()


@pytest.fixture(scope="module")
def hidden_states(model_path: Callable[[str], Path]) -> Callable[..., npt.NDArray[np.float32]]:
    """transformers' own last hidden states of some ids, float32 (tokens, hidden)."""
    import torch
    from transformers import AutoModel

    loaded: dict[str, Any] = {}

    def states(name: str, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        if name not in loaded:
            loaded[name] = AutoModel.from_pretrained(
                str(model_path(name)), local_files_only=True, dtype=torch.float32
            ).eval()
        with torch.inference_mode():
            row = torch.from_numpy(ids.astype(np.int64))[None]
            found: npt.NDArray[np.float32] = loaded[name](input_ids=row).last_hidden_state[0].numpy()
        return found

    return states


@pytest.mark.parametrize("prompt", ["", PROMPT, "query: "])
@pytest.mark.parametrize("name", LATE)
def test_spans_are_pooled_from_the_hidden_states_of_the_whole_text(
    name: str,
    prompt: str,
    encoder_of: Callable[[str], Encoder],
    hidden_states: Callable[..., npt.NDArray[np.float32]],
    hugging_face: Callable[[str], Any],
) -> None:
    encoder = encoder_of(name)
    text = STORY[: 180 if name == "bert-mean" else None]
    found = chunked(encoder, text, late(8 if name == "bert-mean" else 16), prompt)
    (window,) = found.windows
    encoding = hugging_face(name)(prompt + text, return_offsets_mapping=True)
    assert window.ids.tolist() == encoding["input_ids"]
    assert found.tokens == len(window.ids)
    assert len(found.pieces) > 2
    states = hidden_states(name, window.ids)
    special = hugging_face(name)("")["input_ids"]
    expected = []
    for piece in found.pieces:
        inside = [
            token
            for token, (begin, end) in enumerate(encoding["offset_mapping"])
            if end > max(begin, len(prompt)) and piece.start <= max(0, begin - len(prompt)) < piece.end
        ]
        assert len(inside) == piece.tokens
        if name == "qwen3":
            final = inside[-1] + (piece is found.pieces[-1]) * len(special)
            expected.append(states[final])
        else:
            expected.append(states[inside].mean(axis=0))
    vectors = vectors_of(encoder, found.windows)
    assert vectors.dtype == np.float32
    assert np.abs(normalized(vectors) - normalized(np.stack(expected))).max() <= TOLERANCE


@pytest.fixture(scope="module")
def hugging_face(model_path: Callable[[str], Path]) -> Callable[[str], Any]:
    from transformers import AutoTokenizer

    return lambda name: AutoTokenizer.from_pretrained(str(model_path(name)), local_files_only=True)


@pytest.mark.parametrize("tokens", [8, 13, 64])
@pytest.mark.parametrize("mode", ["late", "mean"])
@pytest.mark.parametrize("name", LATE)
def test_pieces_tile_the_text_and_windows_keep_to_the_limit(
    name: str, mode: Any, tokens: int, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of(name)
    text = f"  \n{STORY * 30}  "
    found = chunked(encoder, text, Chunking(mode, tokens))
    assert len(found.windows) > 1
    assert all(len(window.ids) <= encoder.max_tokens for window in found.windows)
    assert (found.pieces[0].start, found.pieces[-1].end) == (0, len(text))
    assert all(one.end == other.start for one, other in pairwise(found.pieces))
    assert all(piece.start < piece.end and 0 < piece.tokens <= tokens for piece in found.pieces)
    assert sum(window.rows for window in found.windows) == len(found.pieces)


@pytest.mark.parametrize("name", ["minilm", "qwen3"])
def test_a_character_of_several_tokens_is_never_cut(
    name: str, encoder_of: Callable[[str], Encoder], hugging_face: Callable[[str], Any]
) -> None:
    text = "a😀" * 40 + "👩‍👩‍👧‍👦" * 10
    tokenizer = hugging_face(name)
    found = chunked(encoder_of(name), text, late(8))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [
        id for window in found.windows for begin, end in window.spans for id in window.ids[begin:end].tolist()
    ][: len(whole)] == whole
    starts = {begin for begin, _ in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]}
    assert all(piece.start in starts for piece in found.pieces)


@pytest.mark.parametrize("name", LATE)
def test_a_late_text_beyond_the_limit_goes_on_in_the_next_window(
    name: str,
    encoder_of: Callable[[str], Encoder],
    hidden_states: Callable[..., npt.NDArray[np.float32]],
) -> None:
    encoder = encoder_of(name)
    text = "The moon is round, and so is the sun. " * (encoder.max_tokens // 3)
    found = chunked(encoder, text, late(16), PROMPT)
    plain = encoder.tokenize([Text("", PROMPT), Text("")])
    prompt, empty = (tokens.ids.tolist() for tokens in plain if isinstance(tokens, Tokens))
    after = len(empty) - (name != "qwen3")  # [CLS] comes before
    assert len(found.windows) > 2
    expected = []
    for window in found.windows:
        ids = window.ids.tolist()
        assert ids[: len(prompt) - after] == prompt[:-after]
        assert ids[-after:] == empty[-after:]
        states = hidden_states(name, window.ids)
        expected += [
            states[end - 1] if name == "qwen3" else states[begin:end].mean(axis=0)
            for begin, end in window.spans
        ]
        assert window.spans[0][0] == len(prompt) - after
        assert window.spans[-1][1] == len(ids) - (0 if name == "qwen3" else after)
    assert len(expected) == len(found.pieces)
    vectors = vectors_of(encoder, found.windows)
    assert np.abs(normalized(vectors) - normalized(np.stack(expected))).max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", ["", "query: "])
def test_windows_of_a_mean_are_what_sentence_transformers_gives_for_their_texts(
    name: str, prompt: str, encoder_of: Callable[[str], Encoder], reference_of: Callable[[str], Any]
) -> None:
    encoder = encoder_of(name)
    text = "The moon is round. the old stone wall, the children and the moon are near " * encoder.max_tokens
    found = chunked(encoder, text[: encoder.max_tokens * 9], Chunking("mean"), prompt)
    assert len(found.windows) > 2
    parts = [text[piece.start : piece.end] for piece in found.pieces]
    if prompt:  # it ends with the blank that the windows begin with
        parts = [part.lstrip() for part in parts]
    vectors = vectors_of(encoder, found.windows)
    expected = reference_of(name).encode(parts, prompt=prompt)
    assert np.abs(normalized(vectors) - normalized(expected)).max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_text_within_one_window_is_the_text_itself(name: str, encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of(name)
    found = chunked(encoder, "The moon is round.", Chunking("mean"), "query: ")
    (plain,) = encoder.tokenize([Text("The moon is round.", "query: ")])
    assert isinstance(plain, Tokens)
    assert [window.ids.tolist() for window in found.windows] == [plain.ids.tolist()]
    assert not found.windows[0].spans


def test_the_last_span_of_a_causal_model_is_the_vector_of_the_text(
    encoder_of: Callable[[str], Encoder],
) -> None:
    encoder = encoder_of("qwen3")
    found = chunked(encoder, STORY, late(16))
    (plain,) = encoder.tokenize([Text(STORY)])
    assert isinstance(plain, Tokens)
    vectors = normalized(vectors_of(encoder, found.windows))
    assert np.abs(vectors[-1] - normalized(encoder.encode([plain.ids]))[0]).max() <= TOLERANCE


@pytest.mark.parametrize("name", LATE)
def test_texts_with_and_without_spans_keep_their_order_in_one_batch(
    name: str, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of(name)
    texts = [STORY[: 20 + 17 * n] for n in range(9)]
    batch = [
        window
        for n, text in enumerate(texts)
        for window in (
            chunked(encoder, text, late(8)).windows
            if n % 2
            else [found for found in encoder.tokenize([Text(text)]) if isinstance(found, Tokens)]
        )
    ]
    together = encoder.submit(batch).result()
    apart = np.concatenate([encoder.submit([tokens]).result() for tokens in batch])
    assert len(together) == sum(tokens.rows for tokens in batch) > len(batch)
    assert np.abs(normalized(together) - normalized(apart)).max() <= TOLERANCE


@pytest.mark.parametrize("text", ["", "   "])
@pytest.mark.parametrize("mode", ["late", "mean"])
@pytest.mark.parametrize("name", LATE)
def test_a_text_of_nothing_is_one_piece(
    name: str, mode: Any, text: str, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of(name)
    found = chunked(encoder, text, Chunking(mode, 8), "query: ")
    (piece,) = found.pieces
    assert (piece.start, piece.end) == (0, len(text))
    (plain,) = encoder.tokenize([Text(text, "query: ")])
    assert isinstance(plain, Tokens)
    assert found.tokens == len(plain.ids)
    if piece.tokens == 0 or mode == "mean" or name == "qwen3":
        one, other = vectors_of(encoder, found.windows), encoder.encode([plain.ids])
        assert np.abs(normalized(one) - normalized(other)).max() <= TOLERANCE


@pytest.mark.parametrize("mode", ["late", "mean"])
def test_a_prompt_that_takes_more_than_half_of_the_limit_is_refused(
    mode: Any, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of("qwen3")
    found = encoder.chunk(
        [Text("a", "the " * 400, chunk=Chunking(mode, 8)), Text("a", chunk=Chunking(mode, 8))]
    )
    assert isinstance(found[0], TextTooLong)
    assert found[0].tokens > found[0].limit == encoder.max_tokens // 2
    assert isinstance(found[1], Chunked)


def test_a_window_of_a_mean_holds_at_least_as_much_text_as_prompt(
    encoder_of: Callable[[str], Encoder],
) -> None:
    encoder = encoder_of("qwen3")
    prompt = "the moon " * 20
    (alone,) = encoder.tokenize([Text("", prompt)])
    assert isinstance(alone, Tokens)
    found = chunked(encoder, "x " * 2000, Chunking("mean", 8), prompt)
    assert all(piece.tokens > len(alone.ids) // 2 for piece in found.pieces[:-1])
    assert found.tokens < 3 * sum(piece.tokens for piece in found.pieces)


def test_only_a_model_that_pools_its_first_token_has_no_spans(encoder_of: Callable[[str], Encoder]) -> None:
    assert [encoder_of(name).late_chunks for name in ("minilm", "qwen3", "bert-mean", "bert-cls")] == [
        True,
        True,
        True,
        False,
    ]
