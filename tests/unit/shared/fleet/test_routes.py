"""In which pool an alias lives, by the records of the control topic."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.codec import encode_record
from embedq_shared.fleet import Routes, share_of
from embedq_shared.messages import Control, Split

POOLS = st.sampled_from([None, "big", "small"])
COMMANDS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 6), POOLS, st.text("xy", min_size=1, max_size=2)),
    max_size=12,
)


def command(alias: str, version: int, pool: str | None, id: str = "c") -> Control:
    return Control(alias=alias, version=version, path="p", command_id=id, pool=pool)


def split(alias: str, version: int, **weights: int) -> Split:
    return Split(alias=alias, version=version, command_id="s", split=weights)


def routes(*records: Control | Split) -> Routes:
    found = Routes()
    for record in records:
        found.see(record.alias.encode(), encode_record(record))
    return found


def newest(commands: Sequence[Control], alias: str) -> Control | None:
    """As every reader of the topic has it: the highest version, of equal ones the first."""
    return max((one for one in commands if one.alias == alias), key=lambda one: one.version, default=None)


@given(COMMANDS)
def test_an_alias_lives_where_its_newest_command_says(given: list[tuple[str, int, str | None, str]]) -> None:
    commands = [command(*fields) for fields in given]
    found = routes(*commands)
    homes = {alias: one.pool for alias in ("a", "b") if (one := newest(commands, alias)) is not None}
    assert {alias: found.pool(alias) for alias in homes} == homes
    assert found.pools() == set(homes.values()) - {None}
    assert found.pool("nobody") is None


def test_the_alias_of_jobs_that_name_no_model_stays_in_the_default_pool() -> None:
    found = routes(command("default", 1, "big"))
    assert (found.pool("default"), found.pool_of_job("default", "1"), found.pools()) == (None, None, set())


def test_a_tombstone_removes_what_was_said() -> None:
    found = routes(command("a", 7, "big"))
    found.see(b"a", None)
    assert found.pool("a") is None
    found.see(b"a", encode_record(command("a", 1, "small")))
    assert found.pool("a") == "small"


def test_what_is_no_command_changes_nothing() -> None:
    good = command("a", 1, "big")
    found = routes(good)
    of_another = encode_record(command("b", 9, "small"))
    nameless = encode_record(msgspec.structs.replace(good, version=9, pool="bulk"))
    for key, value in (
        (b"a", of_another),
        (b"a", nameless),
        (b"a", b"{"),
        (b"\xff", of_another),
        (None, b""),
    ):
        found.see(key, value)
    assert (found.pool("a"), found.pool("b")) == ("big", None)


def test_a_job_of_a_split_goes_to_the_pool_of_its_share() -> None:
    found = routes(command("old", 1, None), command("new", 1, "big"), split("ab", 1, old=1, new=1))
    homes = {"old": None, "new": "big"}
    for number in range(50):
        share = share_of("ab", {"old": 1, "new": 1}, f"{number}")
        assert found.pool_of_job("ab", f"{number}") == homes[share]
    assert {found.pool_of_job("ab", f"{number}") for number in range(50)} == {None, "big"}


def test_of_a_command_and_a_split_by_one_name_the_last_counts_as_after_compaction() -> None:
    one, shared = command("ab", 5, "small"), split("ab", 1, new=1)
    new = command("new", 1, "big")
    assert routes(new, one, shared).pool_of_job("ab", "1") == "big"
    assert routes(new, shared, one).pool_of_job("ab", "1") == "small"
    assert routes(new, one, shared, command("ab", 6, None)).pool_of_job("ab", "1") is None
