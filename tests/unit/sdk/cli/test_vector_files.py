from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_sdk import Embedded, MixedModelVersions, TextTooLong
from embedq_sdk.cli.vector_files import JsonLines, NpyFile

TOO_LONG = TextTooLong(code="text_too_long", message="m", param=None, retryable=False)


def an_item(index: int = 0, dtype: Any = np.float32, version: str = "v1") -> Embedded:
    vector = np.full(40, index, dtype=dtype)
    return Embedded(index=index, text=f"t{index}", vector=vector, model_version=version, tokens=3)


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


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with NpyFile(tmp_path / "out.npy") as file:
            file.write(an_item(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert list(tmp_path.iterdir()) == []


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
