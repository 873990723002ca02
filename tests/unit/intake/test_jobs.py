"""A job in flight: when it is complete, and when it has failed as a whole."""

from __future__ import annotations

import msgspec
import pytest

from embedq_consumer.intake.jobs import InputVector, JobState, Span, Spans, too_many_spans
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import cost_of, datum_bytes
from embedq_shared.messages import ErrorBody
from tests.helpers.in_flight import NOW_MS, admitted, record

VECTOR = InputVector(b"\0" * 4, 3, None, None, cached=False)
EXPIRED = ErrorBody.of("expired", "too late", "deadline")
TOO_LONG = ErrorBody.of("text_too_long", "too long", "input[0]")


def spans(count: int) -> Spans:
    return Spans(tuple(Span(n, n + 1, 1, b"\0", None) for n in range(count)), count)


def settled(job: JobState, *outcomes: InputVector | Spans | ErrorBody) -> JobState:
    for index, outcome in enumerate(outcomes):
        job.settle(index, outcome)
    return job


def test_a_job_is_complete_with_the_last_of_its_inputs() -> None:
    job = admitted(input=["a", "b", "c"])
    assert [job.settle(index, VECTOR) for index in (2, 0, 1)] == [False, False, True]
    assert job.remaining == 0


def test_no_input_is_settled_twice() -> None:
    job = admitted(input=["a", "b"])
    job.settle(0, VECTOR)
    with pytest.raises(RuntimeError, match="input 0 settled twice"):
        job.settle(0, VECTOR)


def test_equal_inputs_are_one_piece_of_work_and_have_one_outcome() -> None:
    job = admitted(input=["a", "b", "a", "b", "a"])
    assert list(job.distinct) == [0, 1]
    assert len(set(map(id, job.request.texts))) == 2  # and one object in memory
    assert [job.settle(0, VECTOR), job.settle(1, EXPIRED)] == [False, True]
    assert job.outcomes == [VECTOR, EXPIRED, VECTOR, EXPIRED, VECTOR]


def test_an_error_of_equal_inputs_names_each_of_them() -> None:
    job = admitted(input=["a", "a"])
    job.settle(0, ErrorBody.of("text_too_long", "`input[0]`: expected less, as in `input[0]`", "input[0]"))
    second = job.outcomes[1]
    assert isinstance(second, ErrorBody)
    assert (second.param, second.message) == ("input[1]", "`input[1]`: expected less, as in `input[0]`")


def test_spans_of_equal_inputs_count_for_each_of_them() -> None:
    job = admitted(input=["a", "a"], chunk={"mode": "late", "tokens": 8})
    job.request = msgspec.structs.replace(job.request, max_spans=5)
    assert settled(job, spans(3)).failure() == too_many_spans(job.request)


def test_a_job_costs_its_distinct_texts_and_what_its_results_take() -> None:
    equal, different = admitted(input=["a"] * 4), admitted(input=[*"abcd"])
    assert (cost_of(equal).texts, cost_of(different).texts) == (1, 4)
    # The record repeats the vectors, so they are held for the time that it takes to send it.
    assert cost_of(equal).result_bytes == cost_of(different).result_bytes == 4 * datum_bytes(equal.request)
    mean = {"mode": "mean"}
    windows = (
        admitted(input=["a"] * 4, chunk=mean, dimensions=32),
        admitted(input=[*"abcd"], chunk=mean, dimensions=32),
    )
    assert cost_of(windows[0]).result_bytes < cost_of(windows[1]).result_bytes


def test_a_job_has_expired_once_its_deadline_is_now() -> None:
    job = admitted(("deadline", b"%d" % (NOW_MS + 5)), input="a")
    assert [job.expired(NOW_MS + late) for late in (4, 5, 6)] == [False, True, True]
    assert not admitted(input="a").expired(1e18)


def test_a_single_input_fails_as_its_job() -> None:
    assert settled(admitted(input="a"), TOO_LONG).failure() == TOO_LONG
    assert settled(admitted(input="a"), VECTOR).failure() is None


def test_the_inputs_of_a_list_fail_one_by_one() -> None:
    assert settled(admitted(input=["a", "b"]), TOO_LONG, VECTOR).failure() is None
    assert settled(admitted(input=["a", "b"]), TOO_LONG, EXPIRED).failure() is None


def test_a_list_that_expired_as_a_whole_has_expired() -> None:
    assert settled(admitted(input=["a", "b"]), EXPIRED, EXPIRED).failure() == EXPIRED


def test_a_job_with_more_spans_than_it_may_have_fails_as_a_whole_whichever_input_came_first() -> None:
    late = {"mode": "late", "tokens": 8}
    job = admitted(input=["a", "b"], chunk=late)
    job.request = msgspec.structs.replace(job.request, max_spans=5)
    assert settled(job, spans(4), spans(4)).failure() == too_many_spans(job.request)
    fits = admitted(input=["a", "b"], chunk=late)
    fits.request = msgspec.structs.replace(fits.request, max_spans=8)
    assert settled(fits, spans(4), spans(4)).failure() is None


def test_only_late_chunks_give_an_input_several_vectors() -> None:
    assert admitted(input="a", chunk={"mode": "late"}).request.late
    assert not admitted(input="a", chunk={"mode": "mean"}).request.late
    assert not admitted(input="a").request.late


def test_what_the_model_sees_of_an_input_is_its_text_prompt_truncation_and_chunking() -> None:
    request = admitted(input=["a", "b"], input_type="query", truncate="start").request
    text = request.text(1)
    assert (text.text, text.prompt, text.truncate, text.chunk) == ("b", "Q: ", "start", None)


def test_a_record_counts_its_value_key_and_headers() -> None:
    found = record(b"12345", ("name", b"123"), ("null", None), key=b"12")
    assert found.size == 5 + 2 + 4 + 3 + 4 + 3 * 256  # its own objects, and those of each header
    assert found.name == "t.jobs-3-7"


def test_of_an_unreadable_record_nothing_is_known_but_its_place() -> None:
    ticket = record().ticket
    found = Record.unread(ticket, "bulk", polled_at=1.5)
    assert (found.name, found.lane, found.polled_at, found.size) == ("t.jobs-3-7", "bulk", 1.5, 256)
    assert (found.key, found.value, found.headers, found.timestamp_ms) == (None, None, (), -1)
