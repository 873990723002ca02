"""Jobs follow from the seed and their number alone; the judge tells a right vector from a wrong one, however it is written."""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_shared.codec import BadJob, decode_job
from embedq_shared.topics import Topics
from embedq_shared.vectors import cut_and_normalize
from tests.faults.load import Job, JobMaker, Judge, texts

TOPICS = Topics("t")
TEXTS = texts(1, 50)
HIDDEN = 128
VERSION = "sha256:" + "1" * 64
EXPECTED = np.random.default_rng(1).normal(size=(len(TEXTS), HIDDEN)).astype(np.float32)


def maker(seed: int = 1, fragile: str | None = "t.fragile") -> JobMaker:
    return JobMaker(seed, TOPICS, TEXTS, hidden=HIDDEN, own_topic="t.client", fragile_topic=fragile)


def jobs(count: int = 2000) -> list[Job]:
    return [maker().job(f"job-{number}") for number in range(count)]


def vector(job: Job, index: int) -> np.ndarray[Any, Any]:
    return cut_and_normalize(EXPECTED[job.texts[index]], job.dimensions)


def result(job: Job, **changes: Any) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": vector(job, index).tolist()}
        for index in range(len(job.texts))
    ]
    return {
        "object": "list",
        "id": job.id,
        "model_version": VERSION,
        "dtype": "float32",
        "data": data,
        "part": 0,
        "parts": 1,
    } | changes


def judged(job: Job, found: dict[str, Any]) -> float | None:
    return Judge({VERSION: EXPECTED}).answer(job, json.dumps(found).encode(), ()).cosine


def several() -> Job:
    return next(job for job in jobs() if len(job.texts) == 3 and len(set(job.texts)) == 3)


def test_a_job_is_the_same_each_time_and_another_one_for_another_seed() -> None:
    assert jobs(50) == jobs(50)
    assert maker(2).job("job-1") != maker(1).job("job-1")


def test_good_jobs_are_jobs_and_bad_ones_are_not() -> None:
    for job in jobs():
        format = "msgpack" if job.format == "msgpack" else "json"
        if job.expects == "ok":
            decode_job(job.value, format)  # type: ignore[arg-type]
        elif job.expects in ("malformed", "unknown_field"):
            with pytest.raises(BadJob) as bad:
                decode_job(job.value, "json")
            assert bad.value.error.code == job.expects


def test_every_kind_of_job_comes_and_bad_ones_are_few() -> None:
    codes = Counter(job.expects for job in jobs())
    assert set(codes) == {
        *("ok", "malformed", "unknown_field", "invalid_value", "expired"),
        *("unsupported_content_type", "invalid_header"),
    }
    assert 0.9 < codes["ok"] / codes.total() < 0.99
    assert {job.reply[0] for job in jobs()} == {"t.results", "t.replies", "t.client", "t.fragile"}
    assert {job.reply[1] for job in jobs() if job.reply[0] == "t.replies"} == {0, 1, 2, 3}
    assert {job.topic for job in jobs()} == {"t.jobs", "t.jobs.bulk"}


def test_a_job_to_the_fragile_topic_says_so_and_comes_only_where_there_is_one() -> None:
    assert all(job.fragile == (job.reply[0] == "t.fragile") for job in jobs())
    assert not any(maker(fragile=None).job(f"job-{number}").fragile for number in range(2000))


def test_right_vectors_are_right_in_every_way_of_writing() -> None:
    job = several()
    assert judged(job, result(job)) == pytest.approx(1.0)
    found = result(job)
    for index, datum in enumerate(found["data"]):
        datum["embedding"] = base64.b64encode(vector(job, index).astype("<f4").tobytes()).decode()
    assert judged(job, found) == pytest.approx(1.0)
    for index, datum in enumerate(found["data"]):
        datum["embedding"] = vector(job, index).astype("<f4").tobytes()
    answer = Judge({VERSION: EXPECTED}).answer(
        job, msgspec.msgpack.encode(found), [("content-type", b"application/msgpack")]
    )
    assert answer.cosine == pytest.approx(1.0)


def test_a_part_is_judged_by_what_it_holds() -> None:
    job = several()
    found = result(job, part=1, parts=2)
    del found["data"][0]
    assert judged(job, found) == pytest.approx(1.0)


def test_another_texts_vector_is_wrong() -> None:
    job = several()
    found = result(job)
    found["data"][0]["embedding"], found["data"][1]["embedding"] = (
        found["data"][1]["embedding"],
        found["data"][0]["embedding"],
    )
    cosine = judged(job, found)
    assert cosine is not None
    assert cosine < 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "job-x"},
        {"model_version": "sha256:" + "2" * 64},
        {"data": []},
    ],
)
def test_an_answer_of_another_job_or_model_or_without_vectors_is_wrong(changes: dict[str, Any]) -> None:
    job = several()
    assert judged(job, result(job, **changes)) == -1.0


@pytest.mark.parametrize("fault", ["missing", "order", "length", "null", "nan", "zero"])
def test_a_missing_moved_short_null_or_broken_vector_is_wrong(fault: str) -> None:
    job = several()
    found = result(job)
    match fault:
        case "missing":
            del found["data"][1]
        case "order":
            found["data"].reverse()
        case "length":
            found["data"][1]["embedding"].append(0.0)
        case "null":
            found["data"][1]["embedding"] = None
        case "nan":
            found["data"][1]["embedding"] = base64.b64encode(
                np.full(job.dimensions, np.nan, dtype="<f4").tobytes()
            ).decode()
        case "zero":
            found["data"][1]["embedding"] = [0.0] * job.dimensions
    cosine = judged(job, found)
    assert cosine is not None
    assert cosine < 0.5


def test_an_error_is_told_by_its_code() -> None:
    job = several()
    value = json.dumps({"object": "error", "id": job.id, "model_version": None, "error": {"code": "expired"}})
    assert Judge({}).answer(job, value.encode(), ()).code == "expired"


def test_bytes_that_are_no_result_are_wrong() -> None:
    assert Judge({}).answer(several(), b"\xff", ()).cosine == -1.0
