"""Equal texts under way: one works, the others wait."""

from __future__ import annotations

import pytest

from embedq_consumer.flights import Flights, Identity
from tests.unit.in_flight import admitted


def test_the_first_of_equal_inputs_starts_the_work_and_all_are_handed_out_once() -> None:
    flights = Flights()
    one, two = admitted(input="a", dimensions=32), admitted(input=["b", "a"], dtype="int8")
    assert flights.join(Identity.of(one, 0), (one, 0))
    assert flights.join(Identity.of(two, 0), (two, 0))
    assert not flights.join(Identity.of(two, 1), (two, 1))
    assert flights.land(Identity.of(one, 0)) == [(one, 0), (two, 1)]
    assert flights.land(Identity.of(one, 0)) == []
    assert flights.waiting(Identity.of(two, 0)) == [(two, 0)]


@pytest.mark.parametrize(
    "other", [{"input": "b"}, {"instruction": "find"}, {"truncate": "end"}, {"truncate": "start"}], ids=str
)
def test_what_the_model_would_see_differently_is_not_equal(other: dict[str, str]) -> None:
    one, two = admitted(input="a"), admitted(**({"input": "a"} | other))
    flights = Flights()
    assert flights.join(Identity.of(one, 0), (one, 0))
    assert flights.join(Identity.of(two, 0), (two, 0))


def test_whoever_leaves_does_not_land_and_the_rest_does() -> None:
    flights = Flights()
    jobs = [admitted(input="a") for _ in range(3)]
    identity = Identity.of(jobs[0], 0)
    for job in jobs:
        flights.join(identity, (job, 0))
    assert flights.leave(identity, lambda waiter: waiter[0] is jobs[0]) == [(jobs[0], 0)]
    assert flights.land(identity) == [(jobs[1], 0), (jobs[2], 0)]


def test_when_the_last_one_has_left_the_next_is_a_first_again() -> None:
    flights = Flights()
    job = admitted(input="a")
    identity = Identity.of(job, 0)
    flights.join(identity, (job, 0))
    flights.leave(identity, lambda waiter: True)
    assert flights.waiting(identity) == []
    assert flights.join(identity, (job, 0))
