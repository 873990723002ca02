from __future__ import annotations

import pickle
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_sdk import Chunk, Embedded, JobResult
from embedq_sdk.embeddings import (
    Embeddings,
    PartJoiner,
    ReadDatum,
    ReadError,
    ReadFailure,
    ReadResult,
    assemble,
    job_failed,
    outdated,
    read_reply,
    require_one_version,
)
from embedq_sdk.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    JobFailed,
    KafkaUnavailable,
    MixedModelVersions,
    PartialFailure,
    TextTooLong,
)
from embedq_shared.codec import encode
from embedq_shared.messages import Datum, ErrorBody, Failure, Result, Timings, Usage
from tests.helpers.replies import UNIT, V1, V2, datum, failed, job, result


def test_parts_are_joined_in_any_order_and_repeats_change_nothing() -> None:
    joiner = PartJoiner()
    first, second, third = (result(datum(n), part=n, parts=3) for n in range(3))

    assert joiner.add(third) is None
    assert joiner.add(third) is None
    assert joiner.add(first) is None
    assert joiner.add(second) == [first, second, third]


def test_parts_of_more_models_than_there_can_be_are_not_kept() -> None:
    joiner = PartJoiner()
    for n in range(1000):
        assert joiner.add(result(datum(0), part=0, parts=2, version=f"forged {n}")) is None
    assert len(joiner._parts) <= 8
    assert joiner.add(result(datum(0), part=0, parts=2)) is None
    assert joiner.add(result(datum(1), part=1, parts=2)) is not None


def test_parts_of_two_models_are_never_joined() -> None:
    joiner = PartJoiner()

    assert joiner.add(result(datum(0), part=0, parts=2, version=V1)) is None
    assert joiner.add(result(datum(1), part=1, parts=2, version=V2)) is None
    joined = joiner.add(result(datum(0), part=0, parts=2, version=V2))

    assert joined is not None
    assert {part.model_version for part in joined} == {V2}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_every_dtype_comes_back_as_float32(dtype: Any) -> None:
    vector = np.linspace(-0.2, 0.2, 64, dtype=np.float32)

    found = assemble(
        [job(2, [result(datum(0, vector, dtype), datum(1, vector, dtype), dtype=dtype)])]
    ).vectors

    assert found.dtype == np.float32
    assert found.shape == (2, 64)
    assert np.abs(found - vector).max() < 2e-3


def test_binary_comes_back_packed() -> None:
    vector = np.array([1, -1] * 32, dtype=np.float32)

    found = assemble([job(1, [result(datum(0, vector, "binary"), dtype="binary")])]).vectors

    assert found.dtype == np.uint8
    assert np.array_equal(np.unpackbits(found, axis=1)[0], vector > 0)


def test_jobs_are_put_together_in_order() -> None:
    jobs = [job(2, [result(datum(0, UNIT), datum(1, -UNIT))]), job(1, [result(datum(0, UNIT * 2))])]

    found = assemble(jobs)

    assert np.array_equal(found.vectors, np.stack([UNIT, -UNIT, UNIT * 2]))
    assert found.tokens.tolist() == [1, 2, 1]
    assert found.total_tokens == 4
    assert found.model_version == V1


def test_some_failed_inputs_are_masked_and_named() -> None:
    found = assemble([job(3, [result(datum(0), failed(1), datum(2))])])

    with pytest.raises(
        PartialFailure, match=r"^1 of 3 inputs failed; the first, input 1: text_too_long"
    ) as raised:
        found.checked()

    assert list(raised.value.errors) == [1]
    assert isinstance(raised.value.errors[1], TextTooLong)
    assert np.ma.getmaskarray(raised.value.vectors)[:, 0].tolist() == [False, True, False]
    assert np.array_equal(raised.value.vectors[2], UNIT)


def test_when_every_input_failed_the_first_error_is_raised() -> None:
    with pytest.raises(TextTooLong):
        assemble([job(2, [result(failed(0), failed(1))])]).checked()


def test_a_job_that_failed_whole_is_the_error_of_each_of_its_inputs() -> None:
    whole = InternalError(code="internal", message="m", param=None, retryable=True)

    found = assemble([job(2, [result(datum(0), datum(1))]), job(3, whole)])

    assert list(found.errors) == [2, 3, 4]
    assert found.model_versions == [V1, V1, None, None, None]


def test_two_model_versions_have_no_common_one() -> None:
    found = assemble([job(1, [result(datum(0))]), job(1, [result(datum(0), version=V2)])])

    with pytest.raises(MixedModelVersions) as raised:
        _ = found.model_version

    assert raised.value.versions == [V1, V2]


def test_replies_are_read_with_fields_and_codes_of_a_newer_service() -> None:
    value = b'{"object":"error","id":"a","error":{"code":"on_strike","message":"no","retryable":false,"x":1},"y":2}'

    reply = read_reply(value, msgpack=False)

    assert isinstance(reply, ReadFailure)
    error = job_failed(reply.error)
    assert type(error) is JobFailed
    assert error.code == "on_strike"


