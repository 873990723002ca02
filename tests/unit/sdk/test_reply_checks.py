"""Replies of a foreign or broken service: read, or refused with one documented error."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import numpy.ma  # by its first user, and so in the middle of a measurement
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedq_sdk.embeddings import FinishedJob, ReadDatum, ReadResult, assemble
from embedq_sdk.reply_checks import Asked, BadReply, check_whole, read_checked
from embedq_shared.topics import JSON, MSGPACK
from embedq_shared.vectors import quantize
from tests.helpers.replies import UNIT, V1, datum, failed, result

DTYPES = ("float32", "float16", "int8", "binary")


def item(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": UNIT.tobytes(), "tokens": 1} | changes


def reply(*data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    whole = {
        "object": "list",
        "id": "j",
        "model": "default",
        "model_version": V1,
        "dimensions": 64,
        "dtype": "float32",
        "data": list(data or [item()]),
        "part": 0,
        "parts": 1,
    }
    return whole | changes


def read(message: Any, content_type: str = MSGPACK) -> ReadResult:
    value = msgspec.msgpack.encode(message) if content_type == MSGPACK else json.dumps(message).encode()
    found = read_checked(value, content_type.encode())
    assert isinstance(found, ReadResult)
    return found


def rows(found: ReadResult) -> np.ndarray[Any, Any]:
    return assemble([FinishedJob(count=len(found.data), outcome=[found])]).vectors


# -- the ways to write a vector ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_base64_and_numbers_give_the_same_vector(dtype: Any) -> None:
    raw, scale = quantize(UNIT * np.linspace(-1, 1, 64, dtype=np.float32), dtype)
    numbers = np.frombuffer(raw, {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}[dtype])
    in_bytes = read(reply(item(embedding=raw, scale=scale), dtype=dtype))
    in_text = reply(item(embedding=base64.b64encode(raw).decode(), scale=scale), dtype=dtype)
    in_numbers = reply(item(embedding=numbers.tolist(), scale=scale), dtype=dtype)

    assert read(in_text, JSON) == read(in_numbers, JSON) == in_bytes
    assert np.array_equal(rows(read(in_text, JSON)), rows(in_bytes))


def test_an_input_that_failed_has_no_vector_whatever_is_written() -> None:
    error = {"code": "non_finite", "message": "m"}
    found = read(reply(item(0), item(1, embedding=[None], error=error)))
    check_whole([found], Asked(count=2))
    assert found.data[1].embedding is None
    assert rows(found)[1].tolist() == [0.0] * 64


# -- what no reply is --------------------------------------------------------------------------------------------------

NAN = np.full(64, np.nan, "<f4").tobytes()
BAD: dict[str, dict[str, Any]] = {
    "no vector": reply(item(embedding=None)),
    "a vector that is an object": reply(item(embedding={"a": 1})),
    "a vector that is a number": reply(item(embedding=7)),
    "too short": reply(item(embedding=UNIT.tobytes()[:-4])),
    "too long": reply(item(embedding=UNIT.tobytes() * 2)),
    "not whole numbers of bytes": reply(item(embedding=UNIT.tobytes()[:-1])),
    "another dtype's length": reply(dtype="float16"),
    "NaN": reply(item(embedding=NAN)),
    "infinity": reply(item(embedding=np.full(64, np.inf, "<f4").tobytes())),
    "NaN in the second": reply(item(0), item(1, embedding=NAN)),
    "no base64": reply(item(embedding="x" * 344)),
    "base64 with blanks": reply(item(embedding=" " + base64.b64encode(UNIT.tobytes()).decode())),
    "base64 without its end": reply(item(embedding=base64.b64encode(UNIT.tobytes()).decode().rstrip("="))),
    "text that is not ASCII": reply(item(embedding="ä" * 344)),
    "numbers as text": reply(item(embedding=["0.1"] * 64)),
    "nested numbers": reply(item(embedding=[[0.1] * 64])),
    "nothing for numbers": reply(item(embedding=[None] * 64)),
    "truth for numbers": reply(item(embedding=[True] * 64)),
    "too few numbers": reply(item(embedding=[0.1] * 63)),
    "numbers that no float32 holds": reply(item(embedding=[1e300] * 64)),
    "numbers that no byte holds": reply(item(embedding=[300] * 64, scale=0.1), dtype="int8"),
    "fractions for bytes": reply(item(embedding=[0.5] * 64, scale=0.1), dtype="int8"),
    "int8 without a scale": reply(item(embedding=bytes(64)), dtype="int8"),
    "int8 with a scale of 0": reply(item(embedding=bytes(64), scale=0.0), dtype="int8"),
    "int8 with a scale below 0": reply(item(embedding=bytes(64), scale=-1.0), dtype="int8"),
    "bits that fill no byte": reply(item(embedding=bytes(8)), dimensions=65, dtype="binary"),
    "an unknown dtype": reply(dtype="float64"),
    "no dimensions": reply(item(embedding=b""), dimensions=0),
    "dimensions below zero": reply(dimensions=-64),
    "endless dimensions": reply(dimensions=2**62),
    "no data": reply(data=[]),
    "data that is none": reply(data=7),
    "an index below zero": reply(item(-1)),
    "an endless index": reply(item(2**62)),
    "an index of text": reply(item("0")),  # type: ignore[arg-type]
    "tokens below zero": reply(item(tokens=-1)),
    "endless tokens": reply(item(tokens=2**63)),
    "a span that ends before it begins": reply(item(span=[5, 4])),
    "a span below zero": reply(item(span=[-1, 4])),
    "an endless span": reply(item(span=[0, 2**63])),
    "a span of three": reply(item(span=[0, 1, 2])),
    "no parts": reply(parts=0),
    "parts below zero": reply(parts=-2),
    "endless parts": reply(parts=2**31),
    "a part after the last": reply(part=2, parts=2),
    "a part below zero": reply(part=-1, parts=2),
    "usage below zero": reply(usage={"prompt_tokens": -1, "total_tokens": 1}),
    "usage that is text": reply(usage="much"),
    "another object": reply(object="poem"),
    "no object": {"id": "j"},
    "a list": [1, 2],  # type: ignore[dict-item]
    "a failure without a code": {"object": "error", "error": {"message": "m"}},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
def test_what_breaks_the_contract_is_a_bad_reply(name: str, content_type: str) -> None:
    message = BAD[name]
    if content_type == JSON:
        try:
            value = json.dumps(message).encode()
        except TypeError:
            value = json.dumps(message, default=lambda raw: base64.b64encode(raw).decode()).encode()
    else:
        try:
            value = msgspec.msgpack.encode(message)
        except OverflowError:
            pytest.skip("MessagePack has no such number")
    with pytest.raises(BadReply):
        read_checked(value, content_type.encode())


@pytest.mark.parametrize(
    ("value", "content_type"),
    [
        (None, MSGPACK),
        (b"", MSGPACK),
        (b"", JSON),
        (b"\xc1", MSGPACK),
        (b"\xff\xfe", JSON),
        (b"\x91" * 100_000, MSGPACK),
        (b"[" * 100_000, JSON),
        (b"\xdd\xff\xff\xff\xff", MSGPACK),
        (b"\xc6\xff\xff\xff\xff", MSGPACK),
        (b"\x81\x91\x01\x02", MSGPACK),
        (b'{"object":"list"', JSON),
        (json.dumps(reply(item(embedding=[0.125] * 64))).encode(), "text/plain"),
        (json.dumps(reply(item(embedding=[0.125] * 64))).encode(), MSGPACK),
        (msgspec.msgpack.encode(reply()), JSON),
        (msgspec.msgpack.encode(reply()).replace(b"metadata", b"metadata") + b"\xc0", MSGPACK),
    ],
)
def test_bytes_that_are_no_message_are_a_bad_reply(value: bytes | None, content_type: str) -> None:
    with pytest.raises(BadReply):
        read_checked(value, content_type.encode())


def test_without_a_content_type_a_reply_is_json_as_a_job_is() -> None:
    found = read_checked(json.dumps(reply(item(embedding=[0.125] * 64))).encode(), None)
    assert isinstance(found, ReadResult)


# -- what a small record may cost ---------------------------------------------------------------------------------------

SMALL_BYTES = 8 << 20
"""Memory that a record of a kilobyte may take in all: some of its claims are a few rows of an array."""
CLAIM = struct.pack(">I", 0x13000000)
"""318 million: as a list of that length 2.5 GB."""
CLAIMS = {
    "list": b"\xdd" + CLAIM,
    "map": b"\xdf" + CLAIM,
    "bytes": b"\xc6" + CLAIM,
    "text": b"\xdb" + CLAIM,
    "extension": b"\xc9" + CLAIM + b"\x05",
    "lists in lists": (b"\xdd" + CLAIM) * 50,
}
FIELDS = ("id", "model", "data", "usage", "timings", "metadata", "unknown", "embedding", "span", "error")


def claiming(field: str, claim: bytes) -> bytes:
    """A reply of which one field claims a size whose bytes are not there."""
    of_item = field in ("embedding", "span", "error")
    mark: dict[str, Any] = {field: "MARK"}
    message = reply(item(**mark)) if of_item else reply() | mark
    value = msgspec.msgpack.encode(message)
    assert value.count(b"\xa4MARK") == 1
    return value.replace(b"\xa4MARK", claim)


def cost(value: bytes, content_type: str = MSGPACK) -> int:
    """The most memory that reading a record took at once, in bytes."""
    tracemalloc.start()
    try:
        take(value, content_type)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_size_that_is_claimed_takes_no_memory_before_its_bytes_are_there(field: str, claim: str) -> None:
    value = claiming(field, CLAIMS[claim])
    assert len(value) < 1000
    assert cost(value) < SMALL_BYTES


@pytest.mark.parametrize(
    "message",
    [
        reply(parts=1 << 20),
        reply(dimensions=650_000_000, data=[{"index": 0, "error": {"code": "x"}}]),
        reply(dimensions=1 << 16, data=[{"index": n, "error": {"code": "x"}} for n in range(5)]),
        reply(data=[{"index": 650_000_000, "error": {"code": "x"}}]),
        reply(item(span=[0, 650_000_000])),
        reply(usage={"prompt_tokens": 1 << 39, "total_tokens": 1 << 39}),
    ],
)
def test_numbers_in_a_small_record_make_no_large_arrays(message: dict[str, Any]) -> None:
    value = msgspec.msgpack.encode(message)
    assert len(value) < 1000
    assert cost(value) < SMALL_BYTES


def test_inputs_without_a_vector_do_not_make_gigabytes_of_rows() -> None:
    value = msgspec.msgpack.encode(
        reply(dimensions=1 << 16, data=[{"index": n, "error": {"code": "x"}} for n in range(4000)])
    )
    assert len(value) < 100_000
    assert cost(value) < SMALL_BYTES


@pytest.mark.parametrize("field", ["id", "model", "model_version"])
def test_names_that_are_remembered_have_a_longest_length(field: str) -> None:
    error = {"object": "error", "error": {"code": "x"}, "id": "j", "model": "m", "model_version": V1}
    for message in (reply(), error):
        value = msgspec.msgpack.encode(message | {field: "x" * 5000})
        with pytest.raises(BadReply, match="a name of more than"):
            read_checked(value, MSGPACK.encode())


# -- parts that make no result -----------------------------------------------------------------------------------------


def spanned(index: int, start: int, end: int) -> ReadDatum:
    return datum(index, span=(start, end))


WHOLE: dict[str, tuple[list[ReadResult], Asked]] = {
    "a missing input": ([result(datum(0), datum(2))], Asked()),
    "an input twice": ([result(datum(0), datum(0), datum(1))], Asked()),
    "another order": ([result(datum(0), datum(2), datum(1), datum(3))], Asked()),
    "not from the first": ([result(datum(1))], Asked()),
    "too few": ([result(datum(0))], Asked(count=2)),
    "too many": ([result(datum(0), datum(1))], Asked(count=1)),
    "an input in both parts": ([result(datum(0)), result(datum(0))], Asked()),
    "another dtype": ([result(datum(dtype="int8"), dtype="int8")], Asked(dtype="float32")),
    "another size": ([result(datum())], Asked(dimensions=128)),
    "spans that were not asked for": ([result(spanned(0, 0, 5))], Asked(late=False)),
    "no spans though asked for": ([result(datum(0))], Asked(late=True)),
    "spans of some": ([result(spanned(0, 0, 5), datum(1))], Asked()),
    "spans that overlap": ([result(spanned(0, 0, 5), spanned(0, 4, 9))], Asked(late=True)),
    "spans of a missing input": ([result(spanned(0, 0, 5), spanned(2, 0, 5))], Asked(late=True)),
    "spans in another order": ([result(spanned(1, 0, 5), spanned(0, 0, 5))], Asked(late=True)),
    "a failed input with spans": ([result(spanned(0, 0, 5), failed(0))], Asked(late=True)),
    "more than its bytes could hold": (
        [msgspec.structs.replace(result(*map(failed, range(10_000))), dimensions=1 << 16)],
        Asked(),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_parts_that_make_no_result_are_a_bad_reply(name: str) -> None:
    with pytest.raises(BadReply):
        check_whole(*WHOLE[name])


def test_parts_that_disagree_are_a_bad_reply() -> None:
    one = result(datum(0), part=0, parts=2)
    other = result(datum(1), part=1, parts=2)
    for part in (
        msgspec.structs.replace(other, dimensions=128),
        result(datum(1, dtype="int8"), dtype="int8", part=1, parts=2),
    ):
        with pytest.raises(BadReply, match="disagree"):
            check_whole([one, part], Asked())


def test_what_the_contract_allows_passes() -> None:
    check_whole([result(datum(0), failed(1), datum(2))], Asked(count=3, dtype="float32", late=False))
    check_whole([result(datum(0)), result(datum(1))], Asked(count=2))
    spans = [spanned(0, 0, 5), spanned(0, 5, 9), failed(1), spanned(2, 0, 0)]
    check_whole([result(*spans[:1]), result(*spans[1:])], Asked(count=3, late=True))
    check_whole([result(failed(0), failed(1))], Asked(count=2, late=True))


# -- anything at all ---------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(width=32)
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["list", "error", "float32", "int8", "binary", UNIT.tobytes(), bytes(8), [0.1] * 8])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
small = st.integers(-1, 3)
items = st.fixed_dictionaries(
    {
        "index": small | anything,
        "embedding": st.sampled_from([bytes(32), UNIT.tobytes(), [0.5] * 8]) | anything,
    },
    optional={
        "tokens": anything,
        "scale": anything,
        "span": st.lists(small, min_size=2, max_size=2) | anything,
        "error": st.just({"code": "x"}) | anything,
    },
)
messages = st.fixed_dictionaries(
    {
        "object": st.just("list"),
        "id": st.just("j"),
        "model": st.just("m"),
        "model_version": st.just(V1),
        "dimensions": st.sampled_from([8, 64]) | anything,
        "dtype": st.sampled_from(DTYPES) | anything,
        "data": st.lists(items, max_size=4) | anything,
    },
    optional={
        "part": small | anything,
        "parts": small | anything,
        "usage": anything,
        "metadata": anything,
        "timings": anything,
    },
)


def take(value: bytes, content_type: str) -> None:
    """All that a client does with a reply."""
    try:
        found = read_checked(value, content_type.encode())
        if not isinstance(found, ReadResult):
            return
        check_whole([found], Asked())
    except BadReply:
        return
    count = 1 + found.data[-1].index
    whole = assemble([FinishedJob(count=count, outcome=[found])])
    assert len(whole) == len(found.data)
    assert np.isfinite(whole.vectors.astype(np.float64)).all()
    whole.chunks()
    whole.masked()


@given(messages | anything)
def test_any_message_is_read_or_refused(message: Any) -> None:
    take(msgspec.msgpack.encode(message), MSGPACK)


@given(messages | anything)
def test_any_json_is_read_or_refused(message: Any) -> None:
    take(json.dumps(message, default=lambda raw: base64.b64encode(raw).decode()).encode(), JSON)


@given(st.binary(max_size=200), st.sampled_from([JSON, MSGPACK]))
@example(b"\xc7\x0c\xff" + bytes(12), MSGPACK)
def test_any_bytes_are_read_or_refused(value: bytes, content_type: str) -> None:
    take(value, content_type)


GOOD = msgspec.msgpack.encode(reply(item(0), item(1), parts=1))


@given(st.data())
def test_a_good_reply_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    take(bytes(changed), MSGPACK)
