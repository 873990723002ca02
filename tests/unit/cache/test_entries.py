"""Keys and values of the cache: what must differ differs, and what is damaged is not believed."""

from __future__ import annotations

import hmac
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from embedq_consumer.cache.entries import OVERHEAD_BYTES, CachedVector, EntryCodec, cache_key
from embedq_consumer.engine import Text
from embedq_shared.messages import Chunking, Dtype
from embedq_shared.vectors import cut_and_normalize, quantize, vector_bytes

VERSION = "sha256:" + "a" * 64
CODEC = EntryCodec(b"a secret of this test alone")
pack, unpack = CODEC.pack, CODEC.unpack
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


def unit(dimensions: int = 32, dtype: Dtype = "float32") -> CachedVector:
    """The entry of a vector whose components are all equal."""
    vector = cut_and_normalize(np.ones(dimensions, np.float32), dimensions)
    raw, scale = quantize(vector, dtype)
    return CachedVector(tokens=3, truncated="", scale=scale, vector=raw)


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
    expected = ":".join(["embedq", "v2", version.removeprefix("sha256:"), *digests, str(dimensions), dtype])
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
    entry = unit(80)
    of_window = cache_key(VERSION, Text("text", chunk=Chunking("mean", 8)), 80, "float32")
    assert unpack(of_window, pack(of_window, entry)) == entry
    assert unpack(key(dimensions=80), pack(of_window, entry)) == "signature"


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