@pytest.mark.parametrize("msgpack", [True, False])
def test_what_the_contract_writes_is_read(msgpack: bool) -> None:
    format: Any = "msgpack" if msgpack else "json"
    written = Result(
        id="a",
        model="default",
        model_version=V1,
        dimensions=64,
        dtype="float32",
        data=[Datum(index=0, embedding=None, error=ErrorBody.of("non_finite", "m", "input[0]"))],
        usage=Usage(0, 0),
        timings=Timings(queue=1.0),
    )
    refused = Failure(id=None, model=None, model_version=None, error=ErrorBody.of("malformed", "m"))

    found = read_reply(encode(written, format), msgpack=msgpack) if not msgpack else None
    failure = read_reply(encode(refused, "json"), msgpack=False)

    assert isinstance(failure, ReadFailure)
    if found is not None:
        assert isinstance(found, ReadResult)
        assert found.data[0].error is not None
        assert found.timings.queue == 1.0


def test_messages_come_from_docstrings_and_facts_are_attributes() -> None:
    error = KafkaUnavailable(servers="a:1", reason="refused")

    assert str(error) == "Kafka at a:1 does not answer: refused"
    assert error.servers == "a:1"
    assert isinstance(InvalidArgument(argument="a", expected="b", got="c"), ValueError)
    assert isinstance(DeadlineExceeded(timeout=1.0, progress="p"), TimeoutError)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(DeadlineExceeded(timeout=2.0, progress="p")))

    assert isinstance(error, DeadlineExceeded)
    assert error.timeout == 2.0


# -- late chunks ------------------------------------------------------------------------------------------------------


def spanned(index: int, start: int, end: int, value: float = 0.125) -> ReadDatum:
    vector = np.full(64, value, dtype=np.float32)
    return ReadDatum(index=index, embedding=vector.tobytes(), tokens=end - start, span=(start, end))


def test_spans_are_rows_that_say_their_input_and_their_place() -> None:
    whole = result(spanned(0, 0, 5), spanned(0, 5, 9, 0.25), spanned(1, 0, 3), usage=Usage(20, 20))
    found = assemble([job(2, [whole])])
    assert found.inputs.tolist() == [0, 0, 1]
    assert found.spans is not None
    assert found.spans.tolist() == [[0, 5], [5, 9], [0, 3]]
    assert (len(found), found.count, found.total_tokens) == (3, 2, 20)
    first, second = found.chunks()
    assert [(chunk.start, chunk.end, chunk.tokens) for chunk in first] == [(0, 5, 5), (5, 9, 4)]
    assert first[1].vector[0] == np.float32(0.25)
    assert [chunk.of("abc") for chunk in second] == ["abc"]


def test_spans_of_parts_and_of_several_jobs_follow_each_other() -> None:
    one = [
        result(spanned(0, 0, 5, 0.1), part=0, parts=2),
        result(spanned(0, 5, 9, 0.2), spanned(1, 0, 3, 0.3), part=1, parts=2),
    ]
    other = [result(spanned(0, 0, 8, 0.4))]
    found = assemble([job(2, one), job(1, job_failed(ReadError(code="internal"))), job(1, other)])
    assert found.inputs.tolist() == [0, 0, 1, 2, 3]
    assert list(found.errors) == [3]
    assert np.allclose(found.vectors[:, 0], [0.1, 0.2, 0.3, 0.0, 0.4])
    assert [len(chunks) for chunks in found.chunks()] == [2, 1, 0, 1]


def test_an_input_that_failed_among_spans_is_named_by_its_place_in_the_call() -> None:
    found = assemble([job(3, [result(spanned(0, 0, 5), spanned(0, 5, 9), failed(1), spanned(2, 0, 1))])])
    assert list(found.errors) == [2]
    with pytest.raises(PartialFailure) as caught:
        found.checked()
    assert (caught.value.index, caught.value.failed, caught.value.total) == (1, 1, 3)
    assert np.ma.getmaskarray(caught.value.vectors).any(axis=1).tolist() == [False, False, True, False]


def test_vectors_without_spans_have_none() -> None:
    found = assemble([job(2, [result(datum(0), datum(1))])])
    assert found.spans is None
    assert found.inputs.tolist() == [0, 1]
    assert found.chunks() == [[], []]


# -- model versions ---------------------------------------------------------------------------------------------------


def test_the_last_jobs_model_is_the_newest_and_jobs_of_others_are_outdated() -> None:
    old, new = job(1, [result(datum(0))]), job(1, [result(datum(0), version=V2)])
    gone = job(1, job_failed(ReadError(code="internal")))

    assert outdated([old, new, old, new, gone]) == [0, 2]
    assert outdated([new, old, gone]) == [0]
    assert outdated([old, gone, old]) == []
    assert outdated([gone]) == []


