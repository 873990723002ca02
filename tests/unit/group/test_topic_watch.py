"""A topic that is deleted and made again is another one: its offsets, and what is in flight of it."""

from __future__ import annotations

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from aiokafka.structs import OffsetAndMetadata
from structlog.testing import capture_logs

from embedq_consumer.group import GroupCommits, topic_watch
from embedq_consumer.group.topic_watch import Start, mark, start_of, topic_id_of
from embedq_consumer.quarantine.custody import Custody, decode, encode
from tests.unit.group.test_hand_over import Group

A, B, OTHER = TopicPartition("jobs", 0), TopicPartition("jobs", 1), TopicPartition("bulk", 0)


@pytest.fixture(autouse=True)
def _each_commit_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_watch, "_EVERY_S", 0.0)


async def joined(group: Group, *partitions: TopicPartition, **ids: str) -> None:
    group.member.ids = dict(ids)
    group.member.assign(*partitions)
    await group.hand_over.step()


async def test_offsets_of_a_topic_that_is_gone_are_not_committed_to_the_one_made_anew() -> None:
    group = Group()
    group.hand_over.follow(["jobs", "bulk"], lambda: None)
    await joined(group, A, OTHER, jobs="old", bulk="same")
    in_flight = [group.ledger.begin(A, offset) for offset in range(30)]
    kept = group.ledger.begin(OTHER, 7)
    group.member.ids["jobs"] = "new"
    with capture_logs() as logs:
        for ticket in in_flight:
            group.ledger.finish(ticket)
        group.ledger.finish(kept)
        await group.committer.commit()
    assert group.member.commits == [{OTHER: 8}]
    assert [(line["event"], line["topic"], line["jobs_in_flight"]) for line in logs] == [
        ("topic_made_anew", "jobs", 0)
    ]
    assert group.value("topics_remade_total") == 1
    assert group.ownership.opening == {A}
    assert group.ownership.reading == {OTHER}

    await group.hand_over.step()
    await group.committer.commit()
    assert group.ledger.position(A) is None, "a broker deletes a topic's offsets with it"
    assert group.value("topics_remade_total") == 1, "counted once"


async def test_a_job_of_the_former_topic_that_is_answered_later_changes_nothing() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    late = group.ledger.begin(A, 0)
    group.member.ids["jobs"] = "new"
    await group.committer.commit()
    await group.hand_over.step()
    assert not group.ledger.finish(late)
    assert group.ledger.committable() == {}


async def test_what_was_committed_of_the_former_topic_says_nothing_of_where_the_new_one_begins() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    group.ledger.finish(group.ledger.begin(A, 29))
    await group.committer.commit()
    assert group.member.stored == {A: 30}

    after = Group()
    after.member.stored, after.member.metadata = group.member.stored, group.member.metadata
    with capture_logs() as logs:
        await joined(after, A, jobs="new")
    assert after.ledger.position(A) == 0
    assert "topic_made_anew" in [line["event"] for line in logs]
    await after.committer.commit()
    assert after.member.stored == {A: 0}, "or others would see no lag"
    assert topic_id_of(after.member.metadata[A]) == "new"


async def test_a_partition_that_is_given_up_anyway_is_not_opened_again() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    group.ledger.begin(A, 0)
    group.member.assign(release=[A])
    group.member.ids["jobs"] = "new"
    await group.committer.commit()
    await group.hand_over.step()
    assert group.ledger.partitions == frozenset()
    assert group.member.commits == []
    assert "rejoin" in group.member.calls


async def test_a_topic_that_is_not_there_or_has_no_id_changes_nothing() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    epoch = group.ledger.epoch(A)
    group.member.ids = {}
    await group.committer.commit()
    group.member.ids = {"jobs": "old"}
    await group.committer.commit()
    assert group.ledger.epoch(A) == epoch


async def test_an_id_that_becomes_known_later_is_that_of_the_offsets() -> None:
    group = Group()
    await joined(group, A)
    group.member.ids = {"jobs": "its"}
    await group.committer.commit()
    assert group.ledger.topic_id(A) == "its"
    group.member.ids = {"jobs": "another"}
    await group.committer.commit()
    assert group.ownership.opening == {A}


async def test_a_broker_that_lags_behind_does_not_bring_a_topic_back() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    for its in ("new", "old", "new"):
        group.member.ids = {"jobs": its}
        await group.committer.commit()
        await group.hand_over.step()
    assert group.value("topics_remade_total") == 1
    assert group.ledger.topic_id(A) == "new"


async def test_brokers_that_do_not_say_it_cost_no_commit() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    group.ledger.finish(group.ledger.begin(A, 0))
    group.member.id_errors = [KafkaConnectionError()]
    with capture_logs() as logs:
        assert await group.committer.commit()
    assert group.member.commits == [{A: 1}]
    assert [line["event"] for line in logs] == ["topic_ids_unknown"]


async def test_the_ids_are_asked_for_now_and_then_and_not_with_each_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topic_watch, "_EVERY_S", 3600.0)
    group = Group()
    await joined(group, A, jobs="its")
    for _ in range(5):
        await group.committer.commit()
    assert group.member.calls.count("topic_ids") == 1


async def test_offsets_for_a_transaction_are_known_to_be_of_the_present_topic() -> None:
    group = Group()
    await joined(group, A, jobs="old")
    group.ledger.begin(A, 0)
    sealed = await group.committer.sealed({A: 1})
    assert sealed is not None
    assert topic_id_of(sealed[1][A].metadata) == "old"
    group.member.ids["jobs"] = "new"
    assert await group.committer.sealed({A: 1}) is None
    group.member.id_errors = [KafkaConnectionError()]
    await group.hand_over.step()
    await group.hand_over.step()
    group.member.id_errors = [KafkaConnectionError()]
    with pytest.raises(KafkaConnectionError):
        await group.committer.sealed({A: 1})


async def test_suspicions_of_the_former_topic_are_forgotten_with_it() -> None:
    group = Group()
    await joined(group, A, B, jobs="new")
    suspicious = Custody(owner="dead", replica="one", span=8)
    group.member.stored = {A: 5, B: 5}
    group.member.metadata = {A: encode(suspicious, "old"), B: encode(suspicious, "new")}

    async def ends(partitions: object) -> dict[TopicPartition, int]:
        return {}

    commits = GroupCommits(group.member, group.ledger, group.committer, ends)
    assert await commits.read([A, B]) == {A: (None, ""), B: (5, encode(suspicious, "new"))}


@pytest.mark.parametrize(
    "metadata", ["", "{", "[]", "17", "its own words", '{"owner":"me"}', '{"topic_id":7}']
)
def test_metadata_that_says_nothing_of_a_topic_is_taken_as_it_always_was(metadata: str) -> None:
    assert topic_id_of(metadata) == ""
    assert start_of(OffsetAndMetadata(7, metadata), "new") == Start(offset=7, topic_id="new")


def test_both_rooms_read_their_part_of_the_metadata() -> None:
    custody = Custody(owner="me", replica="one", span=8)
    text = encode(custody, "id")
    assert (topic_id_of(text), decode(text)) == ("id", custody)
    assert encode(Custody(), "id") == mark("id")
    assert encode(Custody()) == mark("") == ""
