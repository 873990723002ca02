"""Equal texts under way: the first starts the work, the others wait."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedq_consumer.batching.single_flight import Identity, JobInput, QueuedText, SingleFlight, Window
from embedq_consumer.engine import Chunked, Piece, Tokens
from embedq_consumer.intake.jobs import JobState
from embedq_shared.topics import LANES, Lane
from tests.helpers.in_flight import Model, admitted


def test_the_first_of_equal_inputs_starts_the_work_and_all_are_handed_out_once() -> None:
    flights = SingleFlight()
    one, two = admitted(input="a", dimensions=32), admitted(input=["b", "a"], dtype="int8")
    assert flights.join(Identity.of(one, 0), (one, 0))
    assert flights.join(Identity.of(two, 0), (two, 0))
    assert not flights.join(Identity.of(two, 1), (two, 1))
    assert flights.resolve(Identity.of(one, 0)) == [(one, 0), (two, 1)]
    assert flights.resolve(Identity.of(one, 0)) == []
    assert flights.waiters(Identity.of(two, 0)) == [(two, 0)]


def of_client(client: bytes, **fields: Any) -> JobState:
    job = admitted(**fields)
    job.record = msgspec.structs.replace(job.record, client=client)
    return job


def test_the_first_of_another_client_is_queued_in_that_clients_own_turns_and_answered_with_the_others() -> (
    None
):
    flights = SingleFlight()
    jobs = [of_client(client, input="a") for client in (b"one", b"one", b"two", b"two", b"one")]
    identity = Identity.of(jobs[0], 0)
    assert [flights.join(identity, (job, 0)) for job in jobs] == [True, False, True, False, False]
    assert flights.resolve(identity) == [(job, 0) for job in jobs]
    assert flights.join(identity, (jobs[3], 0))


def test_who_has_expired_is_told_apart_from_who_still_waits() -> None:
    flights = SingleFlight()
    expired, live = admitted(("deadline", b"1000001"), input="a"), admitted(input="a")
    identity = Identity.of(live, 0)
    for job in (expired, live):
        flights.join(identity, (job, 0))
    assert flights.unexpired(identity, 1_000_000.0) == ([(expired, 0), (live, 0)], [])
    assert flights.unexpired(identity, 1_000_002.0) == ([(live, 0)], [(expired, 0)])
    assert flights.unexpired(identity, 1_000_002.0) == ([(live, 0)], [])


@pytest.mark.parametrize(
    "other",
    [
        {"input": "b"},
        {"instruction": "find"},
        {"truncate": "end"},
        {"truncate": "start"},
        {"chunk": {"mode": "late"}},
        {"chunk": {"mode": "mean"}},
    ],
    ids=str,
)
def test_what_the_model_would_see_differently_is_not_equal(other: dict[str, Any]) -> None:
    one, two = admitted(input="a"), admitted(**({"input": "a"} | other))
    flights = SingleFlight()
    assert flights.join(Identity.of(one, 0), (one, 0))
    assert flights.join(Identity.of(two, 0), (two, 0))


def test_an_input_that_abandons_its_text_is_not_resolved_and_the_others_are() -> None:
    flights = SingleFlight()
    jobs = [admitted(input="a") for _ in range(3)]
    identity = Identity.of(jobs[0], 0)
    for job in jobs:
        flights.join(identity, (job, 0))
    assert flights.abandon(identity, lambda waiter: waiter[0] is jobs[0]) == [(jobs[0], 0)]
    assert flights.resolve(identity) == [(jobs[1], 0), (jobs[2], 0)]


def test_none_who_wait_is_abandoned_unless_gone() -> None:
    flights = SingleFlight()
    job = admitted(input="a")
    identity = Identity.of(job, 0)
    assert flights.abandon(identity, lambda waiter: True) == []
    flights.join(identity, (job, 0))
    assert flights.abandon(identity, lambda waiter: False) == []
    assert flights.waiters(identity) == [(job, 0)]


def test_after_the_last_one_abandoned_the_text_the_next_is_a_first_again() -> None:
    flights = SingleFlight()
    job = admitted(input="a")
    identity = Identity.of(job, 0)
    flights.join(identity, (job, 0))
    flights.abandon(identity, lambda waiter: True)
    assert flights.waiters(identity) == []
    assert flights.join(identity, (job, 0))


def test_a_window_of_an_expired_job_is_nothing_to_an_equal_job_of_the_next_model() -> None:
    flights = SingleFlight()
    expired, later = (admitted(input="a", chunk={"mode": "late"}, model=Model()) for _ in range(2))
    stale, rows = windows(expired)
    flights.join(stale[0].identity, (expired, 0))
    flights.abandon(stale[0].identity, lambda waiter: True)
    assert flights.join(Identity.of(later, 0), (later, 0))
    assert flights.waiters(stale[1].identity) == []
    assert flights.assemble(stale[1], rows[1]) is None


def windows(job: JobState) -> tuple[list[QueuedText], list[np.ndarray[Any, np.dtype[np.float32]]]]:
    """Two windows of a text, of one span and of two, and their rows."""
    rows = np.arange(3 * 256, dtype=np.float32).reshape(3, 256)
    texts = tuple(
        Tokens(np.arange(9, dtype=np.int32), spans=spans) for spans in (((1, 8),), ((1, 3), (3, 8)))
    )
    chunked = Chunked(texts, (Piece(0, 7, 7), Piece(7, 9, 2), Piece(9, 14, 5)))
    items = [
        QueuedText(identity=Identity.of(job, 0), tokens=text, arrived=0.0, window=Window(chunked, number))
        for number, text in enumerate(texts)
    ]
    return items, [rows[:1], rows[1:]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1), (1, 0, 0)])
def test_windows_are_whole_with_the_last_one_in_any_order(order: tuple[int, ...]) -> None:
    job = admitted(input="a", chunk={"mode": "late"})
    flights = SingleFlight()
    items, rows = windows(job)
    flights.join(items[0].identity, (job, 0))
    found = [flights.assemble(items[number], rows[number]) for number in order]
    last = next(place for place, _ in enumerate(order) if set(order[: place + 1]) == {0, 1})
    assert [place for place, whole in enumerate(found) if whole is not None] == [last]
    whole = found[last]
    assert whole is not None
    assert np.array_equal(whole, np.concatenate(rows))
    assert flights.resolve(items[0].identity) == [(job, 0)]


def test_a_text_without_windows_is_not_assembled() -> None:
    flights = SingleFlight()
    plain, late = admitted(input="a"), admitted(input="a", chunk={"mode": "late"})
    for job in (plain, late):
        identity = Identity.of(job, 0)
        flights.join(identity, (job, 0))
        text = QueuedText(identity=identity, tokens=Tokens(np.arange(3, dtype=np.int32)), arrived=0.0)
        assert flights.assemble(text, np.ones((1, 256), np.float32)) is None
    [whole], rows = windows(late)[0][:1], windows(late)[1]
    stray = QueuedText(identity=Identity.of(plain, 0), tokens=whole.tokens, arrived=0.0, window=whole.window)
    assert flights.assemble(stray, rows[0]) is None


def test_windows_are_kept_only_while_an_input_waits() -> None:
    job = admitted(input="a", chunk={"mode": "late"})
    flights = SingleFlight()
    items, rows = windows(job)
    assert flights.assemble(items[0], rows[0]) is None
    for gone in (flights.resolve, lambda identity: flights.abandon(identity, lambda waiter: True)):
        flights.join(items[0].identity, (job, 0))
        flights.assemble(items[0], rows[0])
        gone(items[0].identity)
        flights.join(items[0].identity, (job, 0))
        assert flights.assemble(items[1], rows[1]) is None
        assert flights.assemble(items[0], rows[0]) is not None
        flights.resolve(items[0].identity)


TEXTS = st.sampled_from(["a", "b", "c"])


class SingleFlightMachine(RuleBasedStateMachine):
    """Against a model that is too simple to be wrong: all inputs that wait, in order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.flights = SingleFlight()
        self.waiting: list[tuple[Identity, JobInput]] = []

    def those_of(self, identity: Identity) -> list[JobInput]:
        return [waiter for other, waiter in self.waiting if other == identity]

    @rule(text=TEXTS, lane=st.sampled_from(LANES))
    def join(self, text: str, lane: Lane) -> None:
        job = admitted(input=text)
        job.record = msgspec.structs.replace(job.record, lane=lane)
        identity = Identity.of(job, 0)
        assert self.flights.join(identity, (job, 0)) is (not self.those_of(identity))
        self.waiting.append((identity, (job, 0)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        identity, _ = data.draw(st.sampled_from(self.waiting))
        gone = [waiter for waiter in self.those_of(identity) if data.draw(st.booleans())]
        assert self.flights.abandon(identity, lambda waiter: waiter in gone) == gone
        self.waiting = [entry for entry in self.waiting if entry[1] not in gone]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        identity, _ = data.draw(st.sampled_from(self.waiting))
        assert self.flights.resolve(identity) == self.those_of(identity)
        self.waiting = [entry for entry in self.waiting if entry[0] != identity]

    @invariant()
    def who_waits_is_known(self) -> None:
        for identity, _ in self.waiting:
            assert self.flights.waiters(identity) == self.those_of(identity)


TestSingleFlight = SingleFlightMachine.TestCase
TestSingleFlight.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