def test_several_model_versions_are_an_error_that_has_one_for_each_input() -> None:
    old, new = job(2, [result(datum(0), datum(1))]), job(1, [result(datum(0), version=V2)])
    gone = job(1, job_failed(ReadError(code="internal")))

    require_one_version([old, gone, old])
    with pytest.raises(MixedModelVersions) as raised:
        require_one_version([old, gone, new])
    assert raised.value.versions == [V1, V1, None, V2]


def test_a_reload_that_changes_the_number_of_dimensions_cannot_be_one_array() -> None:
    wide = msgspec.structs.replace(result(datum(0), version=V2), dimensions=128)

    with pytest.raises(MixedModelVersions):
        assemble([job(1, [result(datum(0))]), job(1, [wide])])


def test_jobs_without_any_result_raise_the_first_error() -> None:
    first, second = (job(1, job_failed(ReadError(code=code))) for code in ("text_too_long", "internal"))

    with pytest.raises(TextTooLong):
        assemble([first, second])


def test_usage_counts_the_tokens_of_a_job_and_without_it_its_data_do() -> None:
    data = [datum(0), datum(1)]  # of 1 and 2 tokens
    with_usage = job(2, [result(*data, usage=Usage(7, 9))])

    assert assemble([job(2, [result(*data)]), with_usage]).total_tokens == 3 + 9


# -- as numpy and notebooks see it ------------------------------------------------------------------------------------


def many(rows: int, dimensions: int = 64) -> Embeddings:
    data = [
        ReadDatum(index=n, embedding=np.full(64, n, dtype="<f4").tobytes(), tokens=1) for n in range(rows)
    ]
    return assemble([job(rows, [result(*data)])])


def test_numpy_takes_embeddings_as_their_vectors() -> None:
    found = many(3)

    assert np.asarray(found) is found.vectors
    assert np.array(found) is not found.vectors
    assert np.asarray(found, dtype="float64").dtype == np.float64
    assert np.asarray(found, dtype=np.float32) is found.vectors
    with pytest.raises(ValueError, match="without a copy"):
        np.array(found, dtype="float64", copy=False)
    assert np.allclose(np.ones(64) @ np.transpose(found), [0, 64, 128])
    assert (len(found), found.shape) == (3, (3, 64))
    assert [row[0] for row in found] == [0, 1, 2]
    assert found[2][5] == 2
    assert found[1:].shape == (2, 64)
    assert found[[0, 2], 0].tolist() == [0, 2]


def test_numpy_takes_lists_of_chunks_items_and_results() -> None:
    found = many(2)
    chunks = [Chunk(start=0, end=1, tokens=1, vector=row) for row in found]
    items = [Embedded(index=n, text="t", vector=row) for n, row in enumerate(found)]
    whole = JobResult(id="j", embeddings=found, error=None)

    for several in (chunks, items, whole):
        assert np.asarray(several).dtype == np.float32
        assert np.array_equal(np.asarray(several), found.vectors)


def test_what_failed_is_no_array_but_its_error() -> None:
    error = job_failed(ReadError(code="text_too_long"))
    with pytest.raises(TextTooLong):
        np.asarray(Embedded(index=0, text="t", error=error))
    with pytest.raises(TextTooLong):
        np.asarray(JobResult(id="j", embeddings=None, error=error))


def test_a_result_shows_itself_in_a_few_lines_whatever_it_holds() -> None:
    small, large = many(2), many(2000)
    text = "word " * 10_000

    shown = repr(large)
    assert shown.startswith("Embeddings(vectors=array([[0.000e+00, 0.000e+00, ..., 0.000e+00, 0.000e+00],\n")
    assert "shape=(2000, 64), dtype=float32), model='default', model_version='" in shown
    assert shown.endswith("total_tokens=2000)")
    metadata = {str(n): text for n in range(99)}
    for each, most in (
        (small, 500),
        (large, 500),
        (JobResult(id="j", embeddings=large, error=None, metadata=metadata), 700),
        (Embedded(index=1, text=text, vector=large.vectors[0]), 250),
        (Chunk(start=0, end=1, tokens=1, vector=large.vectors[0]), 150),
    ):
        assert len(repr(each)) < most
    assert repr(Embedded(index=1, text="t", span=(0, 1))) == "Embedded(index=1, text='t', span=(0, 1))"


def test_failures_and_several_models_show_in_a_result() -> None:
    found = assemble(
        [job(3, [result(datum(0), failed(1), datum(2))]), job(1, [result(datum(0), version=V2)])]
    )
    assert "model_versions=[" in repr(found)
    assert "errors={1: " in repr(found)


def test_rich_shows_a_result_as_shortly() -> None:
    from rich.pretty import pretty_repr

    assert len(pretty_repr(many(2000))) < 600
