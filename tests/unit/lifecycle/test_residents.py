"""Which models stay in memory, and which go."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.batching.token_budget import Budget, Conditions, Measured
from embedq_consumer.lifecycle.gates.stamp import stamp_of
from embedq_consumer.lifecycle.residents import Loaded, Residents, Source
from tests.helpers.fake_models import FOOTPRINT, FakeModel


def model(name: str, size: int = 100, *, stamp: str | None = "s") -> Loaded:
    encoder = FakeModel(f"sha256:{name}")
    encoder.weight_bytes = size
    return Loaded(encoder, Source(Path("/models") / name, stamp=stamp))


def names(loaded: list[Loaded]) -> list[str]:
    return [one.path.name for one in loaded]


def left(residents: Residents, *models: Loaded) -> None:
    """Each was used once, in this order."""
    for at, one in enumerate(models):
        residents.add(one)
        assert residents.leave(one, float(at), keep=True) == []


def test_a_model_is_found_by_its_files_and_how_it_was_loaded() -> None:
    residents, one = Residents(), model("one")
    residents.add(one)
    assert residents.find(Source(Path("/models/one"), stamp="s")) is one
    assert residents.find(Source(Path("/models/one"), stamp="s", tried=True)) is one
    for other in (
        Source(Path("/models/two"), stamp="s"),
        Source(Path("/models/one"), stamp="another"),
        Source(Path("/models/one"), "fp8", stamp="s"),
        Source(Path("/models/one")),
    ):
        assert residents.find(other) is None


def test_a_model_whose_files_are_not_known_is_never_found() -> None:
    residents, one = Residents(keep=1), model("one", stamp=None)
    residents.add(one)
    assert residents.find(one.source) is None
    assert residents.leave(one, 1.0, keep=True) == [one]


def test_it_goes_with_its_last_user() -> None:
    residents, one = Residents(), model("one")
    residents.add(one)
    residents.take(one)
    assert residents.freed_by(one) == 0
    assert residents.leave(one, 1.0, keep=True) == []
    assert (residents.freed_by(one), residents.empty) == (100, False)
    assert residents.leave(one, 2.0, keep=True) == [one]
    assert (residents.find(one.source), residents.empty) == (None, True)


def test_of_those_that_nobody_uses_the_last_used_ones_stay() -> None:
    residents = Residents(keep=2)
    a, b, c = model("a"), model("b"), model("c")
    left(residents, a, b)
    residents.take(a)  # somebody came back
    assert residents.leave(a, 5.0, keep=True) == []
    residents.add(c)
    assert residents.leave(c, 6.0, keep=True) == [b]
    assert [residents.find(one.source) for one in (a, b, c)] == [a, None, c]


def test_who_needs_the_memory_keeps_nothing_but_what_is_pinned() -> None:
    residents = Residents(keep=5, pinned=[Path("/models/a")])
    a, b = model("a"), model("b")
    for one in (a, b):
        residents.add(one)
    assert (residents.freed_by(a), residents.freed_by(b)) == (0, 100)
    assert residents.leave(a, 1.0, keep=False) == []
    assert residents.leave(b, 2.0, keep=False) == [b]
    assert residents.find(a.source) is a
    assert residents.idle_bytes == 0, "a pinned model may not go"
    assert residents.make_room(1) == []


@pytest.mark.parametrize(
    ("wanted", "going"),
    [(0, []), (-5, []), (1, ["a"]), (100, ["a"]), (101, ["a", "b"]), (300, ["a", "b", "c"]), (301, [])],
)
def test_room_is_made_by_the_least_recently_used_and_nothing_goes_in_vain(
    wanted: int, going: list[str]
) -> None:
    residents = Residents(keep=3)
    left(residents, model("a"), model("b"), model("c"))
    changes = residents.changes
    assert names(residents.make_room(wanted)) == going
    assert residents.changes == changes + len(going)


def test_a_budget_is_remembered_as_long_as_its_model_is_there() -> None:
    residents, one = Residents(keep=1), model("one")
    residents.add(one)
    assert residents.budget_of(one) is None
    residents.note_measured(one, Measured(budget=Budget(512, 64)))
    residents.leave(one, 1.0, keep=True)
    found = residents.find(one.source)
    assert found is one
    assert residents.budget_of(found) == Budget(512, 64)


CONDITIONS = Conditions(footprint=FOOTPRINT, tokens=512, max_items=4)
MEASURED = Measured(budget=Budget(512, 64), conditions=CONDITIONS, takes=100)


def test_what_was_found_for_a_model_is_known_under_its_conditions_as_long_as_it_is_there() -> None:
    residents, one, two = Residents(), model("one"), model("two")
    for each in (one, two):
        residents.add(each)
    assert residents.measured_under(CONDITIONS, 100) is None
    residents.note_measured(one, MEASURED)
    assert residents.measured_under(CONDITIONS, 100) is MEASURED
    assert residents.measured_under(CONDITIONS, 99) is None
    assert residents.measured_under(msgspec.structs.replace(CONDITIONS, tokens=256), 100) is None
    residents.note_measured(two, MEASURED)  # which took it over
    residents.leave(one, 1.0, keep=False)
    assert residents.measured_under(CONDITIONS, 100) is MEASURED
    residents.leave(two, 2.0, keep=False)
    assert residents.measured_under(CONDITIONS, 100) is None


def test_where_memory_ran_out_for_one_model_what_was_found_for_all_of_its_shape_counts_no_more() -> None:
    residents = Residents()
    one, alike, other, apart = model("one"), model("alike"), model("other"), model("apart")
    elsewhere = msgspec.structs.replace(MEASURED, conditions=msgspec.structs.replace(CONDITIONS, tokens=256))
    for each, measured in (
        (one, MEASURED),
        (alike, MEASURED),
        (other, elsewhere),
        (apart, Measured(budget=Budget(512, 64))),
    ):
        residents.add(each)
        residents.note_measured(each, measured)
    residents.doubt(one.encoder)
    assert [residents.budget_of(each) for each in (one, alike)] == [None, None]
    assert residents.measured_under(CONDITIONS, 1000) is None
    assert residents.budget_of(other) == elsewhere.budget
    residents.doubt(FakeModel())  # of one that is gone
    assert residents.budget_of(other) == elsewhere.budget
    residents.doubt(apart.encoder)
    assert [residents.budget_of(each) for each in (other, apart)] == [elsewhere.budget, None]


def test_a_model_that_is_not_there_is_a_bug() -> None:
    with pytest.raises(RuntimeError, match="This is a bug"):
        Residents().take(model("one"))


Step = tuple[str, int, bool]
STEPS = st.lists(
    st.tuples(st.sampled_from(["use", "leave", "room"]), st.integers(0, 4), st.booleans()), max_size=60
)


@given(steps=STEPS, keep=st.integers(0, 3), pinned=st.integers(0, 2))
def test_whatever_happens_who_is_used_or_pinned_stays(steps: list[Step], keep: int, pinned: int) -> None:
    sizes = [10, 20, 30, 40, 50]
    residents = Residents(keep, [Path("/models") / str(n) for n in range(pinned)])
    users, seen = [0] * 5, [False] * 5
    models = [model(str(n), sizes[n]) for n in range(5)]

    def there(n: int) -> bool:
        return residents.find(models[n].source) is not None

    def went(going: list[Loaded]) -> set[int]:
        return {int(name) for name in names(going)}

    for at, (what, n, flag) in enumerate(steps):
        before = {m for m in range(5) if there(m)}
        idle = {m for m in before if not users[m] and not (m < pinned and seen[m])}
        gone: set[int] = set()
        if what == "use":
            residents.take(models[n]) if there(n) else residents.add(models[n])
            users[n] += 1
            seen[n] = True
            before.add(n)
        elif what == "leave" and users[n]:
            users[n] -= 1
            gone = went(residents.leave(models[n], float(at), keep=flag))
        elif what == "room":
            wanted = n * 25
            assert residents.idle_bytes == sum(sizes[m] for m in idle)
            gone = went(residents.make_room(wanted))
            if gone:
                assert sum(sizes[m] for m in gone) >= wanted
            else:
                assert wanted <= 0 or sum(sizes[m] for m in idle) < wanted
        assert all(not users[m] and not m < pinned for m in gone)
        assert {m for m in range(5) if there(m)} == before - gone
        assert len([m for m in range(pinned, 5) if there(m) and not users[m]]) <= keep


def test_a_stamp_tells_files_that_are_others(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"1234")
    before = stamp_of(tmp_path / "model")
    assert before is not None
    assert stamp_of(tmp_path / "model") == before
    times = weights.stat()
    weights.write_bytes(b"4321")  # in place, of the same size, with the old time put back
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stamp_of(tmp_path / "model") != before
    (tmp_path / "model" / "more.json").write_text("{}")
    assert stamp_of(tmp_path / "model") not in (before, None)


def test_where_files_lie_elsewhere_there_is_no_stamp(tmp_path: Path) -> None:
    for name in ("adapter", "linked", "dangling"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "linked" / "1_Pooling").symlink_to(tmp_path / "adapter")
    (tmp_path / "dangling" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert [stamp_of(tmp_path / name) for name in ("adapter", "linked", "dangling")] == [None] * 3
