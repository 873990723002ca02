"""What becomes of records by place, with plain errors and plain numbers as time."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

import msgspec
import pytest
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaConnectionError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NotEnoughReplicasError,
    UnknownTopicOrPartitionError,
)
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.delivery.destination import (
    CONFIRM_S,
    MAX_BATCH_BYTES,
    PROBE_S,
    Destination,
    Parcel,
    Presence,
    Undelivered,
)
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.places import FORGET_S, IDLE_S, Places
from embedq_shared.kafka import partition_of

serials = count()


def record(
    topic: str = "t",
    partition: int | None = 0,
    *,
    key: bytes | None = b"k",
    value: bytes = b"v",
    anywhere: bool = False,
) -> Outgoing:
    return Outgoing(topic=topic, partition=partition, key=key, value=value, headers=[], anywhere=anywhere)


def parcel(
    now: float = 0, timeout_s: float | None = 15, sent: Outgoing | None = None, *, urgent: bool = False
) -> Parcel:
    one = Parcel(sent or record(), lambda error: None, timeout_s, lambda: urgent)
    one.accept(next(serials), now)
    return one


def places(*, max_held: int = 100, **partitions: int) -> Places:
    return Places((partitions or {"t": 4}).get, max_held=max_held, now=0)


def opened(destination: Destination, one: Parcel, now: float = 0) -> Parcel:
    destination.add(one)
    assert destination.take(now) == [one]
    destination.opened([one], object(), now)
    return one


def failing(
    found: Places, place: tuple[str, int] = ("t", 0), *, now: float = 0, count: int = 1
) -> Destination:
    """A place that fails from `now` on, and what waits there since."""
    destination = found.at(place)
    for _ in range(count):
        destination.add(parcel(now, sent=record(*place)))
    destination.note_failure(NotEnoughReplicasError(), now, now)
    return destination


# -- one place ----------------------------------------------------------------------------------------------------------


def test_parcels_are_handed_over_in_their_order_up_to_a_batch() -> None:
    destination = Destination(("t", 0))
    large = record(value=bytes(MAX_BATCH_BYTES // 2))
    first, second, third = parcel(sent=large), parcel(sent=record()), parcel(sent=large)
    for one in (third, first, second):
        destination.add(one)
    assert destination.take(0) == [first, second]
    destination.opened([first, second], object(), 0)
    assert destination.take(0) == []
    destination.closed(first)
    assert destination.take(0) == [third]


def test_no_more_parcels_are_handed_over_than_are_asked_for_and_express_ones_first() -> None:
    destination = Destination(("t", 0))
    others = [parcel() for _ in range(3)]
    express = [parcel(sent=msgspec.structs.replace(record(), express=True)) for _ in range(2)]
    for one in (*others, *express):
        destination.add(one)
    assert destination.take(0, express=True, most=1) == express[:1]
    assert destination.take(0, most=2) == [express[1], others[0]]
    assert destination.take(0, express=True) == []
    assert destination.take(0) == others[1:]
    assert not destination.has_waiting


def test_a_parcel_larger_than_a_batch_goes_once_nothing_else_is_open() -> None:
    destination = Destination(("t", 0))
    small = opened(destination, parcel())
    large = parcel(sent=record(value=bytes(2 * MAX_BATCH_BYTES)))
    destination.add(large)
    assert destination.take(0) == []
    destination.closed(small)
    assert destination.take(0) == [large]


def test_a_parcel_that_must_be_alone_shares_no_batch() -> None:
    destination = Destination(("t", 0))
    alone, next_one = parcel(), parcel()
    alone.alone = True
    before = opened(destination, parcel(0))
    destination.add(alone)
    destination.add(next_one)
    assert destination.take(0) == []
    destination.closed(before)
    assert destination.take(0) == [alone]
    destination.opened([alone], object(), 0)
    assert destination.take(0) == []
    assert not destination.shared(alone)
    destination.closed(alone)
    assert destination.take(0) == [next_one]


def test_a_parcel_shared_its_batch_if_others_were_open_with_it() -> None:
    destination = Destination(("t", 0))
    first = opened(destination, parcel())
    assert not destination.shared(first)
    second = opened(destination, parcel())
    assert destination.shared(first)
    assert destination.shared(second)


def test_what_is_recalled_waits_in_its_old_order() -> None:
    destination = Destination(("t", 0))
    first, second = opened(destination, parcel()), opened(destination, parcel())
    third = parcel()
    destination.add(third)
    destination.recall()
    assert destination.waiting() == [first, second, third]
    assert destination.idle
    assert first.sending is None


def test_after_a_failure_it_pauses_longer_each_time_and_failures_of_one_batch_count_once() -> None:
    destination = Destination(("t", 0))
    destination.add(parcel())
    now, pauses = 0.0, []
    for _ in range(8):
        for _ in range(100):
            destination.note_failure(NotEnoughReplicasError(), now, now)
        began = now
        while destination.pauses(now):
            now += 0.01
        pauses.append(now - began)
    assert pauses[0] < 0.12
    assert 0.4 < pauses[-1] < 1.02
    assert destination.take(now)


def test_its_probation_doubles_with_each_relapse() -> None:
    destination = Destination(("t", 0))
    now = 0.0
    for span in (10, 20, 40):
        destination.note_failure(NotEnoughReplicasError(), now, now)
        destination.note_failure(NotEnoughReplicasError(), now + 5, now)
        assert not destination.may_return(now + 1000)
        destination.note_taken(now + 6)
        assert not destination.may_return(now + 6 + span - 0.1)
        assert destination.may_return(now + 6 + span)
        destination.rejoin()
        assert not destination.apart
        now += 100


# -- where to -------------------------------------------------------------------------------------------------------------


def test_a_record_goes_where_it_says_or_where_its_key_says() -> None:
    found = places(t=4)
    assert found.destination_of(record(partition=3), 0).place == ("t", 3)
    assert found.destination_of(record(partition=None, key=b"abc"), 0).place == ("t", partition_of(b"abc", 4))
    assert found.destination_of(record("unknown", None), 0).place == ("unknown", 0)


def test_a_record_that_may_go_elsewhere_avoids_a_place_that_fails() -> None:
    found = places(t=3)
    failing(found, ("t", 0))
    assert found.destination_of(record(partition=0), 0).place == ("t", 0)
    assert found.destination_of(record(partition=0, anywhere=True), 0).place == ("t", 1)
    failing(found, ("t", 1))
    assert found.destination_of(record(partition=0, anywhere=True), 0).place == ("t", 2)
    failing(found, ("t", 2))
    assert found.destination_of(record(partition=0, anywhere=True), 0).place == ("t", 0)


def test_what_waits_for_a_failing_place_moves_if_it_may() -> None:
    found = places(t=2)
    destination = failing(found)
    letter = parcel(sent=record(partition=0, anywhere=True), timeout_s=None)
    destination.add(letter)
    [other] = found.elsewhere(destination, 0)
    assert other.place == ("t", 1)
    assert other.waiting() == [letter]
    assert len(destination) == 1


def test_what_moves_keeps_its_order_and_is_taken_out_at_once_however_much_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = places(t=2)
    destination = failing(found)
    letters = [parcel(sent=record(partition=0, anywhere=True)) for _ in range(100)]
    for letter in letters:
        destination.add(letter)
    removed: list[int] = []
    remove = Destination.remove

    def noted(its: Destination, parcels: Collection[Parcel]) -> None:
        removed.append(len(parcels))
        remove(its, parcels)

    monkeypatch.setattr(Destination, "remove", noted)
    [other] = found.elsewhere(destination, 0)
    assert other.waiting() == letters
    assert len(destination) == 1
    assert removed == [100], "all that waits is looked through each time"


def test_nothing_moves_while_kafka_is_away() -> None:
    found = places(t=2)
    destination = failing(found)
    destination.add(parcel(sent=record(partition=0, anywhere=True)))
    found.just_went_away(0)
    assert found.just_went_away(7.1)
    assert found.elsewhere(destination, 8) == []


# -- too long -------------------------------------------------------------------------------------------------------------


def test_a_place_that_fails_while_others_work_is_given_up_after_its_time_with_the_reason() -> None:
    found = places()
    destination = failing(found, now=0, count=3)
    forever = parcel(0, timeout_s=None)
    destination.add(forever)
    found.note_taken(14.9)
    assert found.overdue(destination, 14.9) == []
    found.note_taken(15)
    ended = found.overdue(destination, 15)
    assert len(ended) == 3
    assert str(ended[0][1]) == (
        "Undelivered: for 15 s they took no record: the brokers have fewer copies in sync than min.insync.replicas "
        "(NOT_ENOUGH_REPLICAS)"
    )
    assert destination.waiting() == [forever]


def test_nothing_is_given_up_while_nothing_is_taken_anywhere() -> None:
    found = places()
    destination = failing(found, now=0)
    for now in range(200):
        found.just_went_away(now)
        assert found.overdue(destination, now) == []
    found.note_taken(200)
    assert found.overdue(destination, 200) == []
    found.note_taken(214)
    assert found.overdue(destination, 214.9) == []  # it has all of its time again
    assert len(found.overdue(destination, 215)) == 1


def test_even_a_time_shorter_than_it_takes_to_see_that_kafka_is_away_gives_nothing_up() -> None:
    found = places()
    destination = found.at(("t", 0))
    found.note_taken(0.5)  # the last thing that was taken
    destination.add(parcel(0, timeout_s=2))
    destination.note_failure(KafkaConnectionError(), 0.6, 0)
    assert all(not found.overdue(destination, now / 10) for now in range(70))


def test_a_record_that_others_wait_for_is_given_up_before_its_time_and_only_while_its_place_fails() -> None:
    found = places()
    destination = failing(found, now=0, count=2)
    urgent = parcel(0, urgent=True)
    destination.add(urgent)
    assert [one for one, _ in found.overdue(destination, 1)] == [urgent]
    assert not destination.given_up
    destination.add(urgent)
    destination.note_taken(2)
    assert found.overdue(destination, 2) == []


def test_a_place_that_was_given_up_refuses_at_once_but_for_one_that_tries() -> None:
    found = places()
    destination = failing(found, now=0)
    found.note_taken(15)
    assert found.overdue(destination, 15)
    assert not destination.accepts(parcel(15.1), 15.1)
    assert destination.accepts(parcel(15.1, timeout_s=None), 15.1)
    probe = parcel(17)
    assert destination.accepts(probe, 17)
    assert probe.timeout_s == PROBE_S
    destination.add(probe)
    assert not destination.accepts(parcel(17), 17)
    destination.remove([probe])
    destination.note_taken(17.5)
    assert destination.accepts(parcel(18), 18)


def test_a_topic_that_does_not_exist_is_refused_once_that_is_certain() -> None:
    found = places()
    destination = found.at(("t", 0))
    destination.add(parcel())
    error = UnknownTopicOrPartitionError()
    destination.note_failure(error, 0, 0)
    assert found.overdue(destination, CONFIRM_S - 0.1) == []
    assert [reason for _, reason in found.overdue(destination, CONFIRM_S)] == [error]


def test_failing_places_hold_no_more_than_they_may_and_the_oldest_of_the_fullest_go() -> None:
    found = places(max_held=10)
    small, full = failing(found, ("t", 0), count=3), failing(found, ("t", 1), count=12)
    oldest = full.parcels()[:5]
    assert [one for one, _ in found.excess(1)] == oldest
    assert (len(small), len(full)) == (3, 7)
    assert found.excess(1) == []


def lost(found: Places, *, urgent: bool = False, count: int = 12) -> Destination:
    """A place that has worked, whose broker is lost at second 1; its records may wait for 15 s."""
    destination = found.at(("t", 0))
    destination.note_taken(0)
    for _ in range(count):
        destination.add(parcel(1, timeout_s=15, urgent=urgent))
    destination.note_failure(NodeNotReadyError(), 1, 1)
    found.note_taken(2)
    return destination


def test_a_place_that_worked_until_now_has_half_of_its_time_to_heal_whatever_waits_for_it() -> None:
    found = places(max_held=10)
    destination = lost(found)
    assert found.excess(1 + 7.4) == []
    assert len(found.excess(1 + 7.5)) == 2
    destination.note_taken(10)
    destination.note_failure(NodeNotReadyError(), 11, 11)
    assert found.excess(12) == [], "it worked again"


def test_nor_does_what_waits_behind_its_records_end_them_before() -> None:
    found = places()
    destination = lost(found, urgent=True)
    assert found.overdue(destination, 1 + 7.4) == []
    assert len(found.overdue(destination, 1 + 7.5)) == 12


def test_a_place_that_was_given_up_has_no_time_to_heal_until_it_has_worked_again() -> None:
    found = places(max_held=10)
    destination = lost(found, urgent=True)
    found.note_taken(12)
    assert len(found.overdue(destination, 1 + 15)) == 12
    destination.add(parcel(20, timeout_s=15, urgent=True))
    destination.note_failure(NodeNotReadyError(), 20, 20)
    assert len(found.overdue(destination, 20.1)) == 1


def test_a_place_that_was_never_tried_is_believed_to_heal_where_others_fail_that_did_not_before() -> None:
    found = places(max_held=10)
    new = failing(found, ("t", 1), count=12)
    assert len(found.excess(1)) == 2, "its own fault, for all that is known"
    lost(found)
    for _ in range(5):
        new.add(parcel(1))
    assert found.excess(2) == []


def test_a_place_of_our_own_topics_is_believed_to_heal_before_it_has_had_a_record() -> None:
    found = Places({"t": 4}.get, max_held=10, now=0, ours=["t"])
    failing(found, count=12)
    assert found.excess(1) == []


def test_a_place_that_heals_takes_nothing_of_what_others_that_fail_may_hold() -> None:
    found = places(max_held=10)
    lost(found, count=100)
    failing(found, ("t", 1), count=10)
    assert found.excess(2) == []


def test_a_place_that_works_may_hold_what_it_likes() -> None:
    found = places(max_held=10)
    for _ in range(100):
        found.at(("t", 0)).add(parcel())
    assert found.excess(1) == []


def test_silence_counts_only_while_others_are_heard() -> None:
    found = places()
    destination = found.at(("t", 0))
    opened(destination, parcel(), 10)
    assert found.silent(destination, 3, 14) is None
    found.note_taken(12)
    assert found.silent(destination, 3, 12.9) is None
    assert found.silent(destination, 3, 13.1) == 10


# -- as a whole -------------------------------------------------------------------------------------------------------------


def test_kafka_is_away_when_something_waits_and_nothing_was_taken_for_a_while() -> None:
    presence = Presence(0)
    assert not presence.look(100, pending=False)
    assert not presence.look(101, pending=True)
    assert not presence.look(101 + Presence.AWAY_S, pending=True)
    assert presence.look(101.1 + Presence.AWAY_S, pending=True)
    assert not presence.look(120, pending=True)  # said once
    assert presence.note_taken(130)
    assert not presence.note_taken(131)
    assert presence.back_at == 130


def test_kafka_is_not_away_because_our_own_event_loop_stood_still() -> None:
    found = places()
    destination = found.at(("t", 0))
    opened(destination, parcel(100), 100)
    assert not found.just_went_away(101)
    found.excuse(60, 161)
    assert not found.just_went_away(161)
    assert not found.just_went_away(161 + Presence.AWAY_S)
    assert found.just_went_away(161.1 + Presence.AWAY_S)


def test_what_was_excused_once_is_not_taken_off_the_next_silence() -> None:
    presence = Presence(0)
    presence.look(1, pending=True)
    presence.excuse(60)
    presence.note_taken(62)
    assert not presence.look(63, pending=True)
    assert presence.look(63.1 + Presence.AWAY_S, pending=True)


def test_a_place_is_not_silent_because_we_did_not_listen_while_another_ones_answer_was_read_first() -> None:
    found = places()
    destination = found.at(("t", 0))
    opened(destination, parcel(10), 10)
    found.note_taken(40)  # the first answer after half a minute in which we stood still
    assert found.silent(destination, 3, 40) == 10
    found.excuse(29, 40)
    assert found.silent(destination, 3, 40) is None
    found.note_taken(41.5)
    assert found.silent(destination, 3, 42.1) == 39


def test_a_record_that_came_in_the_turn_that_was_late_is_not_from_the_future() -> None:
    found = places()
    new = opened(found.at(("t", 0)), parcel(40), 40)
    found.excuse(29, 40)
    assert (new.since, new.sent_at) == (40, 40)


def test_what_a_replica_says_of_kafka_and_of_its_own_topics() -> None:
    found = places()
    assert found.trouble("no answer", 0) is None
    destination = found.at(("t.results", 2))
    destination.add(parcel(0, timeout_s=None))
    destination.note_failure(LeaderNotAvailableError(), 0, 0)
    assert found.trouble("", 6) is None
    assert found.trouble("", 8) == "topic t.results has taken nothing for 8 s (LEADER_NOT_AVAILABLE)"
    found.just_went_away(0)
    found.just_went_away(8)
    assert found.trouble("NodeNotReadyError", 9) == "Kafka has taken nothing for 9 s (NodeNotReadyError)"


def test_an_address_of_a_callers_that_fails_does_not_make_the_replica_unready() -> None:
    found = places()
    failing(found)
    assert found.trouble("", 100) is None


def test_places_without_work_are_forgotten_and_those_that_failed_later() -> None:
    found = places()
    well, sick = found.at(("well", 0)), found.at(("sick", 0))
    well.used_at = sick.used_at = 100
    sick.note_failure(NotEnoughReplicasError(), 100, 100)
    assert found.forget_idle(100 + IDLE_S - 1) == []
    assert sorted(found.forget_idle(100 + IDLE_S)) == [(("sick", 0), False), (("well", 0), True)]
    assert not found.knows("well")
    assert found.knows("sick")
    assert found.forget_idle(101 + FORGET_S) == [(("sick", 0), True)]


@pytest.mark.parametrize("error", [InvalidTimestampError(), KafkaConnectionError()])
def test_a_reason_names_neither_topic_nor_value(error: Exception) -> None:
    destination = Destination(("secret-topic", 0))
    destination.note_failure(error, 0, 0)
    reason = destination.undelivered(3)
    assert isinstance(reason, Undelivered)
    assert "secret" not in str(reason)


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "open", "taken", "failed", "recall", "overdue", "excess", "elsewhere"]),
        st.integers(0, 2),
        st.floats(0, 5),
    ),
    max_size=60,
)


@given(steps)
def test_a_parcel_is_in_one_place_or_has_ended_and_never_both(taken: list[tuple[str, int, float]]) -> None:
    found, now = places(t=3, max_held=4), 0.0
    all_parcels: list[Parcel] = []
    ended: list[Parcel] = []
    for step, partition, pause in taken:
        now += pause
        destination = found.at(("t", partition))
        match step:
            case "add":
                one = parcel(now, sent=record(partition=partition, anywhere=bool(len(all_parcels) % 2)))
                all_parcels.append(one)
                destination.add(one)
            case "open":
                if to_send := destination.take(now, most=1 + len(all_parcels) % 3):
                    destination.opened(to_send, object(), now)
            case "taken":
                if (oldest := destination.oldest_open()) is not None:
                    destination.closed(oldest)
                    destination.note_taken(now)
                    found.note_taken(now)
                    ended.append(oldest)
            case "failed":
                if (oldest := destination.oldest_open()) is not None:
                    destination.closed(oldest)
                    destination.add(oldest)
                    destination.note_failure(NotEnoughReplicasError(), now, oldest.sent_at)
            case "recall":
                destination.recall()
            case "overdue":
                ended += [one for one, _ in found.overdue(destination, now)]
            case "excess":
                ended += [one for one, _ in found.excess(now)]
            case "elsewhere":
                found.elsewhere(destination, now)
        found.just_went_away(now)
    there = [one.serial for each in found for one in each.parcels()]
    assert sorted([*there, *(one.serial for one in ended)]) == [one.serial for one in all_parcels]
