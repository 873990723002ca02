"""A job's headers: whose name counts, what is echoed, what is refused."""

from __future__ import annotations

from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared import headers, topics
from embedq_shared.headers import client_of, parse, reply_partition_bytes, value_of
from embedq_shared.messages import Control

KNOWN = (
    *topics.CORRELATION,
    *topics.REPLY_TOPIC,
    *topics.REPLY_PARTITION,
    *topics.TRACE,
    topics.DEADLINE,
    topics.CLIENT,
    topics.CONTENT_TYPE,
)
SPRING_ID = bytes(range(240, 256))  # 16 raw bytes, not valid UTF-8


def test_a_record_without_headers_is_a_plain_json_job() -> None:
    found = parse([])
    assert found == headers.JobHeaders()
    assert (found.content_type, found.echo, found.reply_topic, found.deadline_ms) == (None, (), None, None)


# -- correlation and trace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", topics.CORRELATION)
@pytest.mark.parametrize("value", [SPRING_ID, b"7d0c2f6e-0f58-4f0c-9a3a-6a1f5f1f2f10", b"\x00" * 12, b""])
def test_a_correlation_id_is_echoed_byte_for_byte_under_its_own_name(name: str, value: bytes) -> None:
    assert parse([(name, value)]).echo == ((name, value),)


def test_every_family_of_correlation_id_is_echoed() -> None:
    ids = [(name, name.encode()) for name in reversed(topics.CORRELATION)]
    assert set(parse(ids).echo) == set(ids)


def test_the_trace_is_echoed_and_nothing_else() -> None:
    trace = [("traceparent", b"00-1-2-01"), ("tracestate", b"a=b")]
    others = [
        ("reply-topic", b"embed.replies"),
        ("REPLY_TOPIC", b"embed.replies"),
        ("reply-partition", reply_partition_bytes(1)),
        ("deadline", b"1"),
        ("content-type", b"application/json"),
        ("__TypeId__", b"com.example.Job"),
        ("my-own", b"x"),
    ]
    assert parse([*trace, *others]).echo == tuple(trace)


def test_of_a_repeated_header_the_last_counts() -> None:
    found = parse(
        [
            ("correlation-id", b"old"),
            ("reply-topic", b"old"),
            ("deadline", b"1"),
            ("content-type", b"text/plain"),
            ("correlation-id", b"new"),
            ("reply-topic", b"new"),
            ("deadline", b"2"),
            ("content-type", b"application/msgpack"),
        ]
    )
    assert found.echo == (("correlation-id", b"new"),)
    assert (found.reply_topic, found.deadline_ms) == ("new", 2)
    assert found.content_type == b"application/msgpack"


def test_a_wrong_older_header_does_no_harm() -> None:
    found = parse(
        [("reply-topic", b"\xff"), ("deadline", b"soon"), ("reply-topic", b"new"), ("deadline", b"2")]
    )
    assert (found.bad_address, found.bad_deadline) == (None, None)
    assert (found.reply_topic, found.deadline_ms) == ("new", 2)


@pytest.mark.parametrize(
    "names",
    [("content-type", "Content-Type"), ("CONTENT-TYPE", "content-type"), ("Content-Type", "Content-Type")],
)
def test_the_last_content_type_counts_in_whatever_case(names: tuple[str, str]) -> None:
    assert parse([(names[0], b"a"), ("x", b"y"), (names[1], b"b")]).content_type == b"b"


# -- reply address ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "read"), [(topics.REPLY_TOPIC, "reply_topic"), (topics.REPLY_PARTITION, "reply_partition")]
)
def test_our_name_comes_before_springs_and_springs_before_smallryes(
    family: tuple[str, ...], read: str
) -> None:
    values = {name: n for n, name in enumerate(family)}
    given = [
        (name, f"t{n}".encode() if read == "reply_topic" else reply_partition_bytes(n))
        for name, n in values.items()
    ]
    for first in range(len(family)):
        found = getattr(parse(given[first:][::-1]), read)
        assert found == (f"t{first}" if read == "reply_topic" else first)


