"""Whose lease is over, and whose turn is next."""

from __future__ import annotations

from msgspec.structs import replace

from embedq_gateway.batches.batch import Batch
from embedq_gateway.batches.running.leases import LeaseWatch, next_batch
from tests.unit.gateway.batches.test_batch import a_batch


def owned(owner: str, number: int) -> Batch:
    return replace(a_batch(), owner=owner, id=f"batch_{number:032x}")


def test_what_nobody_holds_is_free_at_once() -> None:
    assert LeaseWatch(10).free(a_batch(), now=0)


def test_a_lease_is_over_after_its_time_without_a_sign_of_life() -> None:
    watch, batch = LeaseWatch(10), a_batch().claimed("other")
    assert not watch.free(batch, now=100)
    assert not watch.free(batch, now=109.9)
    assert watch.free(batch, now=110)


def test_each_sign_of_life_begins_the_time_anew() -> None:
    watch, batch = LeaseWatch(10), a_batch().claimed("other")
    for now in range(0, 100, 9):
        assert not watch.free(batch, now=now)
        batch = batch.beaten("other")


def test_another_holder_is_a_sign_of_life_too() -> None:
    watch, batch = LeaseWatch(10), a_batch().claimed("other")
    assert not watch.free(batch, now=0)
    assert not watch.free(batch.claimed("third"), now=10)
    assert not watch.free(batch.claimed("third"), now=19)


def test_a_batch_that_was_released_and_taken_again_has_its_whole_time() -> None:
    watch, batch = LeaseWatch(10), a_batch().claimed("other")
    assert not watch.free(batch, now=0)
    assert watch.free(batch.released("other"), now=9)
    assert not watch.free(batch, now=11)


def test_what_has_ended_is_forgotten() -> None:
    watch, batch = LeaseWatch(10), a_batch().claimed("other")
    assert not watch.free(batch, now=0)
    watch.forget_others([])
    assert not watch.free(batch, now=10)


def next_of(waiting: list[Batch], running: list[Batch]) -> str | None:
    batch = next_batch(waiting, running)
    return None if batch is None else batch.id


def test_the_oldest_batch_is_next() -> None:
    assert next_of([owned("a", 3), oldest := owned("a", 1), owned("b", 2)], []) == oldest.id


def test_an_owner_without_a_running_batch_goes_before_one_with_many() -> None:
    flood = [owned("flood", n) for n in range(100)]
    assert next_of([*flood, other := owned("other", 500)], flood[:1]) == other.id
    assert next_of([], flood) is None
