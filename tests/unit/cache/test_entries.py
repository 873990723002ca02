"""Keys and values of the cache: what must differ differs, and what is damaged is not believed."""

from __future__ import annotations

from hashlib import sha256

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.cache.entries import CachedVector, cache_key, pack, unpack
from embedq_consumer.engine import Text
from embedq_shared.messages import Chunking, Dtype
from embedq_shared.vectors import vector_bytes

VERSION = "sha256:" + "a" * 64
DTYPES = ("float32", "float16", "int8", "binary")

versions = st.binary(min_size=32, max_size=32).map(lambda digest: f"sha256:{digest.hex()}")
texts = st.text(st.characters(codec="utf-8"))
# Few and similar values, so that neighbours which a careless join would confuse do meet.
close_texts = st.text(st.sampled_from("a:0\x001é"), max_size=4)
dimensions = st.integers(1, 512).map(lambda n: n * 8)
dtypes = st.sampled_from(DTYPES)
fields = st.tuples(
    st.sampled_from([VERSION, "sha256:" + "b" * 64]),
    close_texts,
    close_texts,
    st.sampled_from([8, 16, 80]),
    dtypes,
)


def key(
    version: str = VERSION, text: str = "text", prompt: str = "", dimensions: int = 32, dtype: str = "float32"
) -> bytes:
    return cache_key(version, Text(text, prompt), dimensions, dtype)


def whole(vector: bytes) -> CachedVector:
    """The entry of a text that was not cut."""
    return CachedVector(tokens=3, truncated="", scale=None, vector=vector)


@given(fields, fields)
def test_two_keys_are_equal_exactly_if_every_field_is(
    one: tuple[str, str, str, int, str], other: tuple[str, str, str, int, str]
) -> None:
    assert (key(*one) == key(*other)) == (one == other)


@given(versions, texts, texts, dimensions, dtypes)
def test_a_key_names_the_digests_and_the_shape(
    version: str, text: str, prompt: str, dimensions: int, dtype: str
) -> None:
    digests = [sha256(part.encode()).hexdigest() for part in (text, prompt)]
    expected = ":".join(["embedq", "v1", version.removeprefix("sha256:"), *digests, str(dimensions), dtype])
    assert key(version, text, prompt, dimensions, dtype) == expected.encode()


def test_whatever_else_the_model_sees_of_an_input_changes_its_key() -> None:
    """A field that is added to `Text` must go into the key, or into the entry as `truncate` does."""
    plain = Text("text", "prompt", "error", None)
    others = {"text": "other", "prompt": "other", "truncate": "end", "chunk": Chunking("mean", 8)}
    assert set(others) == set(Text.__struct_fields__)
    changed = {
        name
        for name, value in others.items()
        if cache_key(VERSION, msgspec.structs.replace(plain, **{name: value}), 32, "float32")
        != cache_key(VERSION, plain, 32, "float32")
    }
    assert changed == {"text", "prompt", "chunk"}


def test_a_mean_over_windows_has_a_key_of_its_own() -> None:
    chunks = [None, *(Chunking("mean", tokens) for tokens in (8, 80, 512))]
    keys = [
        cache_key(VERSION, Text("text", chunk=chunk), dimensions, "float32")
        for dimensions in (8, 80)
        for chunk in chunks
    ]
    assert len(set(keys)) == len(keys)
    entry = whole(bytes(4 * 80))
    of_window = cache_key(VERSION, Text("text", chunk=Chunking("mean", 8)), 80, "float32")
    assert unpack(of_window, pack(of_window, entry)) == entry
    assert unpack(key(dimensions=80), pack(of_window, entry)) is None


def test_a_prompt_of_any_length_has_a_key_of_its_own() -> None:
    prompts = ["", "a", "b", "a" * 5000, "a" * 5001, "b" * 5000]
    keys = {key(prompt=prompt) for prompt in prompts}
    assert len(keys) == len(prompts)
    assert key(prompt="a" * 5000) in keys


def test_moving_characters_between_prompt_and_text_changes_the_key() -> None:
    assert key(prompt="Query:", text="text") != key(prompt="", text="Query:text")


@pytest.mark.parametrize("version", ["", "a" * 64, "sha256:" + "a" * 63, "sha256:" + "A" * 64, "MiniLM"])
def test_a_model_version_that_is_not_a_digest_makes_no_key(version: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        key(version=version)


entries = st.builds(
    CachedVector,
    tokens=st.integers(0, 2**32 - 1),
    truncated=st.sampled_from(["", "start", "end"]),
    scale=st.none() | st.floats(allow_nan=False),
    vector=st.binary(min_size=128, max_size=128),
)


@given(entries)
def test_what_is_packed_is_unpacked_equal(entry: CachedVector) -> None:
    assert unpack(key(), pack(key(), entry)) == entry


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_is_of_the_length_that_its_key_says(dtype: Dtype) -> None:
    size = vector_bytes(64, dtype)
    name = key(dimensions=64, dtype=dtype)
    assert unpack(name, pack(name, whole(b"x" * size))) is not None
    for wrong in (0, size - 1, size + 1, 2 * size):
        assert unpack(name, pack(name, whole(b"x" * wrong))) is None


@given(entries, st.data())
def test_any_changed_bit_is_noticed(entry: CachedVector, data: st.DataObject) -> None:
    value = bytearray(pack(key(), entry))
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    value[bit // 8] ^= 1 << bit % 8
    assert unpack(key(), bytes(value)) is None


@given(st.binary(max_size=400))
def test_no_foreign_bytes_are_believed(value: bytes) -> None:
    assert unpack(key(), value) is None


@given(entries)
def test_the_entry_of_another_key_is_not_believed(entry: CachedVector) -> None:
    assert unpack(key(text="this"), pack(key(text="that"), entry)) is None