@st.composite
def entries(draw: st.DrawFn, dimensions: int = 32, dtype: Dtype = "float32") -> CachedVector:
    """What a replica keeps of any direction."""
    numbers = np.frombuffer(draw(st.binary(min_size=dimensions, max_size=dimensions)), np.int8)
    assume(np.any(numbers))
    raw, scale = quantize(cut_and_normalize(numbers.astype(np.float32), dimensions), dtype)
    return CachedVector(
        tokens=draw(st.integers(0, 2**32 - 1)),
        truncated=draw(st.sampled_from(["", "start", "end"])),
        scale=scale,
        vector=raw,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_what_is_packed_is_unpacked_equal(dtype: Dtype, data: st.DataObject) -> None:
    entry = data.draw(entries(64, dtype))
    name = key(dimensions=64, dtype=dtype)
    assert unpack(name, pack(name, entry)) == entry


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_is_of_the_length_that_its_key_says(dtype: Dtype) -> None:
    size = vector_bytes(64, dtype)
    name = key(dimensions=64, dtype=dtype)
    assert unpack(name, pack(name, unit(64, dtype))) == unit(64, dtype)
    for wrong in (0, size - 1, size + 1, 2 * size):
        assert unpack(name, pack(name, whole(b"x" * wrong))) == "size"


@given(entries(), st.data())
def test_any_changed_bit_is_noticed(entry: CachedVector, data: st.DataObject) -> None:
    value = bytearray(pack(key(), entry))
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    value[bit // 8] ^= 1 << bit % 8
    assert unpack(key(), bytes(value)) in {"format", "signature"}


@given(st.binary(max_size=400))
@example(b"EQV2" + bytes(OVERHEAD_BYTES - 4) + bytes(128))
def test_no_foreign_bytes_are_believed(value: bytes) -> None:
    assert isinstance(unpack(key(), value), str)


@given(entries())
def test_the_entry_of_another_key_is_not_believed(entry: CachedVector) -> None:
    assert unpack(key(text="this"), pack(key(text="that"), entry)) == "signature"


@given(entries())
def test_an_entry_that_was_signed_with_another_secret_is_not_believed(entry: CachedVector) -> None:
    forged = EntryCodec(b"what somebody else thought of").pack(key(), entry)
    assert unpack(key(), forged) == "signature"
    assert EntryCodec(b"what somebody else thought of").unpack(key(), forged) == entry


@given(st.binary(max_size=200))
def test_the_keyed_hash_is_hmac_of_header_key_and_vector(secret: bytes) -> None:
    entry = unit()
    value = EntryCodec(secret).pack(key(), entry)
    header, tag = value[: OVERHEAD_BYTES - 16], value[OVERHEAD_BYTES - 16 : OVERHEAD_BYTES]
    assert tag == hmac.digest(secret, header + key() + entry.vector, "sha256")[:16]


def test_the_key_and_the_rest_cannot_be_told_apart_in_another_way() -> None:
    """Bytes that move from the vector to the key are signed as something else."""
    short, long = key(dimensions=32), key(dimensions=32) + b"EQ"
    entry = unit()
    moved = pack(long, entry)
    assert unpack(short, moved) == "signature"


# -- vectors that no model gives, even if they are signed ------------------------------------------------------------


def floats(dtype: str, *numbers: float) -> bytes:
    return np.array(
        [*numbers, *[0.0] * (32 - len(numbers))], "<f4" if dtype == "float32" else "<f2"
    ).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "numbers", [(), (float("nan"),), (float("inf"),), (0.5,), (1.01,), (1.0, 0.2), (2.0,)]
)
def test_floats_that_are_not_of_length_1_are_not_believed(dtype: Dtype, numbers: tuple[float, ...]) -> None:
    name = key(dtype=dtype)
    assert unpack(name, pack(name, whole(floats(dtype, *numbers)))) == "values"
    assert unpack(name, pack(name, whole(floats(dtype, 0.6, -0.8)))) == whole(floats(dtype, 0.6, -0.8))


@pytest.mark.filterwarnings("error")
def test_numbers_whose_squares_no_float_holds_are_not_believed() -> None:
    for huge in (1e38, -1e38, 3e19):
        entry = whole(floats("float32", huge, huge, -huge))
        assert unpack(key(), pack(key(), entry)) == "values"


_ODD = (float("nan"), float("inf"), 1e38, 3e19, 0.0, 1.01, 0.99)


@pytest.mark.filterwarnings("error")
@given(st.lists(st.tuples(dtypes, st.sampled_from([32, 40]), st.integers(0, 12)), max_size=24))
def test_what_is_unpacked_together_is_what_each_would_be_alone(kinds: list[tuple[Dtype, int, int]]) -> None:
    """Among good entries some that were not signed, are too short, or hold no vector of length 1."""
    found: list[tuple[bytes, bytes]] = []
    expected: list[CachedVector | str] = []
    for dtype, dimensions, kind in kinds:
        name, entry = key(dimensions=dimensions, dtype=dtype), unit(dimensions, dtype)
        if kind < len(_ODD) and dtype == "float32":
            entry = whole(floats(dtype, _ODD[kind]).ljust(vector_bytes(dimensions, dtype), b"\0"))
        value = pack(name, entry)
        value = value[:-1] if kind == 11 else bytes([value[0] ^ 1]) + value[1:] if kind == 12 else value
        found.append((name, value))
        wrong = "size" if kind == 11 else "format" if kind == 12 else None
        if kind < len(_ODD) and dtype == "float32":
            wrong = "values"
        expected.append(wrong or entry)
    assert CODEC.unpack_many(found) == expected
    assert [unpack(*one) for one in found] == expected


@pytest.mark.parametrize("scale", [None, 0.0, -1 / 127, float("nan"), float("inf"), 1.0, 0.5 / 127])
def test_int8_with_a_scale_that_does_not_make_its_length_1_is_not_believed(scale: float | None) -> None:
    name = key(dtype="int8")
    entry = CachedVector(tokens=1, truncated="", scale=scale, vector=bytes([127] + [0] * 31))
    assert unpack(name, pack(name, entry)) == "values"
    right = msgspec.structs.replace(entry, scale=1 / 127)
    assert unpack(name, pack(name, right)) == right


@pytest.mark.parametrize("dtype", ["float32", "float16", "binary"])
def test_only_int8_has_a_scale(dtype: Dtype) -> None:
    name = key(dtype=dtype)
    entry = msgspec.structs.replace(unit(32, dtype), scale=0.5)
    assert unpack(name, pack(name, entry)) == "values"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("dimensions", [32, 384, 4096, 16384])
def test_real_directions_are_believed_at_every_size(dtype: Dtype, dimensions: int) -> None:
    """Also one in which a single component is large and all others lie where rounding does most."""
    name = key(dimensions=dimensions, dtype=dtype)
    chance = np.random.default_rng(dimensions)
    peaked = np.full(dimensions, 0.4999 / 127, np.float32)
    peaked[0] = 1.0
    for numbers in (chance.standard_normal(dimensions, np.float32), peaked):
        raw, scale = quantize(cut_and_normalize(numbers, dimensions), dtype)
        entry = CachedVector(tokens=1, truncated="", scale=scale, vector=raw)
        assert unpack(name, pack(name, entry)) == entry
