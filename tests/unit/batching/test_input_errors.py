"""Why a text is not run: each error names the input, the limit and what was found."""

from __future__ import annotations

from embedq_consumer.batching import input_errors
from embedq_consumer.engine import Failed, TextTooLong
from tests.helpers.in_flight import admitted, chunked


def test_a_text_over_the_limit_names_the_limit_and_its_length() -> None:
    error = input_errors.too_long(admitted(input=["a", "b"]).request, 1, TextTooLong(tokens=700, limit=512))
    assert (error.code, error.param, error.retryable) == ("text_too_long", "input[1]", False)
    assert "512" in error.message
    assert "700" in error.message


def test_a_text_that_the_model_cannot_run_may_be_tried_again() -> None:
    error = input_errors.failed(admitted(input="a"), 0)
    assert (error.code, error.param, error.retryable) == ("internal", "input", True)


def test_a_deadline_that_passes_while_a_text_waits_is_not_worth_a_retry() -> None:
    assert (input_errors.EXPIRED_IN_QUEUE.code, input_errors.EXPIRED_IN_QUEUE.retryable) == ("expired", False)


def test_what_is_too_much_for_one_text_is_said_before_it_runs() -> None:
    late = admitted(input=["a", "b"], chunk={"mode": "late"}).request
    mean = admitted(input=["a", "b"], chunk={"mode": "mean"}).request
    many = chunked(*[8] * 2049)
    error = input_errors.error_of(many, late, 512)
    assert error is not None
    assert (error(late, 1).code, error(late, 1).param) == ("too_many_inputs", "chunk")
    assert input_errors.error_of(many, mean, 512) is None
    assert input_errors.error_of(chunked(510), late, 512) is None
    error = input_errors.error_of(chunked(10, 511), late, 512)
    assert error is not None
    assert (error(late, 1).code, error(late, 1).param) == ("text_too_long", "input[1]")
    error = input_errors.error_of(TextTooLong(tokens=300, limit=256), mean, 512)
    assert error is not None
    assert "prompt" in error(mean, 0).message
    assert "256" in error(mean, 0).message


def test_a_text_that_the_tokenizer_cannot_read_is_named_and_not_quoted() -> None:
    request = admitted(input=["a", "b"]).request
    error = input_errors.error_of(Failed("unexpected 'a very private text'"), request, 512)
    assert error is not None
    found = error(request, 1)
    assert (found.code, found.param, found.retryable) == ("invalid_value", "input[1]", False)
    assert found.message == "`input[1]`: expected a text that the model's tokenizer can read"


def test_a_text_with_a_token_that_the_model_does_not_know_is_not_worth_a_retry() -> None:
    request = admitted(input=["a", "b"]).request
    error = input_errors.error_of(Failed("beyond", (32001, 32000)), request, 512)
    assert error is not None
    found = error(request, 0)
    assert (found.code, found.param, found.retryable) == ("invalid_value", "input[0]", False)
    assert "those below 32000; one has the id 32001" in found.message
