"""Who is let in, with which rights, and what becomes of them when the file changes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from embedq_gateway.errors import ApiError
from embedq_gateway.http.exchange import Exchange, HeldBytes
from embedq_gateway.keys.door import Door, key_in
from embedq_gateway.keys.key_file import KeyEntry, hash_of
from embedq_shared.topics import Lane


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


def entry(key: str, name: str = "search", **rights: object) -> KeyEntry:
    return msgspec.convert({"name": name, "hash": hash_of(key), **rights}, KeyEntry)


def test_a_key_opens_the_door_by_either_header() -> None:
    door = Door([entry("good")])
    assert door.caller(bearer("good")).name == "search"
    assert door.caller({b"x-api-key": b"good"}).name == "search"
    assert door.caller({b"authorization": b"bearer  good "}).name == "search"


def test_whoever_was_let_in_stays_so_until_the_answer() -> None:
    door = Door([entry("good")])

    async def nothing(*_: object) -> Any: ...

    scope = {"type": "http", "headers": list(bearer("good").items())}
    exchange = Exchange(scope, nothing, nothing, door, HeldBytes(0))
    assert exchange.require("embed").name == "search"
    door.replace([])
    assert exchange.require("embed").name == "search"
    with pytest.raises(ApiError):
        exchange.require("admin")
    with pytest.raises(ApiError):
        Exchange(scope, nothing, nothing, door, HeldBytes(0)).require("embed")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"Bearer wrong"},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Basic good"},
        {b"authorization": b"good"},
        {b"authorization": b"Bearer good\xff"},
        {b"x-api-key": b"Good"},
        {b"authorization": b"Bearer " + hash_of("good").encode()},
    ],
)
def test_anything_else_does_not(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(ApiError) as refused:
        Door([entry("good")]).caller(headers)
    assert refused.value.status == 401
    assert refused.value.code == "invalid_api_key"
    assert (b"www-authenticate", b"Bearer") in refused.value.answer_headers()
    assert "good" not in str(refused.value)


def test_an_empty_file_lets_nobody_in() -> None:
    with pytest.raises(ApiError):
        Door([]).caller(bearer("any"))


def test_without_keys_everybody_may_do_everything() -> None:
    door = Door(None)
    caller = door.caller({})
    assert not door.has_keys
    assert caller.client_id is None
    caller.require("embed")
    caller.require("admin")
    caller.require("metrics")
    caller.require_alias("any")
    with caller.admit(characters=10**9, texts=1):
        pass


@pytest.mark.parametrize(
    "headers",
    [
        {b"host": b"localhost:8080", b"origin": b"https://evil.example"},
        {b"host": b"evil.example:8080"},
        {b"host": b"evil.example:8080", b"origin": b"http://evil.example:8080"},
        {b"host": b"localhost:8080", b"origin": b"null"},
    ],
)
def test_without_keys_a_page_of_another_site_is_refused(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(ApiError) as refused:
        Door(None).caller(headers)
    assert refused.value.status == 403
    Door([entry("good")]).caller(headers | bearer("good"))


def test_without_keys_pages_of_this_gateway_may_ask() -> None:
    Door(None).caller({b"host": b"localhost:8080", b"origin": b"http://localhost:8080"})
    Door(None).caller({b"host": b"[::1]:8080", b"origin": b"http://[::1]:8080"})
    Door(None, loopback=False).caller({b"host": b"gpu7.local:8080"})


def test_scopes_models_and_lanes_are_kept_apart() -> None:
    caller = Door([entry("a", scopes=["embed"], aliases=["small"], lane="bulk")]).caller(bearer("a"))
    assert caller.client_id == "key:search"
    caller.require("embed")
    caller.require_alias("small")
    assert caller.lane_for(None) == caller.lane_for("bulk") == "bulk"
    for refused in (
        lambda: caller.require("admin"),
        lambda: caller.require("metrics"),
        lambda: caller.require_alias("default"),
        lambda: caller.lane_for("interactive"),
    ):
        with pytest.raises(ApiError) as error:
            refused()
        assert error.value.status == 403
        assert error.value.code == "permission_denied"


@pytest.mark.parametrize("asked", [None, "interactive", "bulk"])
def test_a_key_without_a_lane_goes_where_it_asks(asked: Lane | None) -> None:
    assert Door([entry("a")]).caller(bearer("a")).lane_for(asked) == (asked or "interactive")


def test_who_may_administer_may_read_the_metrics_and_who_may_read_them_may_nothing_else() -> None:
    door = Door([entry("a", scopes=["admin"]), entry("m", name="prometheus", scopes=["metrics"])])
    door.caller(bearer("a")).require("metrics")
    door.caller(bearer("m")).require("metrics")
    with pytest.raises(ApiError):
        door.caller(bearer("m")).require("embed")


def test_over_its_tokens_a_key_is_told_when_to_come_again() -> None:
    clock = Clock()
    caller = Door([entry("a", tokens_per_minute=60)], clock=clock).caller(bearer("a"))
    with caller.admit(characters=4, texts=1) as admitted:
        admitted.settle(90)
    assert dict(admitted.headers())[b"x-ratelimit-remaining-tokens"] == b"0"
    with pytest.raises(ApiError) as refused:
        caller.admit(characters=40, texts=1)
    headers = dict(refused.value.answer_headers())
    assert refused.value.status == 429
    assert headers[b"retry-after"] == b"40"
    assert headers[b"x-ratelimit-limit-tokens"] == b"60"
    clock.now = 40
    with caller.admit(characters=40, texts=1):
        pass


def test_a_request_that_fails_costs_nothing_and_one_that_is_given_up_what_was_guessed() -> None:
    clock = Clock()
    caller = Door([entry("a", tokens_per_minute=100, in_flight=1)], clock=clock).caller(bearer("a"))
    with pytest.raises(ValueError, match="x"), caller.admit(characters=400, texts=1):
        raise ValueError("x")
    with pytest.raises(asyncio.CancelledError), caller.admit(characters=400, texts=1):
        raise asyncio.CancelledError
    with pytest.raises(ApiError) as refused:
        caller.admit(characters=40, texts=1)
    assert dict(refused.value.answer_headers())[b"retry-after"] == b"6"


def test_what_a_key_has_used_survives_a_change_of_the_file() -> None:
    clock = Clock()
    door = Door([entry("a", tokens_per_minute=100)], clock=clock)
    with door.caller(bearer("a")).admit(characters=1, texts=1) as admitted:
        admitted.settle(100)
    door.replace([entry("a", tokens_per_minute=100), entry("b", name="other")])
    with pytest.raises(ApiError):
        door.caller(bearer("a")).admit(characters=40, texts=1)
    assert door.names == ["other", "search"]


def test_a_key_that_was_taken_out_is_refused_and_its_request_goes_on() -> None:
    door = Door([entry("a", in_flight=1)])
    with door.caller(bearer("a")).admit(characters=1, texts=1) as admitted:
        door.replace([])
        with pytest.raises(ApiError):
            door.caller(bearer("a"))
        admitted.settle(5)


def test_workers_share_what_a_key_may_use() -> None:
    door = Door([entry("a", tokens_per_minute=100, in_flight=4)], workers=2)
    limits = door.caller(bearer("a")).allowance.limits
    assert (limits.tokens_per_minute, limits.in_flight) == (50, 2)


def test_a_key_is_neither_kept_nor_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    door = Door([entry("very-secret")])
    caller = door.caller(bearer("very-secret"))
    assert "very-secret" not in f"{caller!r}{vars(door)!r}{caplog.text}"


def test_a_key_is_found_in_the_header_that_has_one() -> None:
    assert key_in({b"authorization": b"Bearer a", b"x-api-key": b"b"}) == "a"
    assert key_in({b"authorization": b"Basic a", b"x-api-key": b"b"}) == "b"
    assert key_in({b"authorization": b"Bearer ", b"x-api-key": b" "}) is None


def test_a_hash_that_only_begins_like_a_keys_does_not_open_the_door() -> None:
    digest = hash_of("good")
    other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    with pytest.raises(ApiError):
        Door([KeyEntry(name="search", hash=other)]).caller(bearer("good"))
