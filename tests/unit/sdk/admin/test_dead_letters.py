"""What a dead letter says, which ones a filter means, and what may be deleted."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.records import Death
from embedq_consumer.retries import Attempt, Past
from embedq_sdk.admin.dead_letters import (
    NOTE,
    DeadLetter,
    LetterFilter,
    Position,
    deletable_before,
    letter_of,
    note_of,
    original_headers,
)
from embedq_shared.codec import Envelope
from embedq_shared.headers import Header, parse
from embedq_shared.messages import ErrorBody
from tests.helpers.in_flight import TOPICS, record

OWN = (("correlation-id", b"c"), ("reply-topic", b"elsewhere"), ("deadline", b"5"))


def buried(
    *headers: Header,
    code: str = "crashed",
    deaths: tuple[Death, ...] = (),
    past: Past | None = None,
    **job: Any,
) -> tuple[bytes | None, list[Header]]:
    """Value and headers of a letter, as the service writes it."""
    found = msgspec.structs.replace(record(None, *headers, offset=77, **job), past=past)
    error = ErrorBody.of(code, "expected something else")  # type: ignore[arg-type]
    rejection = Rejection(
        error=error,
        format="json",
        headers=parse(headers),
        envelope=Envelope(),
        dead_letter=True,
        deaths=deaths,
    )
    encoder = ResultEncoder(TOPICS, "group", 900_000, replica="r0")
    letter = encoder.dead_letter(encoder.of_rejection(found, rejection), 0)
    return letter.value, letter.headers


def letter(**changes: object) -> DeadLetter:
    value, headers = buried(*OWN, input="a", id="j")
    return msgspec.structs.replace(letter_of(1, 42, value, headers), **changes)


def test_a_letter_says_what_the_service_wrote_into_it() -> None:
    deaths = (Death(at_ms=5, replica="a"), Death(at_ms=9, replica="b"))
    value, headers = buried(*OWN, deaths=deaths, input="a", id="j")
    found = letter_of(1, 42, value, headers)
    assert found.position == Position(1, 42)
    assert str(found.position) == "1:42"
    assert (found.id, found.error_code) == ("j", "crashed")
    assert (found.original_topic, found.original_partition, found.original_offset) == (TOPICS.jobs, 3, 77)
    assert (found.reply_topic, found.attempts, found.replica) == ("elsewhere", 2, "r0")
    assert (found.first_seen, found.result_sent) == (5, True)
    assert [(death.at, death.replica) for death in found.history] == [(5, "a"), (9, "b")]
    assert found.settled is None


def test_a_letter_of_a_job_that_was_run_again_names_its_first_record_and_all_of_its_runs() -> None:
    run = Attempt(at=3, replica="a", code="undeliverable", message="they took no record")
    past = Past(
        topic=TOPICS.bulk, partition=2, offset=9, timestamp_ms=8, timestamp_type=0, attempts=(run, run)
    )
    value, headers = buried(*OWN, code="internal", past=past, input="a")
    found = letter_of(1, 42, value, headers)
    assert (found.original_topic, found.original_partition, found.original_offset) == (TOPICS.bulk, 2, 9)
    assert (found.attempts, found.first_seen, found.original_timestamp) == (3, 3, 8)
    assert [(one.at, one.replica, one.code, one.message) for one in found.retries] == [
        (3, "a", "undeliverable", "they took no record")
    ] * 2
    assert original_headers(headers) == list(OWN)


def test_a_job_cannot_lend_its_letter_a_history() -> None:
    forged = (
        ("embedq-retries", b'[{"at": 1, "replica": "x", "code": "internal", "message": ""}]'),
        ("embedq-history", b'[{"at": 1, "replica": "x"}]'),
        ("embedq-model-version", b"mine"),
    )
    value, headers = buried(*forged, code="internal", input="a")
    found = letter_of(1, 42, value, headers)
    assert (found.retries, found.history, found.model_version) == ([], [], None)


def test_the_records_own_headers_come_back_even_from_a_letter_that_was_one_before() -> None:
    once, headers = buried(*OWN, input="a")
    assert original_headers(headers) == list(OWN)
    assert original_headers(headers, deadline=False) == list(OWN[:2])
    _, twice = buried(*headers, input="a")
    assert original_headers(twice) == headers
    assert original_headers(OWN) == list(OWN)
    assert once is not None


def test_the_value_of_a_job_that_killed_processes_is_searched_and_not_decoded() -> None:
    value, headers = buried(input="a", id="j")
    assert value is not None
    damaged = value.replace(b'"input"', b'"input', 1)
    assert letter_of(0, 0, damaged, headers).id == "j"
    assert letter_of(0, 0, b"", headers).id is None


def test_the_id_of_a_job_with_another_fault_is_what_a_decoder_finds() -> None:
    value, headers = buried(code="invalid_value", input=[], id="j")
    assert letter_of(0, 0, value, headers).id == "j"
    assert letter_of(0, 0, b"no json", headers).id is None
    assert letter_of(0, 0, None, headers).id is None


@given(
    st.none() | st.binary(max_size=60),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "kafka_dlt-original-topic",
                    "kafka_dlt-original-offset",
                    "kafka_dlt-original-timestamp",
                    "embedq-error-code",
                    "embedq-attempts",
                    "embedq-history",
                    "embedq-retries",
                    "embedq-first-seen",
                    "embedq-result-sent",
                    "content-type",
                    "reply-topic",
                    NOTE,
                ]
            ),
            st.none() | st.binary(max_size=12) | st.sampled_from([b"replayed", b"crashed", b"[", b"1"]),
        ),
        max_size=12,
    ),
)
def test_whatever_lies_on_the_topic_is_read_without_an_error(
    value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    found = letter_of(0, 0, value, headers)
    assert msgspec.json.decode(msgspec.json.encode(found), type=DeadLetter).error_code == found.error_code
    note_of(value, headers)


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        (LetterFilter(), True),
        (LetterFilter(codes=["crashed", "malformed"]), True),
        (LetterFilter(codes=["malformed"]), False),
        (LetterFilter(topics=[TOPICS.jobs]), True),
        (LetterFilter(topics=[TOPICS.bulk]), False),
        (LetterFilter(ids=["j"]), True),
        (LetterFilter(ids=["k"]), False),
        (LetterFilter(reply_topics=["elsewhere"]), True),
        (LetterFilter(reply_topics=["t.replies"]), False),
        (LetterFilter(positions=[Position(1, 42)]), True),
        (LetterFilter(positions=[Position(1, 43)]), False),
        (LetterFilter(since_ms=1_700_000_000_000, until_ms=1_700_000_000_001), True),
        (LetterFilter(since_ms=1_700_000_000_001), False),
        (LetterFilter(until_ms=1_700_000_000_000), False),
        (LetterFilter(codes=["crashed"], ids=["k"]), False),
    ],
)
def test_a_filter_means_the_letters_that_match_all_of_it(where: LetterFilter, matches: bool) -> None:
    assert where.matches(letter()) is matches
    assert where.is_empty is (where == LetterFilter())


def test_a_letter_without_a_time_is_in_no_range_of_time() -> None:
    untimed = letter(original_timestamp=None)
    assert not LetterFilter(since_ms=0).matches(untimed)
    assert not LetterFilter(until_ms=2**60).matches(untimed)


def test_a_note_names_letters_and_what_became_of_them() -> None:
    assert note_of(b'{"offsets": [1, 5]}', [(NOTE, b"dropped")]) == ("dropped", [1, 5])
    assert note_of(b'{"offsets": [1, 5]}', [(NOTE, b"replayed")]) == ("replayed", [1, 5])


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (b'{"offsets": [1]}', []),
        (b'{"offsets": [1]}', [(NOTE, b"lost")]),
        (b'{"offsets": ["1"]}', [(NOTE, b"dropped")]),
        (None, [(NOTE, b"dropped")]),
    ],
)
def test_anything_else_is_no_note(value: bytes | None, headers: list[Header]) -> None:
    assert note_of(value, headers) is None


def test_what_lies_before_the_first_letter_that_is_not_settled_may_be_deleted() -> None:
    settled, unsettled = letter(settled="dropped", offset=3), letter(offset=7)
    assert deletable_before([settled, unsettled], 0, 20) == 7
    assert deletable_before([settled], 0, 20) == 20
    assert deletable_before([], 0, 20) == 20
    assert deletable_before([unsettled], 8, 20) == 20


def test_integers_are_read_with_their_sign() -> None:
    headers = [("kafka_dlt-original-timestamp", struct.pack(">q", -1))]
    assert letter_of(0, 0, None, headers).original_timestamp == -1


def test_a_note_of_any_bytes_is_a_note_or_none() -> None:
    headers = [(NOTE, b"replayed")]
    for value in (None, b"", b"{", b"\xff", b'{"offsets":[' + b"1" * 5000 + b"]}", b'{"x":' + b"[" * 100_000):
        assert note_of(value, headers) is None
