"""Who gets which partition: sticky, balanced, and never from hand to hand. Pure, run by the group's leader.

A partition that must move is first given to nobody. Its owner goes on as its only owner until what it took is answered and
committed, gives it up, and asks for another rebalance; only then it is given on (the idea of KIP-429). So a rebalance
takes nothing from anybody who works on it, and two of them settle any change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from embedq_shared.kafka import TopicPartition

ByTopic = dict[str, list[int]]


class Claim(msgspec.Struct, frozen=True):
    """A member's user data: what it owns, and since which generation it has known that."""

    generation: int
    owned: ByTopic


class Release(msgspec.Struct, frozen=True):
    """The user data of a member's assignment: what it owns still, and shall give up."""

    release: ByTopic


class Share(msgspec.Struct, frozen=True):
    """One member's part: what it may read, and what it shall give up."""

    partitions: frozenset[TopicPartition]
    release: frozenset[TopicPartition]


def encode_claim(generation: int, owned: Iterable[TopicPartition]) -> bytes:
    """For the JoinGroup."""
    return msgspec.msgpack.encode(Claim(generation, _by_topic(owned)))


def decode_claim(data: bytes) -> Claim | None:
    """None for a member that hands nothing over: one that gives up all it has before it joins, as round robin's do."""
    try:
        return msgspec.msgpack.decode(data, type=Claim)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def encode_release(partitions: Iterable[TopicPartition]) -> bytes:
    """For the SyncGroup."""
    return msgspec.msgpack.encode(Release(_by_topic(partitions)))


def decode_release(data: bytes) -> frozenset[TopicPartition]:
    """Empty where the leader knows no such thing: then what is not assigned is lost."""
    try:
        found = msgspec.msgpack.decode(data, type=Release).release
    except (msgspec.DecodeError, UnicodeDecodeError):
        return frozenset()
    return frozenset(_partitions(found))


def share(
    partitions: Mapping[str, Sequence[int]], members: Mapping[str, tuple[Collection[str], Claim | None]]
) -> dict[str, Share]:
    """Each member's share, from the topics it reads and its claim.

    Invariants:
        - No partition is given to two members, nor to a new owner while another member claims it.
        - Of each topic, members that read it are to have equally many, or one more; and so of all topics together.
        - What a member owns it keeps, as far as that allows.
        - Where all claims follow the last shares, nothing changes; and once what is to be released is, the next round
          gives every partition to somebody.
    """
    owner_of = _owners(members)
    extra = dict.fromkeys(members, 0)
    kept: dict[str, set[TopicPartition]] = {member: set() for member in members}
    released: dict[str, set[TopicPartition]] = {member: set() for member in members}
    for topic in sorted(partitions):
        readers = sorted(member for member, (topics, _) in members.items() if topic in topics)
        if readers:
            target = _target(topic, partitions[topic], readers, owner_of, extra)
            for partition, member in target.items():
                owner = owner_of.get(partition)
                if owner is None or owner == member:
                    kept[member].add(partition)
                else:
                    released[owner].add(partition)
    return {member: Share(frozenset(kept[member]), frozenset(released[member])) for member in members}


def _owners(members: Mapping[str, tuple[Collection[str], Claim | None]]) -> dict[TopicPartition, str]:
    """Who owns each partition: of several claims the newest is true, the others slept through what happened since."""
    newest: dict[TopicPartition, tuple[int, str]] = {}
    for member, (_, claim) in sorted(members.items()):
        if claim is None:
            continue
        for partition in _partitions(claim.owned):
            if partition not in newest or claim.generation > newest[partition][0]:
                newest[partition] = claim.generation, member
    return {partition: member for partition, (_, member) in newest.items()}


def _target(
    topic: str,
    numbers: Sequence[int],
    readers: Sequence[str],
    owner_of: Mapping[TopicPartition, str],
    extra: dict[str, int],
) -> dict[TopicPartition, str]:
    """Who shall have each partition of one topic in the end. Counts in `extra` who got one more than others, of any topic."""
    least, more = divmod(len(numbers), len(readers))
    owned: dict[str, list[TopicPartition]] = {member: [] for member in readers}
    free: list[TopicPartition] = []
    for number in numbers:
        partition = TopicPartition(topic, number)
        owned.get(owner_of.get(partition, ""), free).append(partition)
    # One more goes to those who got it for fewer topics so far; among them to those who have it already; and among these
    # to those who have least of all topics, since another one may owe theirs to another topic.
    all_owned = Counter(owner_of.values())

    def reluctance(member: str) -> tuple[int, bool, int, str]:
        has_it = len(owned[member]) > least
        return extra[member], not has_it, all_owned[member] if has_it else 0, member

    generous = sorted(readers, key=reluctance)[:more]
    for member in generous:
        extra[member] += 1
    quota = {member: least + (member in generous) for member in readers}
    target: dict[TopicPartition, str] = {}
    for member, mine in owned.items():
        free += mine[quota[member] :]
        target |= dict.fromkeys(mine[: quota[member]], member)
    wanting = (member for member in readers for _ in range(quota[member] - len(owned[member])))
    return target | dict(zip(sorted(free), wanting, strict=True))


def _by_topic(partitions: Iterable[TopicPartition]) -> ByTopic:
    found: ByTopic = {}
    for partition in sorted(partitions):
        found.setdefault(partition.topic, []).append(partition.partition)
    return found


def _partitions(found: ByTopic) -> Iterable[TopicPartition]:
    return (TopicPartition(topic, number) for topic, numbers in found.items() for number in numbers)
