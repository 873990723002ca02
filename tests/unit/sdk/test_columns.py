"""Texts as they come out of a table: a column is taken, a table is refused, a gap is named."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_sdk.errors import InvalidArgument
from embedq_sdk.job_options import JobLimits, JobOptions, checked_id

TEXTS = ["a", "", "日本語 🎉"]
LIMITS = JobLimits()


def pandas(values: Any, **more: Any) -> Any:
    return pytest.importorskip("pandas").Series(values, **more)


def polars(values: Any) -> Any:
    return pytest.importorskip("polars").Series(values)


class ArrowLike:
    """What pyarrow's arrays have of a column; a list of one holds its scalars, which are no strings."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Any:
        return iter([object()] * len(self._values))

    def to_pylist(self) -> list[Any]:
        return self._values


COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "pandas": pandas,
    "pandas, of objects": lambda values: pandas(values, dtype=object),
    "pandas' index": lambda values: pytest.importorskip("pandas").Index(values),
    "polars": polars,
    "numpy": np.array,
    "numpy, of objects": lambda values: np.array(values, dtype=object),
    "numpy's strings of any length": lambda values: np.array(values, dtype=np.dtypes.StringDType()),
    "numpy's strings in a list": lambda values: list(np.array(values)),
    "arrow": ArrowLike,
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_strings_is_a_list_of_texts(kind: str) -> None:
    column = COLUMNS[kind](TEXTS)
    (inputs,) = LIMITS.split(column)
    submitted, size = LIMITS.one_job(column)

    assert inputs.texts == submitted == TEXTS
    assert inputs.size == size == sum(len(text.encode()) for text in TEXTS)
    assert {type(text) for text in inputs.texts} == {str}  # what encoders take
    assert msgspec.msgpack.decode(JobOptions().encode(inputs.texts, None))["input"] == TEXTS


@pytest.mark.parametrize("kind", ["pandas", "pandas, of objects", "polars", "numpy, of objects"])
def test_a_missing_value_is_named_with_its_row(kind: str) -> None:
    with pytest.raises(InvalidArgument, match=r"texts\[1\]`: expected a string; drop or fill missing values"):
        LIMITS.split(COLUMNS[kind](["a", None, "b"]))


def test_a_table_is_refused_with_the_way_to_take_a_column() -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("polars")
    import pandas
    import polars

    class ArrowTable:
        column_names = ("text",)

    tables: list[Any] = [pandas.DataFrame({"text": TEXTS}), polars.DataFrame({"text": TEXTS}), ArrowTable()]
    for table in tables:
        with pytest.raises(InvalidArgument, match=r"one column, such as table\['text'\]"):
            LIMITS.split(table)


def test_an_array_of_another_shape_is_refused() -> None:
    for array in (np.array([TEXTS]), np.array("text")):
        with pytest.raises(InvalidArgument, match="an array of one dimension"):
            LIMITS.split(array)


def test_numbers_and_what_cannot_be_gone_through_twice_are_refused_with_the_way_to_convert() -> None:
    with pytest.raises(InvalidArgument, match=r"texts\[0\]`: expected a string, got 1"):
        LIMITS.split(np.array([1, 2]))
    with pytest.raises(InvalidArgument, match=r"list\(…\) of it; embed_many and stream take any iterable"):
        LIMITS.split(iter(TEXTS))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="a string or a sequence of strings, got dict"):
        LIMITS.split({"a": 1})  # type: ignore[arg-type]


class Lane(enum.StrEnum):
    BULK = "bulk"


class Dtype(enum.StrEnum):
    FLOAT = "float16"


def test_strings_of_other_types_are_sent_as_what_they_say() -> None:
    options = JobOptions(
        lane=Lane.BULK,  # type: ignore[arg-type]
        dtype=Dtype.FLOAT,  # type: ignore[arg-type]
        model=np.str_("m"),
        instruction=np.str_("find"),
    )
    id = checked_id(np.str_("row-1"))
    sent = msgspec.msgpack.decode(options.encode(LIMITS.one_job(np.str_("text"))[0], id))

    assert (options.lane, type(options.lane)) == ("bulk", str)
    assert {name: sent[name] for name in ("input", "id", "dtype", "model", "instruction")} == {
        "input": "text",
        "id": "row-1",
        "dtype": "float16",
        "model": "m",
        "instruction": "find",
    }
