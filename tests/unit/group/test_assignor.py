"""Who gets which partition, for any members and any claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.group.assignor import (
    Claim,
    Share,
    decode_claim,
    decode_release,
    encode_claim,
    encode_release,
    share,
)

JOBS, BULK = "jobs", "jobs.bulk"
BOTH = (JOBS, BULK)
Members = dict[str, tuple[Collection[str], Claim | None]]

topics = st.fixed_dictionaries({JOBS: st.integers(1, 9), BULK: st.integers(0, 6)}).map(
    lambda counts: {topic: list(range(count)) for topic, count in counts.items()}
)
claims = st.none() | st.builds(
    Claim,
    st.integers(-1, 3),
    st.fixed_dictionaries({JOBS: st.lists(st.integers(0, 9), unique=True)}),
)
members = st.dictionaries(st.sampled_from("abcdef"), claims, min_size=1).map(
    lambda found: {member: (BOTH, claim) for member, claim in found.items()}
)


def follow(shares: Mapping[str, Share], generation: int) -> Members:
    """The members as they claim once they have released what they were asked to."""
    found: Members = {}
    for member, its in shares.items():
        owned: dict[str, list[int]] = {}
        for partition in sorted(its.partitions):
            owned.setdefault(partition.topic, []).append(partition.partition)
        found[member] = BOTH, Claim(generation, owned)
    return found


def all_of(partitions: Mapping[str, Sequence[int]]) -> set[TopicPartition]:
    return {TopicPartition(topic, number) for topic, numbers in partitions.items() for number in numbers}


def owned(claim: Claim | None) -> set[TopicPartition]:
    return all_of(claim.owned) if claim is not None else set()


@given(topics, members)
def test_a_partition_goes_to_one_member_at_most_and_never_to_a_new_one_while_another_claims_it(
    partitions: dict[str, list[int]], found: Members
) -> None:
    shares = share(partitions, found)
    given_ = Counter(partition for its in shares.values() for partition in its.partitions)
    asked_back = Counter(partition for its in shares.values() for partition in its.release)
    assert set((given_ + asked_back).values()) <= {1}
    assert given_.keys() | asked_back.keys() == all_of(partitions)
    for member, its in shares.items():
        others = [claim for other, (_, claim) in found.items() if other != member and claim]
        mine = found[member][1]
        for partition in its.partitions - owned(mine):
            # Those who claim it slept through a generation in which nobody had it, or it was given up since.
            assert all(partition not in owned(claim) for claim in others)
        assert its.release <= owned(mine)


@given(topics, members)
def test_two_rounds_give_all_partitions_evenly_and_a_third_changes_nothing(
    partitions: dict[str, list[int]], found: Members
) -> None:
    first = share(partitions, found)
    second = share(partitions, follow(first, 10))
    assert not any(its.release for its in second.values())
    assert set().union(*(its.partitions for its in second.values())) == all_of(partitions)
    assert share(partitions, follow(second, 11)) == second
    for topic in partitions:
        counts = [sum(p.topic == topic for p in its.partitions) for its in second.values()]
        assert max(counts) - min(counts) <= 1
    totals = [len(its.partitions) for its in second.values()]
    assert max(totals) - min(totals) <= 1


@given(topics, st.sets(st.sampled_from("abcdef"), min_size=1), st.sampled_from("ghi"))
def test_a_joiner_takes_from_each_no_more_than_its_share_and_the_rest_stays(
    partitions: dict[str, list[int]], before: set[str], joiner: str
) -> None:
    settled = share(partitions, dict.fromkeys(before, (BOTH, None)))
    with_joiner: Members = follow(settled, 1) | {joiner: (BOTH, Claim(-1, {}))}
    shares = share(partitions, with_joiner)
    moved = sum(len(its.release) for its in shares.values())
    target = share(partitions, follow(shares, 2))[joiner].partitions
    assert moved == len(target)
    for member in before:
        assert shares[member].partitions | shares[member].release == settled[member].partitions


def test_what_a_leaver_had_goes_on_at_once_and_nothing_else_moves() -> None:
    partitions = {JOBS: list(range(6)), BULK: list(range(3))}
    settled = share(partitions, dict.fromkeys("abc", (BOTH, None)))
    left = follow(settled, 1)
    del left["b"]
    shares = share(partitions, left)
    assert not any(its.release for its in shares.values())
    for member in "ac":
        assert settled[member].partitions <= shares[member].partitions


def test_a_member_that_slept_does_not_keep_what_went_to_another_one() -> None:
    found: Members = {
        "asleep": (BOTH, Claim(3, {JOBS: [0, 1]})),
        "awake": (BOTH, Claim(7, {JOBS: [0, 1]})),
    }
    shares = share({JOBS: [0, 1]}, found)
    assert len(shares["awake"].partitions) == len(shares["awake"].release) == 1
    assert shares["asleep"] == Share(frozenset(), frozenset())


def test_a_member_that_hands_nothing_over_owns_nothing_when_it_joins() -> None:
    shares = share({JOBS: [0, 1]}, {"former": (BOTH, None), "new": (BOTH, Claim(4, {JOBS: [0]}))})
    assert shares["new"].partitions == {TopicPartition(JOBS, 0)}
    assert shares["former"].partitions == {TopicPartition(JOBS, 1)}


def test_a_topic_goes_to_those_who_read_it() -> None:
    found: Members = {"a": ((JOBS,), None), "b": (BOTH, None)}
    shares = share({JOBS: [0, 1], BULK: [0, 1]}, found)
    assert {p.topic for p in shares["a"].partitions} == {JOBS}
    assert sum(p.topic == BULK for p in shares["b"].partitions) == 2


def test_user_data_of_others_is_no_claim_and_no_release() -> None:
    """Round robin sends none, and a sticky assignor its own."""
    for data in (b"", b"\x00\x00\x00\x01\x00\x04jobs", b"\xff\xfe", b"\x93\x01\x02\x03"):
        assert decode_claim(data) is None
        assert decode_release(data) == frozenset()


@given(st.sets(st.builds(TopicPartition, st.sampled_from(BOTH), st.integers(0, 99))), st.integers(-1, 99))
def test_user_data_comes_back_as_it_was_sent(partitions: set[TopicPartition], generation: int) -> None:
    claim = decode_claim(encode_claim(generation, partitions))
    assert claim is not None
    assert (claim.generation, owned(claim)) == (generation, partitions)
    assert decode_release(encode_release(partitions)) == partitions
