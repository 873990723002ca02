"""Token buckets and allowances: what is let in, for how long the rest waits, and what a change of the limits keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.keys.limits import Allowance, Limits, TokenBucket, TooMany, guessed_tokens

RATES = st.floats(min_value=1, max_value=1e9)
TIMES = st.lists(st.floats(min_value=0, max_value=100), min_size=1, max_size=50)
SIZES = st.integers(min_value=1, max_value=10**6)


def test_a_full_bucket_gives_a_minutes_tokens_at_once_and_then_makes_wait() -> None:
    bucket = TokenBucket(600, now=0)
    assert bucket.take(600, now=0) == 0
    assert bucket.take(10, now=0) == pytest.approx(1)
    assert bucket.take(10, now=0.5) == pytest.approx(0.5)
    assert bucket.take(10, now=1) == 0


def test_a_request_larger_than_the_bucket_is_let_in_when_it_is_full_and_those_after_it_pay() -> None:
    bucket = TokenBucket(60, now=0)
    assert bucket.take(600, now=0) == 0
    assert bucket.left(now=0) == -540
    assert bucket.take(1, now=0) == pytest.approx(541)
    assert bucket.take(600, now=599) == pytest.approx(1), "only when it is full again"
    assert bucket.take(600, now=600) == 0


def test_what_was_guessed_is_replaced_by_what_it_was() -> None:
    bucket = TokenBucket(100, now=0)
    bucket.take(10, now=0)
    bucket.settle(10, 50, now=0)
    assert bucket.left(now=0) == 50
    bucket.take(10, now=0)
    bucket.settle(10, 0, now=0)
    assert bucket.left(now=0) == 50


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(60, now=100)
    bucket.take(60, now=100)
    assert bucket.left(now=40) == 0
    assert bucket.left(now=101) == pytest.approx(1)


@given(rate=RATES, gaps=TIMES, sizes=st.lists(SIZES, min_size=50, max_size=50))
def test_over_any_time_no_more_is_let_in_than_a_minutes_tokens_the_rate_and_one_request(
    rate: float, gaps: list[float], sizes: list[int]
) -> None:
    bucket = TokenBucket(rate, now=0)
    now, let_in, largest = 0.0, 0, 0
    for gap, size in zip(gaps, sizes, strict=False):
        now += gap
        if bucket.take(size, now) == 0:
            let_in += size
            largest = max(largest, size)
    assert let_in <= (rate + rate * now / 60 + largest) * (1 + 1e-9)


@given(rate=RATES, gaps=TIMES, sizes=st.lists(SIZES, min_size=50, max_size=50))
def test_who_waits_as_long_as_it_is_told_is_let_in(rate: float, gaps: list[float], sizes: list[int]) -> None:
    bucket = TokenBucket(rate, now=0)
    now = 0.0
    for gap, size in zip(gaps, sizes, strict=False):
        now += gap
        if (wait := bucket.take(size, now)) > 0:
            now += wait + max(1e-3, wait * 1e-9)
            assert bucket.take(size, now) == 0


@given(rate=RATES, other=RATES, size=SIZES, used=SIZES, gap=st.floats(min_value=0, max_value=1000))
def test_the_level_never_exceeds_a_minutes_tokens(
    rate: float, other: float, size: int, used: int, gap: float
) -> None:
    bucket = TokenBucket(rate, now=0)
    bucket.take(size, now=0)
    bucket.settle(size, used, now=gap)
    assert bucket.left(now=gap) <= rate
    bucket.resize(other, now=gap)
    assert bucket.left(now=2 * gap) <= other
    assert bucket.full_in(now=2 * gap) >= 0


def test_requests_in_flight_are_counted_until_they_end() -> None:
    allowance = Allowance(Limits(in_flight=2), now=0)
    assert allowance.begin(1, now=0) is None
    assert allowance.begin(1, now=0) is None
    assert allowance.begin(1, now=0) == TooMany("2 requests in flight", 1)
    allowance.end(1, 1, now=0)
    assert allowance.begin(1, now=0) is None
    assert allowance.under_way == 2


def test_a_request_that_is_refused_changes_nothing() -> None:
    allowance = Allowance(Limits(tokens_per_minute=60, in_flight=5), now=0)
    allowance.begin(60, now=0)
    assert allowance.begin(30, now=0) == TooMany("60 tokens a minute", 30)
    assert allowance.under_way == 1
    allowance.end(60, 60, now=0)
    assert allowance.begin(30, now=30) is None


def test_a_new_limit_keeps_what_was_used_and_is_under_way() -> None:
    allowance = Allowance(Limits(tokens_per_minute=100), now=0)
    allowance.begin(90, now=0)
    allowance.limit(Limits(tokens_per_minute=200, in_flight=1), now=0)
    assert allowance.begin(1, now=0) == TooMany("1 requests in flight", 1)
    allowance.end(90, 90, now=0)
    assert allowance.begin(111, now=0) == TooMany("200 tokens a minute", 1)
    assert allowance.begin(110, now=0) is None
    allowance.limit(Limits(), now=0)
    assert allowance.begin(10**9, now=0) is None


@pytest.mark.parametrize(
    ("workers", "part"),
    [(1, Limits(100, 10)), (3, Limits(100 / 3, 4)), (20, Limits(5, 1))],
)
def test_workers_share_a_keys_limits(workers: int, part: Limits) -> None:
    assert Limits(100, 10).shared_by(workers) == part
    assert Limits().shared_by(workers) == Limits()


def test_texts_cost_a_quarter_of_their_characters_until_they_are_tokenized_and_never_nothing() -> None:
    assert guessed_tokens(characters=400, texts=1) == 100
    assert guessed_tokens(characters=0, texts=3) == 3
    assert guessed_tokens(characters=0, texts=0) == 1
    assert guessed_tokens(characters=401, texts=1) == 101


def test_a_client_is_told_of_its_tokens_by_openais_names() -> None:
    allowance = Allowance(Limits(tokens_per_minute=60), now=0)
    allowance.begin(45, now=0)
    assert allowance.headers(now=0) == [
        (b"x-ratelimit-limit-tokens", b"60"),
        (b"x-ratelimit-remaining-tokens", b"15"),
        (b"x-ratelimit-reset-tokens", b"45.000s"),
    ]
    assert Allowance(Limits(), now=0).headers(now=0) == []
