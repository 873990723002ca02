from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from hypothesis.strategies import floats

from embedq_sdk import Embedded, MixedModelVersions, TextTooLong
from embedq_sdk.cli.vector_files import FileExists, JsonLines, NpyFile, Part

TOO_LONG = TextTooLong(code="text_too_long", message="m", param=None, retryable=False)


def an_item(index: int = 0, dtype: Any = np.float32, version: str = "v1") -> Embedded:
    vector = np.full(40, index, dtype=dtype)
    return Embedded(index=index, text=f"t{index}", vector=vector, model_version=version, tokens=3)


def a_writer(path: Path, *, force: bool = False) -> JsonLines | NpyFile:
    if path.suffix == ".npy":
        return NpyFile(path, force=force)
    return JsonLines(path, io.BytesIO(), with_text=False, force=force)


def a_gap(index: int) -> Embedded:
    return Embedded(index=index, text=f"t{index}", error=TOO_LONG)


@pytest.mark.parametrize("count", [1, 9, 12_345])
def test_an_npy_file_of_unknown_length_reads_back(tmp_path: Path, count: int) -> None:
    path = tmp_path / "out.npy"
    with NpyFile(path) as file:
        for n in range(count):
            file.write(an_item(n))

    found = np.load(path, mmap_mode="r")

    assert found.shape == (count, 40)
    assert found.dtype == np.float32
    assert found[:, 0].tolist() == list(range(count))


def test_failed_texts_are_rows_of_nan_even_in_front(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    with NpyFile(path) as file:
        for item in (a_gap(0), a_gap(1), an_item(2), a_gap(3), an_item(4)):
            file.write(item)

    found = np.load(path)

    assert np.isnan(found[:, 0]).tolist() == [True, True, False, True, False]
    assert found[4, 39] == 4


def test_packed_bits_stay_uint8(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    with NpyFile(path) as file:
        file.write(an_item(7, np.uint8))
        file.write(a_gap(8))

    assert np.load(path).tolist() == [[7] * 40, [0] * 40]


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_an_interrupted_run_leaves_its_part_and_not_the_file(tmp_path: Path, name: str) -> None:
    writer = a_writer(tmp_path / name)

    def interrupted() -> None:
        with writer as file:
            file.write(an_item(0))
            file.write(an_item(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    part = tmp_path / f"{name}.part"
    assert list(tmp_path.iterdir()) == [part]
    assert writer.left == Part(part, 2)
    if name == "out.npy":
        assert np.load(part).shape == (2, 40)
    else:
        assert len(part.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path, name: str) -> None:
    writer = a_writer(tmp_path / name)

    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt

    assert list(tmp_path.iterdir()) == []
    assert writer.left is None


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
@pytest.mark.parametrize("there", ["", ".part"])
def test_a_file_that_is_there_is_overwritten_only_by_force(tmp_path: Path, name: str, there: str) -> None:
    found = tmp_path / f"{name}{there}"
    found.write_bytes(b"dear")

    with pytest.raises(FileExists, match="--force"):
        a_writer(tmp_path / name).__enter__()
    assert found.read_bytes() == b"dear"

    with a_writer(tmp_path / name, force=True) as file:
        file.write(an_item(3))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert b"dear" not in (tmp_path / name).read_bytes()


def test_a_file_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def late() -> None:
        with a_writer(path) as file:
            file.write(an_item(0))
            path.write_bytes(b"dear")

    with pytest.raises(FileExists):
        late()
    assert path.read_bytes() == b"dear"
    assert (tmp_path / "out.jsonl.part").exists()


def test_no_texts_give_an_empty_file(tmp_path: Path) -> None:
    for name in ("out.npy", "out.jsonl"):
        with a_writer(tmp_path / name):
            pass

    assert np.load(tmp_path / "out.npy").shape == (0, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_failed_texts_alone_have_a_row_each(tmp_path: Path) -> None:
    with a_writer(tmp_path / "out.npy") as file:
        file.write(a_gap(0))
        file.write(a_gap(1))

    assert np.load(tmp_path / "out.npy").shape == (2, 0)


def test_two_models_never_stand_in_one_file(tmp_path: Path) -> None:
    def mixed() -> None:
        with NpyFile(tmp_path / "out.npy") as file:
            file.write(an_item(0))
            file.write(an_item(1, version="v2"))

    with pytest.raises(MixedModelVersions):
        mixed()


def test_json_lines_have_a_line_for_every_text() -> None:
    stream = io.BytesIO()
    with JsonLines(None, stream, with_text=True) as file:
        file.write(an_item(1))
        file.write(a_gap(2))

    good, bad = (msgspec.json.decode(line) for line in stream.getvalue().splitlines())

    assert good == {"index": 1, "text": "t1", "embedding": [1.0] * 40, "model_version": "v1", "tokens": 3}
    assert bad["error"] == {"code": "text_too_long", "message": "text_too_long: m"}


@given(arrays(np.float32, 40, elements=floats(width=32, allow_nan=False, allow_infinity=False)))
def test_decimals_are_the_shortest_that_read_back(vector: np.ndarray[Any, Any]) -> None:
    stream = io.BytesIO()
    with JsonLines(None, stream, with_text=False) as file:
        file.write(Embedded(index=0, text="t", vector=vector, model_version="v1", tokens=1))

    line = msgspec.json.decode(stream.getvalue())
    assert np.array_equal(np.float32(line["embedding"]), vector)
    shown = msgspec.json.decode(stream.getvalue(), type=dict[str, msgspec.Raw])["embedding"]
    longest = max(
        len(number.lstrip(b"-").replace(b".", b"").partition(b"e")[0].strip(b"0"))
        for number in bytes(shown)[1:-1].split(b",")
    )
    assert longest <= 9  # digits that a float32 needs at most
