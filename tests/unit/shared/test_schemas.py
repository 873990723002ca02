"""The generated files say what the codec does, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from embedq_shared import codec
from embedq_shared.codec import BadJob
from embedq_shared.messages import (
    Control,
    Datum,
    ErrorBody,
    Failure,
    Result,
    Split,
    Status,
    Timings,
    Usage,
)
from tools import schemas

SCHEMAS = {
    path.name.removesuffix(".schema.json"): json.loads(path.read_text(encoding="utf-8"))
    for path in schemas.SPEC.glob("*.schema.json")
}
VALIDATORS = {stem: Draft202012Validator(schema) for stem, schema in SCHEMAS.items()}
VERSION = "sha256:" + "0123456789abcdef" * 4


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_generated_files_are_fresh() -> None:
    assert schemas.stale() == [], "run `make contract`"


def test_a_changed_a_missing_and_a_left_over_file_are_stale(tmp_path: Path) -> None:
    for name, text in schemas.render().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert schemas.stale(tmp_path) == []
    (tmp_path / "job.schema.json").write_text("{}", encoding="utf-8")
    (tmp_path / "status.schema.json").unlink()
    (tmp_path / "old.schema.json").write_text("{}", encoding="utf-8")
    assert schemas.stale(tmp_path) == ["job.schema.json", "old.schema.json", "status.schema.json"]


@pytest.mark.parametrize("stem", sorted(schemas.ROOTS))
def test_a_schema_is_valid_json_schema_2020_12(stem: str) -> None:
    assert SCHEMAS[stem]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(SCHEMAS[stem])


# -- jobs: the schema and the codec agree -----------------------------------------------------------------------------


def accepts(job: Any) -> bool:
    try:
        codec.decode_job(msgspec.json.encode(job), "json")
    except BadJob:
        return False
    return True


def words(*choices: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([*choices, *choices, choices[0].upper(), "", None])


# Numbers that JSON Schema calls integers and the contract does not (64.0) are left out: see below.
fractions = st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | fractions | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
likely = {
    "input": st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=3),
    "id": st.text(max_size=3) | st.sampled_from(["x" * 256, "x" * 257, "\U0001f600" * 256]),
    "model": st.text(max_size=5),
    "dimensions": st.integers(24, 80) | st.integers(),
    "dtype": words("float32", "float16", "int8", "binary"),
    "encoding_format": words("float", "base64"),
    "input_type": words("query", "document"),
    "instruction": st.none() | st.text(max_size=5),
    "truncate": words("error", "start", "end"),
    "metadata": st.none() | st.dictionaries(st.text(max_size=5), anything, max_size=3),
    "user": anything,
}
# Mostly right, so that jobs are often wrong in one place alone.
valid_mostly = st.fixed_dictionaries(
    {"input": likely["input"]}, optional={name: values for name, values in likely.items() if name != "input"}
)


@st.composite
def disturbed(draw: st.DrawFn) -> dict[str, Any]:
    job = dict(draw(valid_mostly))
    match draw(st.sampled_from(["swap", "drop", "add"])):
        case "swap":
            job[draw(st.sampled_from(sorted(likely)))] = draw(anything)
        case "drop":
            job.pop("input")
        case "add":
            job[draw(st.text(max_size=8))] = draw(anything)
    return job


@given(valid_mostly | disturbed() | anything)
def test_the_schema_and_the_codec_accept_the_same_jobs(job: Any) -> None:
    assert VALIDATORS["job"].is_valid(job) == accepts(job)


@pytest.mark.parametrize(
    "job",
    [
        {"input": ""},
        {"input": [" "]},
        {"input": "a", "id": None, "dimensions": None, "metadata": None, "user": None},
        {"input": "a", "dtype": "binary", "dimensions": 40},
        {"input": "a", "dtype": "binary"},
        {"input": "a", "dtype": "binary", "dimensions": None},
        {"input": "a", "dtype": "int8", "dimensions": 33},
        {"input": "a", "input_type": "query", "instruction": "b"},
        {"input": "a", "input_type": "document", "instruction": None},
    ],
)
def test_a_right_job_fits_the_schema_and_the_codec(job: dict[str, Any]) -> None:
    VALIDATORS["job"].validate(job)
    assert accepts(job)


@pytest.mark.parametrize(
    "job",
    [
        {},
        [],
        None,
        {"input": None},
        {"input": []},
        {"input": [1, 2]},
        {"input": ["a", None]},
        {"input": "a", "id": ""},
        {"input": "a", "id": "x" * 257},
        {"input": "a", "dimensions": 31},
        {"input": "a", "dimensions": True},
        {"input": "a", "dtype": "binary", "dimensions": 36},
        {"input": "a", "dtype": "float64"},
        {"input": "a", "input_type": "document", "instruction": ""},
        {"input": "a", "metadata": []},
        {"input": "a", "dimension": 64},
    ],
)
def test_a_wrong_job_fits_neither(job: Any) -> None:
    assert not VALIDATORS["job"].is_valid(job)
    assert not accepts(job)


def test_a_whole_number_with_a_fraction_part_is_the_one_thing_that_the_schema_cannot_refuse() -> None:
    assert VALIDATORS["job"].is_valid({"input": "a", "dimensions": 64.0})
    assert not accepts({"input": "a", "dimensions": 64.0})


# -- what the service writes fits its schema --------------------------------------------------------------------------


def result(**fields: Any) -> Result:
    return Result(
        **{
            "id": "7",
            "model": "default",
            "model_version": VERSION,
            "dimensions": 32,
            "dtype": "float32",
            "data": [datum()],
            "usage": Usage(3, 3),
            "timings": Timings(queue=0.1),
            **fields,
        }
    )


def datum(**fields: Any) -> Datum:
    return Datum(
        **{"index": 0, "embedding": [0.5] * 32, "tokens": 3, "truncated": False, "cached": True, **fields}
    )


def invalid(stem: str, message: Any) -> list[str]:
    return [error.message for error in VALIDATORS[stem].iter_errors(json.loads(codec.encode(message)))]


FAILED = ErrorBody.of("text_too_long", "`input[1]`: expected less", "input[1]")


@pytest.mark.parametrize(
    "message",
    [
        result(),
        result(data=[datum(), Datum(index=1, embedding=None, error=FAILED)]),
        result(dtype="int8", data=[datum(scale=0.01), Datum(index=1, embedding=None, error=FAILED)]),
        result(metadata=msgspec.Raw(b'{"a":1}'), part=1, parts=2),
        result(data=[datum(embedding="AAAA")]),
    ],
)
def test_a_result_fits_its_schema(message: Result) -> None:
    assert invalid("result", message) == []


@pytest.mark.parametrize(
    "message",
    [
        result(model_version="v1"),
        result(data=[]),
        result(dtype="int8"),
        result(data=[datum(scale=0.01)]),
        result(data=[datum(embedding=None)]),
        result(data=[datum(error=FAILED)]),
        result(data=[datum(tokens=None)]),
        result(metadata=msgspec.Raw(b"[]")),
        result(parts=0),
    ],
)
def test_a_result_that_breaks_a_rule_does_not_fit(message: Result) -> None:
    assert invalid("result", message) != []


def test_a_failure_fits_its_schema_whatever_is_known() -> None:
    known = Failure(id="7", model="default", model_version=VERSION, error=FAILED)
    unknown = Failure(id=None, model=None, model_version=None, error=FAILED)
    assert invalid("failure", known) == invalid("failure", unknown) == []


def test_readers_need_not_know_every_error_code_or_field() -> None:
    newer = {
        "object": "error",
        "id": None,
        "model": None,
        "model_version": None,
        "metadata": None,
        "error": {"code": "quota", "message": "m", "param": None, "retryable": True, "after_s": 3},
    }
    VALIDATORS["failure"].validate(newer)
    answer = codec.decode_result(msgspec.json.encode(newer))
    assert isinstance(answer, Failure)
    assert (answer.error.code, answer.error.retryable) == ("quota", True)


def test_control_and_status_fit_their_schemas() -> None:
    control = Control(alias="default", version=1, path="a", command_id="c", digest=VERSION, min_cosine=0.9)
    status = Status(
        replica="r",
        alias="default",
        version=None,
        step="starting",
        state="LOADING",
        model_version=None,
        error=None,
        at=1,
    )
    split = Split(alias="ab", version=1, command_id="c", split={"a": 90, "b": 10})
    assert invalid("control", control) == invalid("status", status) == invalid("split", split) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 0},
        {"alias": ""},
        {"policy": "quick"},
        {"min_cosine": 1.5},
        {"digest": "sha1:0"},
        {"path": None},
    ],
)
def test_a_control_record_that_breaks_a_rule_does_not_fit(fields: dict[str, Any]) -> None:
    right = {"alias": "default", "version": 1, "path": "a", "command_id": "c"}
    VALIDATORS["control"].validate(right)
    assert not VALIDATORS["control"].is_valid(right | fields)