def test_each_field_looks_for_its_own_family() -> None:
    found = parse([("REPLY_TOPIC", b"answers"), ("kafka_replyPartition", reply_partition_bytes(3))])
    assert (found.reply_topic, found.reply_partition) == ("answers", 3)


def test_a_partition_may_come_without_a_topic() -> None:
    found = parse([("reply-partition", reply_partition_bytes(5))])
    assert (found.reply_topic, found.reply_partition, found.bad_address) == (None, 5, None)


@pytest.mark.parametrize(
    "topic",
    [
        b"",
        b"\xff\xfe",
        "ответы".encode(),
        b"a b",
        b"a/b",
        b".",
        b"..",
        b"a\x00",
        b"x" * 250,
        "a\u2028".encode(),
    ],
)
@pytest.mark.parametrize("name", topics.REPLY_TOPIC)
def test_a_name_that_no_topic_can_have_is_a_bad_address(name: str, topic: bytes) -> None:
    bad = parse([(name, topic)]).bad_address
    assert bad is not None
    assert (bad.code, bad.param, bad.retryable) == ("invalid_header", name, False)


@pytest.mark.parametrize("topic", ["a", "embed.replies", "x" * 249, "A_b-c.9", "__consumer_offsets"])
def test_a_name_that_a_topic_can_have_is_read(topic: str) -> None:
    assert parse([("reply-topic", topic.encode())]).reply_topic == topic


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00", b"\x00\x00\x00", b"\x00" * 5, b"3", b"\x00" * 8, b"\xff\xff\xff\xff", b"\x80\x00\x00\x00"],
)
def test_a_partition_that_is_not_four_bytes_from_zero_up_is_a_bad_address(raw: bytes) -> None:
    found = parse([("reply-topic", b"answers"), ("reply-partition", raw)])
    assert found.bad_address is not None
    assert (found.bad_address.code, found.bad_address.param) == ("invalid_header", "reply-partition")
    assert (found.reply_topic, found.reply_partition) == (None, None)


@pytest.mark.parametrize(
    "name", ["content-type", "deadline", *topics.CORRELATION, *topics.REPLY_TOPIC, *topics.REPLY_PARTITION]
)
def test_a_null_header_is_none(name: str) -> None:
    """Whatever it is, and also after one with a value: the last one counts."""
    assert parse([(name, None)]) == headers.JobHeaders()
    assert parse([(name, b"\x00\x00\x00\x01"), (name, None)]) == headers.JobHeaders()


def test_a_null_header_leaves_another_familys_to_count() -> None:
    found = parse([("reply-topic", None), ("kafka_replyTopic", b"answers")])
    assert (found.reply_topic, found.topic_header) == ("answers", "kafka_replyTopic")


@pytest.mark.parametrize("name", topics.REPLY_TOPIC)
def test_an_address_keeps_the_name_under_which_it_came(name: str) -> None:
    found = parse([(name, b"answers"), ("REPLY_PARTITION", reply_partition_bytes(3))])
    assert (found.topic_header, found.partition_header, found.address_header) == (
        name,
        "REPLY_PARTITION",
        name,
    )
    alone = parse([("REPLY_PARTITION", reply_partition_bytes(3))])
    assert (alone.topic_header, alone.address_header) == (None, "REPLY_PARTITION")


@given(st.integers(0, 2**31 - 1))
def test_a_partition_survives_its_encoding(partition: int) -> None:
    raw = reply_partition_bytes(partition)
    assert raw == partition.to_bytes(4, "big")
    assert parse([("kafka_replyPartition", raw)]).reply_partition == partition


# -- whose job it is --------------------------------------------------------------------------------------------------


def test_a_client_is_who_says_so_else_who_is_answered_at_one_address_else_everybody() -> None:
    replies = [("reply-topic", b"replies"), ("reply-partition", reply_partition_bytes(1))]
    spring = [("kafka_replyTopic", b"replies"), ("kafka_replyPartition", reply_partition_bytes(1))]
    other = [("reply-topic", b"replies"), ("reply-partition", reply_partition_bytes(2))]
    assert client_of([("client-id", b"me"), *replies]) == client_of([*other, ("client-id", b"me")])
    assert client_of([("client-id", b"me")]) != client_of([("client-id", b"you")])
    assert client_of(replies) == client_of(spring)
    assert len({client_of(each) for each in (replies, other, [("client-id", b"replies")], [])}) == 4
    assert client_of([("key", b"a")]) == client_of([("client-id", b"")]) == client_of([]) == b""


