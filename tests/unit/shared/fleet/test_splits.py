"""Whose job is whose where an alias is shared out: stably, by weight, and with as few moves as can be."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.codec import encode_record
from embedq_shared.fleet import Splits, share_of
from embedq_shared.messages import Control, Split

NAMES = st.text(min_size=1, max_size=20)
WEIGHTS = st.dictionaries(NAMES, st.integers(1, 1_000_000), min_size=1, max_size=6)
IDS = [f"job-{number}" for number in range(20_000)]


def split(version: int, weights: dict[str, int], alias: str = "ab", command_id: str = "c") -> Split:
    return Split(alias=alias, version=version, command_id=command_id, split=weights)


def see(splits: Splits, record: Split | Control) -> None:
    splits.see(record.alias.encode(), encode_record(record))


# -- whose job is whose ---------------------------------------------------------------------------------------------------


@given(alias=NAMES, weights=WEIGHTS, id=NAMES)
def test_a_job_has_one_owner_whoever_asks_and_in_whatever_order_the_weights_are(
    alias: str, weights: dict[str, int], id: str
) -> None:
    found = share_of(alias, weights, id)
    assert found in weights
    assert share_of(alias, dict(reversed(weights.items())), id) == found


@given(alias=NAMES, weights=WEIGHTS, id=NAMES, data=st.data())
def test_where_a_weight_rises_jobs_move_to_that_alias_alone(
    alias: str, weights: dict[str, int], id: str, data: st.DataObject
) -> None:
    risen = data.draw(st.sampled_from(sorted(weights)))
    more = weights | {risen: weights[risen] + data.draw(st.integers(1, 1_000_000))}
    before, after = share_of(alias, weights, id), share_of(alias, more, id)
    assert after in (before, risen)


@given(alias=NAMES, weights=WEIGHTS, id=NAMES, data=st.data())
def test_where_an_alias_goes_its_jobs_alone_move(
    alias: str, weights: dict[str, int], id: str, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(weights)))
    left = {one: weight for one, weight in weights.items() if one != gone}
    if left and (before := share_of(alias, weights, id)) != gone:
        assert share_of(alias, left, id) == before


@given(weights=st.dictionaries(NAMES, st.integers(1, 100), min_size=2, max_size=4))
def test_each_alias_has_its_part_of_the_ids(weights: dict[str, int]) -> None:
    ids = IDS[:2000]
    found = Counter(share_of("ab", weights, id) for id in ids)
    total = sum(weights.values())
    for one, weight in weights.items():
        part = weight / total
        # Six standard deviations: once in a billion by chance, and the ids are always the same.
        assert abs(found[one] - len(ids) * part) <= 6 * math.sqrt(len(ids) * part * (1 - part)) + 1


def test_a_split_of_other_name_shares_out_otherwise() -> None:
    """Else who has one test's new model would have every test's."""
    weights = {"a": 1, "b": 1}
    both = Counter((share_of("one", weights, id), share_of("two", weights, id)) for id in IDS)
    assert all(abs(count - len(IDS) / 4) < 400 for count in both.values())
    assert len(both) == 4


def test_the_contract_says_how_so_that_any_program_can_tell() -> None:
    """The formula of WIRE.md, written out once more."""

    def distance(one: str, weight: int, id: str) -> float:
        digest = hashlib.sha256(f"ab\0{one}\0{id}".encode()).digest()
        return -math.log((int.from_bytes(digest[:7], "big") + 1) / 2**56) / weight

    weights = {"a": 90, "b": 10}
    for id in IDS[:500]:
        nearest = min(weights, key=lambda one: distance(one, weights[one], id))
        assert share_of("ab", weights, id) == nearest
    assert [share_of("ab", weights, f"user-{number}") for number in range(12)].count("b") <= 6


# -- what the topic says --------------------------------------------------------------------------------------------------


def test_the_highest_version_counts_and_of_equal_ones_the_first() -> None:
    splits = Splits()
    for record in (
        split(2, {"a": 1}, command_id="first"),
        split(2, {"b": 1}, command_id="second"),
        split(1, {"c": 1}),
    ):
        see(splits, record)
    newest = splits.newest("ab")
    assert newest is not None
    assert newest.command_id == "first"
    assert splits.target("ab", "job") == "a"


def test_a_split_without_weights_has_ended_and_its_version_still_counts() -> None:
    splits = Splits()
    see(splits, split(1, {"a": 1}))
    see(splits, split(2, {}))
    assert (splits.target("ab", "job"), splits.weights()) == (None, {})
    see(splits, split(1, {"a": 1}))
    assert splits.target("ab", "job") is None
    see(splits, split(3, {"b": 1}))
    assert splits.weights() == {"ab": {"b": 1}}


def test_what_is_no_split_changes_nothing_and_a_tombstone_removes_it() -> None:
    splits = Splits()
    see(splits, split(1, {"a": 1}))
    see(splits, Control(alias="ab", version=9, path="p", command_id="c"))
    see(splits, Control(alias="other", version=9, path="p", command_id="c"))
    for value in (b"", b"[]", b"\xff", b"{" * 5000, b'{"alias": "ab", "version": 2}'):
        splits.see(b"ab", value)
    for wrong in ({"a": 0}, {"a": 1_000_001}, {"": 1}, {f"{n}": 1 for n in range(17)}):
        splits.see(b"ab", encode_record(split(5, wrong)))
    splits.see(b"other", encode_record(split(5, {"b": 1})))
    splits.see(None, encode_record(split(5, {"b": 1})))
    assert splits.weights() == {"ab": {"a": 1}}
    splits.see(b"ab", None)
    assert (splits.weights(), splits.newest("ab")) == ({}, None)


def test_a_job_goes_to_one_of_those_that_may_have_it_and_to_its_own_if_none_may() -> None:
    splits = Splits()
    see(splits, split(1, {"a": 99_999, "b": 1}))
    for id in IDS[:50]:
        assert splits.target("ab", id, ["b", "c"]) == "b"
        assert splits.target("ab", id, ["c"]) == splits.target("ab", id)
    assert splits.target("other", "job") is None
