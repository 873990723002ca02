"""Whatever a model directory holds, loading it ends, in little memory, and says what is wrong: nothing but `ModelError`."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedq_consumer.engine import Failed, ModelError, Text, Tokens, load_encoder
from tests.helpers.bad_models import HARMS, Harm, copied
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_modernbert

NO_UNKNOWN = "WordPiece error: Missing [UNK] token from the vocabulary"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("good") / "model")


@pytest.mark.parametrize("harm", HARMS.values(), ids=list(HARMS))
def test_a_directory_that_would_harm_is_refused_by_name_and_costs_little_memory(
    good: Path, tmp_path: Path, harm: Harm
) -> None:
    model = copied(good, tmp_path / "model")
    harm.do(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError) as refused:
        load_encoder(model, device="cpu")
    assert harm.told in str(refused.value)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
    )  # KiB; the imports may be in it


def test_a_text_that_makes_the_tokenizer_fail_fails_alone(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(good, device="cpu")

    class PanicException(BaseException):
        """Named as pyo3's, which no library exports."""

    class Fragile:
        """Fails as the tokenizers library does: the whole call, for one text's sake."""

        def __init__(self, tokenizer: Tokenizer) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            def call(texts: Any, **more: Any) -> Any:
                if "panic" in texts or any("panic" in text for text in texts):
                    raise PanicException("slice index out of range")
                if any("error" in text for text in texts):
                    raise Exception(NO_UNKNOWN)  # noqa: TRY002  # as the library does
                return getattr(self._tokenizer, name)(texts, **more)

            return call

    tokenizer: Any = getattr(encoder, "_tokenizer")  # noqa: B009
    monkeypatch.setattr(tokenizer, "_tokenizer", Fragile(tokenizer._tokenizer))
    words = ["the", "moon", "panic", "is", "error", "round", "panic"]
    found = encoder.tokenize([Text(word) for word in words])
    assert [isinstance(each, Tokens) for each in found] == [True, True, False, True, False, True, False]
    assert found[2] == Failed("slice index out of range")
    assert found[4] == Failed(NO_UNKNOWN)
    monkeypatch.undo()
    good_tokens = encoder.tokenize([Text("moon")])[0]
    assert isinstance(good_tokens, Tokens)
    assert isinstance(found[1], Tokens)
    assert np.array_equal(found[1].ids, good_tokens.ids)
    encoder.close()


def test_a_model_on_the_cpu_serves_on_when_its_files_are_overwritten(tmp_path: Path) -> None:
    """transformers maps the file: its pages are the weights, and are gone with it."""
    model = make_tiny_modernbert(tmp_path / "model")
    encoder = load_encoder(model, device="cpu")
    [tokens] = encoder.tokenize([Text("the moon")])
    assert isinstance(tokens, Tokens)
    before = encoder.submit([tokens]).result()
    os.truncate(model / "model.safetensors", 100)
    assert np.array_equal(encoder.submit([tokens]).result(), before)
    encoder.close()


# -- fuzzing -----------------------------------------------------------------------------------------------------------

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")]),
    st.text(max_size=20),
    st.sampled_from(
        ["", "..", "/", "gelu_new", "cpu", "[UNK]", "BPE", "WordPiece", "Precompiled", "org/repo"]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document; of a vocabulary, the first few."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for number, (key, child) in enumerate(children):
        if number < 30:
            yield from places(child, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return document


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, Any]:
    """A file, and what is done to it: cut at a share of its length, nested deeply, or one place of it changed or dropped."""
    kind = draw(st.sampled_from(["cut", "nest", "place", "place", "place", "drop"]))
    file = draw(st.sampled_from(FILES))
    if kind == "cut":
        return file, ("cut", draw(st.floats(0, 1)))
    if kind == "nest":
        return file, ("nest", draw(st.sampled_from([10, 1_000, 100_000])), draw(st.integers(0, 10**6)))
    return file, (kind, draw(st.integers(0, 10**6)), draw(VALUES))


def mutated(content: bytes, how: Any) -> bytes:
    if how[0] == "cut":
        return content[: int(how[1] * len(content))]
    document = json.loads(content)
    known = list(places(document))
    if how[0] == "nest":
        return content.replace(
            b":", b": " + b"[" * how[1] + b"]" * how[1] + b"," if how[2] % 2 else b":" + b"[" * how[1], 1
        )
    place = known[how[1] % len(known)]
    if how[0] == "drop" and place:
        target = document
        for key in place[:-1]:
            target = target[key]
        del target[place[-1]]
        return json.dumps(document).encode()
    return json.dumps(put(document, place, how[2])).encode()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mutation=mutations())
@example(mutation=("config.json", ("nest", 100_000, 0)))
@example(mutation=("tokenizer.json", ("nest", 100_000, 1)))
@example(mutation=("config.json", ("cut", 0.5)))
def test_nothing_but_model_errors_comes_of_changed_files(good: Path, tmp_path: Path, mutation: Any) -> None:
    name, how = mutation
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    copied(good, model)
    file = model / name
    if not file.exists():
        return
    file.write_bytes(mutated(file.read_bytes(), how))
    try:
        encoder = load_encoder(model, device="cpu")
    except ModelError:
        return
    try:
        found = encoder.tokenize([Text("the moon is round", truncate="end"), Text("")])
        assert all(isinstance(each, Tokens | Failed) for each in found)
    finally:
        encoder.close()