def test_of_several_client_ids_the_last_counts_and_of_a_long_one_its_beginning() -> None:
    assert client_of([("client-id", b"old"), ("client-id", b"new")]) == client_of([("client-id", b"new")])
    assert len(client_of([("client-id", b"x" * 100_000)])) < 300


@given(st.lists(st.tuples(st.sampled_from(KNOWN), st.one_of(st.none(), st.binary(max_size=300)))))
def test_whatever_the_headers_are_there_is_a_client(found: list[tuple[str, bytes | None]]) -> None:
    assert len(client_of(found)) < 600


# -- deadline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "deadline"),
    [(b"0", 0), (b"1767225600000", 1767225600000), (b"0001", 1), (b"9223372036854775807", 2**63 - 1)],
)
def test_a_deadline_is_epoch_milliseconds_in_decimal(raw: bytes, deadline: int) -> None:
    assert parse([("deadline", raw)]).deadline_ms == deadline


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" 1",
        b"1 ",
        b"-1",
        b"+1",
        b"1.5",
        b"1e3",
        b"1_000",
        b"0x10",
        b"soon",
        "١٢٣".encode(),
        b"\xb2",
        b"1\x00",
        b"9223372036854775808",
        b"9" * 5000,
    ],
)
def test_any_other_deadline_is_an_invalid_header(raw: bytes) -> None:
    found = parse([("deadline", raw)])
    assert found.deadline_ms is None
    assert found.bad_address is None
    assert found.bad_deadline is not None
    assert (found.bad_deadline.code, found.bad_deadline.param) == ("invalid_header", "deadline")


def test_a_bad_deadline_leaves_the_address_usable() -> None:
    found = parse([("reply-topic", b"answers"), ("deadline", b"soon")])
    assert found.reply_topic == "answers"
    assert found.bad_deadline is not None


# -- whatever comes ---------------------------------------------------------------------------------------------------


names = st.sampled_from(KNOWN) | st.text(max_size=10)
values = st.none() | st.binary(max_size=24) | st.sampled_from([b"1", b"embed.replies", b"\x00\x00\x00\x01"])


@given(st.lists(st.tuples(names, values), max_size=12))
def test_no_headers_raise_and_every_echo_is_the_last_value(given: list[tuple[str, bytes | None]]) -> None:
    found = parse(given)
    last = {name: value for name, value in dict(given).items() if value is not None}
    echoed = {name for name in (*topics.CORRELATION, *topics.TRACE) if name in last}
    assert dict(found.echo) == {name: last[name] for name in echoed}
    assert len(found.echo) == len(echoed)


_NAMES = ("content-type", "Content-Type", "CONTENT-TYPE", "correlation-id", "traceparent", "x-something")


@given(st.lists(st.tuples(st.sampled_from(_NAMES), st.none() | st.binary(max_size=2)), max_size=8))
def test_of_headers_that_come_again_and_again_the_last_counts(
    headers: list[tuple[str, bytes | None]],
) -> None:
    found = parse(headers)
    types = [value for name, value in headers if name.lower() == "content-type"]
    assert found.content_type == (types[-1] if types else None)
    last = {name: value for name, value in headers if name in ("correlation-id", "traceparent")}
    assert dict(found.echo) == {name: value for name, value in last.items() if value is not None}


@given(st.sampled_from(KNOWN))
def test_an_error_never_repeats_a_value(name: str) -> None:
    canary = b"kanarie 4711"
    found = parse([(name, canary)])
    for error in (found.bad_address, found.bad_deadline):
        assert error is None or ("kanarie" not in error.message and "4711" not in error.message)


