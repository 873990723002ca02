"""What a record of a retry topic says of its job, to whom it is said, and who may say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.retries import Attempt, Past, headers_of, past_of
from embedq_consumer.retries.past import due_ms_of
from embedq_shared.headers import Header

OURS = [
    name
    for name, _ in headers_of([], Past(topic="t", partition=0, offset=0, timestamp_ms=0, timestamp_type=0), 0)
]

names = st.sampled_from(["correlation-id", "deadline", *OURS]) | st.text(max_size=8)
own_headers = st.lists(st.tuples(names, st.binary(max_size=20)), max_size=8)
attempts = st.builds(
    Attempt,
    at=st.integers(0, 2**53),
    replica=st.text(max_size=10),
    code=st.text(max_size=10),
    message=st.text(max_size=300),
)
pasts = st.builds(
    Past,
    topic=st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True),
    partition=st.integers(0, 10_000),
    offset=st.integers(0, 2**62),
    timestamp_ms=st.integers(-1, 2**62),
    timestamp_type=st.integers(0, 1),
    attempts=st.lists(attempts, max_size=4).map(tuple),
)


@given(own_headers, pasts, st.integers(0, 2**53))
def test_what_is_written_is_read_back_whatever_the_jobs_own_headers_are(
    own: list[Header], past: Past, due_ms: int
) -> None:
    written = headers_of(own, past, due_ms)
    assert past_of(written) == (past, tuple(own))
    assert due_ms_of(written) == due_ms


@given(pasts, attempts)
def test_a_run_is_added_behind_those_before_and_its_message_is_kept_short(
    past: Past, attempt: Attempt
) -> None:
    after = past.failed(attempt)
    assert after.attempts[:-1] == past.attempts
    assert (after.attempts[-1].at, after.attempts[-1].message) == (attempt.at, attempt.message[:200])
    assert dict(headers_of([], after, 0))["embedq-attempt"] == b"%d" % (len(past.attempts) + 2)


@given(st.lists(st.tuples(names, st.none() | st.binary(max_size=20)), max_size=20))
def test_a_record_that_somebody_else_wrote_is_a_job_like_any_other(
    headers: list[tuple[str, bytes | None]],
) -> None:
    past, own = past_of(headers)
    due_ms_of(headers)
    if past is None:
        assert own == tuple((name, value or b"") for name, value in headers)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedq-origin-topic", b"no topic"),
        ("embedq-origin-topic", b"\xff"),
        ("embedq-origin-partition", b"-1"),
        ("embedq-origin-offset", b"9" * 20),
        ("embedq-origin-offset", "\u0661".encode()),
        ("embedq-origin-timestamp", b""),
        ("embedq-origin-timestamp-type", b"Sundial"),
        ("embedq-retries", b"[" * 5000),
        ("embedq-retries", b'[{"at": "noon"}]'),
        ("embedq-retries", b"\xff"),
    ],
)
def test_a_header_that_makes_no_sense_makes_no_past(name: str, value: bytes) -> None:
    good = headers_of(
        [("own", b"1")], Past(topic="t", partition=1, offset=2, timestamp_ms=3, timestamp_type=0), 5
    )
    bad = [(one, value if one == name else its) for one, its in good]
    assert past_of(bad) == (None, tuple(bad))