def test_value_of_reads_the_last_one() -> None:
    found = [("a", b"1"), ("b", b"2"), ("a", b"3")]
    assert (value_of(found, "a"), value_of(found, "b"), value_of(found, "c")) == (b"3", b"2", None)


# -- topics -----------------------------------------------------------------------------------------------------------


def test_the_topics_below_a_prefix() -> None:
    found = topics.Topics("team.embed")
    assert found.lanes == ("team.embed.jobs", "team.embed.jobs.bulk")
    rest = (found.results, found.replies, found.control, found.status, found.dead_letters)
    assert rest == tuple(f"team.embed.{name}" for name in ("results", "replies", "control", "status", "dlq"))
    assert (found.retry(1), found.group(), found.group("ours")) == ("team.embed.retry.1", "embedq", "ours")


def test_a_pool_has_lanes_retry_topics_and_a_group_of_its_own_and_shares_the_rest() -> None:
    one, big = topics.Topics("e"), topics.Topics("e").of("big")
    assert big.lanes == ("e.jobs.big", "e.jobs.big.bulk")
    assert [big.lane(lane) for lane in topics.LANES] == list(big.lanes)
    assert (big.retry(2), big.group(), big.group("ours")) == ("e.retry.big.2", "embedq.big", "ours.big")
    for shared in ("results", "replies", "control", "status", "dead_letters"):
        assert getattr(big, shared) == getattr(one, shared)
    assert big.of(None) == one
    assert big.retries_among({"e.retry.1", "e.retry.big.2", "e.retry.big.1"}) == [
        "e.retry.big.1",
        "e.retry.big.2",
    ]


POOLS: Final = st.from_regex(topics.POOL_NAME, fullmatch=True)


@given(one=st.none() | POOLS, other=st.none() | POOLS)
def test_two_pools_never_share_a_topic_of_their_own(one: str | None, other: str | None) -> None:
    def own(pool: str | None) -> set[str]:
        found = topics.Topics("e", pool)
        return {*found.lanes, found.group(), *(found.retry(tier) for tier in range(1, 9))}

    assert one == other or own(one).isdisjoint(own(other))
    assert all(topics.is_topic_name(name) for name in own(one))


@given(pools=st.sets(POOLS, max_size=5), others=st.sets(st.text(max_size=20)))
def test_pools_are_found_among_the_topics_by_both_of_their_lanes(pools: set[str], others: set[str]) -> None:
    names = {lane for pool in [None, *pools] for lane in topics.Topics("e", pool).lanes}
    beside = {f"f.jobs.{name}" for name in others} | {"e.jobs.", "e.jobs.half.bulk", "e.jobs.a.b.bulk"}
    assert topics.Topics("e").pools_among(names | beside) == sorted(pools)


@pytest.mark.parametrize("name", ["bulk", "a.b", "a b", "x" * 65, "ä", "a\n", "a/b"])
def test_a_pool_has_a_name_that_is_no_other_topics(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        topics.pool_named(name)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"alias": "a", "version": 1, "path": "p", "command_id": "c", "pool": name}, Control)


def test_people_call_the_pool_without_a_name_default() -> None:
    assert [topics.pool_named(name) for name in ("", "default", "big")] == [None, None, "big"]


@pytest.mark.parametrize(
    ("topic", "internal"),
    [
        ("embed.jobs", True),
        ("embed.jobs.bulk", True),
        ("embed.control", True),
        ("embed.status", True),
        ("embed.dlq", True),
        ("embed.retry", True),
        ("embed.retry.30s", True),
        (topics.Topics().retry(1), True),
        ("__consumer_offsets", True),
        ("__", True),
        ("embed.results", False),
        ("embed.replies", False),
        ("embed.retrying", False),
        ("embed.jobs.mine", True),
        (topics.Topics(pool="big").bulk, True),
        (topics.Topics(pool="big").retry(1), True),
        ("embed.jobsworth", False),
        ("_answers", False),
        ("jobs", False),
    ],
)
def test_results_never_go_where_they_would_loop(topic: str, internal: bool) -> None:
    assert topics.Topics().is_internal(topic) is internal
