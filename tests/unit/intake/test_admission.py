"""Which records are jobs, and how the others are answered."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine.text.prompts import prompt_for
from embedq_consumer.intake.admission import Admitted, Rejection, UnknownAddress
from embedq_consumer.intake.jobs import JobState, input_param
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import datum_bytes, fixed_bytes, held_bytes
from embedq_shared import codec
from embedq_shared.fleet import Splits
from embedq_shared.messages import Chunking, Job, Split
from tests.helpers.in_flight import NOW_MS, PARTITIONS, TOPICS, VERSION, Model, admitted, record, rules

REPLIES = ("reply-topic", TOPICS.replies.encode())


def admit(found: Record, model: Model | None = None, alias: str = "default", **settings: Any) -> Admitted:
    return rules(**settings).admit(found, {alias: model or Model()}, NOW_MS, PARTITIONS.get)


def rejected(found: Record, model: Model | None = None, alias: str = "default", **settings: Any) -> Rejection:
    answer = admit(found, model, alias, **settings)
    assert isinstance(answer, Rejection)
    return answer


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_every_default_is_filled_in() -> None:
    job = admitted(input="a")
    request = job.request
    assert (request.id, request.model, request.texts, request.listed) == (
        "t.jobs-3-7",
        "default",
        ["a"],
        False,
    )
    assert (request.dimensions, request.dtype, request.encoding, request.truncate) == (
        256,
        "float32",
        "float",
        "error",
    )
    assert (request.prompt, bytes(request.metadata), request.format) == ("", b"null", "json")
    assert job.remaining == 1


def test_a_job_keeps_the_encoder_that_it_was_accepted_for() -> None:
    model = Model()
    assert admitted(model=model, input="a").encoder is model


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "always: "),
        ({"input_type": "query"}, "Q: "),
        ({"input_type": "document"}, "D: "),
        ({"instruction": "find"}, "Instruct: find\nQuery:"),
        ({"instruction": "find", "input_type": "query"}, "Instruct: find\nQuery:"),
        ({"instruction": ""}, "Instruct: \nQuery:"),
    ],
)
def test_the_prompt_of_a_text_follows_from_the_job_and_the_model(fields: dict[str, Any], prompt: str) -> None:
    model = Model(default_prompt="always: ")
    job = codec.decode_job(json.dumps({"input": "a"} | fields).encode(), "json")
    assert prompt_for(job, model) == prompt


def test_an_input_type_without_a_prompt_adds_nothing() -> None:
    model = Model(default_prompt="always: ")
    model.prompts = {}
    assert admitted(model=model, input="a", input_type="query").request.prompt == ""


def test_an_input_is_named_by_its_place_in_a_list() -> None:
    assert input_param(admitted(input="a").request, 0) == "input"
    assert input_param(admitted(input=["a", "b"]).request, 1) == "input[1]"


# -- limits of the model and the service ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"dimensions": 257}, "invalid_value", "dimensions"),
        ({"model": "other"}, "unknown_model", "model"),
        ({"model": ""}, "unknown_model", "model"),
    ],
)
def test_a_job_that_this_model_cannot_run(fields: dict[str, Any], code: str, param: str) -> None:
    found = rejected(record(input="a", id="x", metadata={"a": 1}, **fields))
    assert (found.error.code, found.error.param, found.error.retryable) == (code, param, False)
    assert (found.envelope.id, bytes(found.envelope.metadata)) == ("x", b'{"a": 1}')
    assert (found.dead_letter, found.reply) == (False, True)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"mode": "late"}, Chunking("late", 256)),
        ({"mode": "late", "tokens": 8}, Chunking("late", 8)),
        ({"mode": "late", "tokens": 10**30}, Chunking("late", 512)),
        ({"mode": "mean"}, Chunking("mean", 512)),
        ({"mode": "mean", "tokens": 512}, Chunking("mean", 512)),
        ({"mode": "mean", "tokens": 100}, Chunking("mean", 100)),
        (None, None),
    ],
)
def test_chunks_have_a_length_that_the_model_takes(asked: Any, found: Chunking | None) -> None:
    assert admitted(input="a", chunk=asked).request.chunk == found


def test_only_a_model_that_pools_its_first_token_rejects_late_chunks() -> None:
    cls = Model(late_chunks=False)
    found = rejected(record(input="a", chunk={"mode": "late"}), cls)
    assert (found.error.code, found.error.param) == ("invalid_value", "chunk.mode")
    assert isinstance(admit(record(input="a", chunk={"mode": "mean"}), cls), JobState)


def test_a_jobs_memory_counts_its_spans_up_to_what_a_job_may_have() -> None:
    def held(text: str | list[str], **fields: Any) -> int:
        job = admitted(input=text, dimensions=32, **fields)
        return held_bytes(job.request, 256) // max(datum_bytes(job.request), 8 * 256)

    late = {"mode": "late", "tokens": 8}
    assert held("a" * 600, chunk=late) == 101
    assert held(["a" * 600, "ü" * 600], chunk=late) == 101 + 401
    assert held("a" * 600, chunk={"mode": "late"}) == 4
    assert held("a" * 600_000, chunk=late) == 2048
    assert held(["a" * 600_000] * 3, chunk={"mode": "mean"}) == 3
    plain = admitted(input=["a"] * 7)
    assert held_bytes(plain.request, 256) == 7 * datum_bytes(plain.request)


def test_binary_needs_a_multiple_of_8_even_where_the_model_decides() -> None:
    assert rejected(record(input="a", dtype="binary"), Model(hidden_size=100)).error.param == "dimensions"
    assert isinstance(admit(record(input="a", dtype="binary"), Model(hidden_size=104)), JobState)


def test_of_jobs_that_are_admitted_the_interactive_ones_are_heard_of() -> None:
    heard: list[Job] = []
    for found in (
        record(input="a"),
        record(input="b", dimensions=100_000),
        msgspec.structs.replace(record(input="c"), lane="bulk"),
    ):
        admit(found, note_use=lambda alias, job: heard.append(job))
    assert [job.input for job in heard] == ["a"]


def test_another_alias_is_another_name_for_the_one_model() -> None:
    assert isinstance(admit(record(input="a", model="large"), alias="large"), JobState)
    assert rejected(record(input="a"), alias="large").error.code == "unknown_model"


def test_each_alias_has_its_own_model_and_limits() -> None:
    models = {"default": Model(), "small": Model(hidden_size=64)}
    asked: list[tuple[str, int]] = []

    def admitted_by(alias: str | None, **fields: Any) -> Admitted:
        of = rules(note_dimensions=lambda *found: asked.append(found))
        return of.admit(record(input="a", model=alias, **fields), models, NOW_MS, PARTITIONS.get)

    for alias, served in ((None, "default"), ("default", "default"), ("small", "small")):
        job = admitted_by(alias)
        assert isinstance(job, JobState)
        assert (job.encoder, job.alias, job.request.model) == (models[served], served, served)
    too_long = admitted_by("small", dimensions=128)
    assert isinstance(too_long, Rejection)
    assert "from 32 to 64" in too_long.error.message
    assert isinstance(admitted_by("default", dimensions=128), JobState)
    assert asked == [("default", 128)]
    unknown = admitted_by("other")
    assert isinstance(unknown, Rejection)
    assert (unknown.error.code, unknown.error.message) == (
        "unknown_model",
        "`model`: expected one of the model aliases served here, 'default', 'small'",
    )


def test_a_job_of_a_split_is_run_by_its_share_and_says_the_name_that_it_came_by() -> None:
    old, new = Model(), Model(hidden_size=64)
    new.model_version = "sha256:new"
    models = {"old": old, "new": new}
    splits, noted = Splits(), list[str]()
    weights = Split(alias="ab", version=1, command_id="c", split={"old": 1, "new": 1})
    splits.see(b"ab", codec.encode_record(weights))
    of = rules(share_of=splits.target, note_dimensions=lambda alias, dimensions: noted.append(alias))

    def run(**fields: Any) -> Admitted:
        return of.admit(record(input="a", **fields), models, NOW_MS, PARTITIONS.get)

    aliases = set()
    for number in range(40):
        job = run(model="ab", id=f"{number}", dimensions=32)
        assert isinstance(job, JobState)
        assert job.alias == splits.target("ab", f"{number}") == noted[-1]
        assert (job.encoder, job.request.model) == (models[job.alias], "ab")
        aliases.add(job.alias)
    assert aliases == {"old", "new"}
    nameless = run(model="ab")
    assert isinstance(nameless, JobState)
    assert nameless.alias == splits.target("ab", "t.jobs-3-7"), "its place, which a repeat has too"
    for number in range(10):
        pinned = run(model="ab", id=f"{number}", model_version="sha256:new")
        assert isinstance(pinned, JobState)
        assert pinned.encoder is new, "a pin says whose it is"
    refused = run(model="ab", model_version="sha256:other")
    assert isinstance(refused, Rejection)
    assert refused.error.code == "unknown_model_version"
    del models["new"]
    codes = set()
    for number in range(20):
        found = run(model="ab", id=f"{number}")
        if isinstance(found, Rejection):
            codes.add((found.error.code, found.error.message.partition(";")[2]))
    assert codes == {("unknown_model", " the split that it names has one that is not")}


def test_a_job_of_another_pools_alias_is_told_where_it_should_go() -> None:
    lives = {"large": "big", "small": None}
    of = rules(pool_of=lambda alias, id: lives.get(alias))

    def said(alias: str, lane: Any = "interactive") -> str:
        job = msgspec.structs.replace(record(input="a", model=alias), lane=lane)
        found = of.admit(job, {"ours": Model()}, NOW_MS, PARTITIONS.get)
        assert isinstance(found, Rejection)
        assert (found.error.code, found.error.retryable) == ("unknown_model", False)
        return found.error.message.partition(";")[2]

    assert said("large") == " another pool serves this one: its jobs go to the topic t.jobs.big"
    assert said("large", "bulk").endswith(" t.jobs.big.bulk")
    assert said("small") == said("nobody's") == ""


def test_a_pinned_job_is_run_by_that_version_alone() -> None:
    other = "sha256:" + "cd" * 32
    assert isinstance(admit(record(input="a", model_version=VERSION)), JobState)
    assert isinstance(admit(record(input="a", model_version=None)), JobState)
    found = rejected(record(input="a", id="x", model_version=other))
    assert (found.error.code, found.error.param, found.error.retryable) == (
        "unknown_model_version",
        "model_version",
        False,
    )
    assert found.error.message == f"`model_version`: expected {VERSION}, which 'default' has now"
    assert (found.model_version, found.envelope.id, found.dead_letter) == (VERSION, "x", False)


@pytest.mark.parametrize("pin", ["", "x" * 257, 7, ["a"]])
def test_a_pin_is_a_short_string(pin: Any) -> None:
    found = rejected(record(input="a", model_version=pin))
    assert (found.error.code, found.error.param) == ("invalid_value", "model_version")


def test_what_a_pinned_job_could_not_run_on_anyway_is_said_of_the_model_that_serves() -> None:
    """A wrong version comes before the model's own rules: they are another model's."""
    found = rejected(record(input="a", model_version="sha256:0", dimensions=10_000))
    assert found.error.code == "unknown_model_version"


@pytest.mark.parametrize("text", ["x" * 101, "ü" * 51, "月" * 34, "🛂" * 26])
def test_a_text_is_measured_in_bytes(text: str) -> None:
    limited = rules(max_text_bytes=100)
    error = limited.check_text(admitted(input=["a", text]).request, 1)
    assert error is not None
    assert (error.code, error.param) == ("text_too_long", "input[1]")
    assert limited.check_text(admitted(input=text[:-1]).request, 0) is None


def test_a_deadline_has_passed_when_it_is_now() -> None:
    for deadline, accepted in ((NOW_MS - 1, False), (NOW_MS, False), (NOW_MS + 1, True)):
        found = admit(record(None, ("deadline", b"%d" % deadline), input="a"))
        assert isinstance(found, JobState) is accepted
        if isinstance(found, Rejection):
            assert found.error.code == "expired"


def test_an_unreadable_deadline_is_answered_at_the_reply_address() -> None:
    found = rejected(record(None, ("deadline", b"soon"), REPLIES, input="a", id="x"))
    assert (found.error.code, found.error.param) == ("invalid_header", "deadline")
    assert (found.reply, found.dead_letter, found.headers.reply_topic) == (True, False, TOPICS.replies)


# -- results that never fit -------------------------------------------------------------------------------------------


def test_a_key_that_leaves_no_room_for_one_vector_is_rejected_before_compute() -> None:
    request = admitted(input="a").request
    plain = record(input="a")
    need = fixed_bytes(plain, admitted(input="a").headers, request) + datum_bytes(request)
    spare = 900_000 - need
    # Without a key, room is kept for the id in its place.
    assert isinstance(admit(record(input="a", key=b"k" * (spare + 4 * len(request.id)))), JobState)
    found = rejected(record(input="a", key=b"k" * (spare + 4 * len(request.id) + 1)))
    assert (found.error.code, found.error.param) == ("result_too_large", None)


@pytest.mark.parametrize(
    "name", ["correlation-id", "kafka_correlationId", "REPLY_CORRELATION_ID", "traceparent"]
)
def test_an_echoed_header_that_leaves_no_room_is_rejected_too(name: str) -> None:
    assert rejected(record(None, (name, b"x" * 900_000), input="a")).error.code == "result_too_large"
    assert isinstance(admit(record(None, ("whatever", b"x" * 900_000), input="a")), JobState)


# -- reply addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", [TOPICS.replies, TOPICS.results, "elsewhere"])
def test_a_known_topic_is_a_reply_address(topic: str) -> None:
    job = admitted(("reply-topic", topic.encode()), input="a")
    assert job.headers.reply_topic == topic


@pytest.mark.parametrize(
    "topic",
    [
        "t.jobs",
        "t.jobs.bulk",
        "t.control",
        "t.status",
        "t.dlq",
        "t.retry",
        "t.retry.1",
        "__consumer_offsets",
        "__x",
    ],
)
def test_a_reply_that_would_loop_is_forbidden(topic: str) -> None:
    found = rejected(record(None, ("reply-topic", topic.encode()), input="a", id="x"))
    assert (found.error.code, found.error.param) == ("invalid_header", "reply-topic")
    assert (found.dead_letter, found.reply, found.envelope.id) == (True, False, "x")
    assert topic not in found.error.message


def allowed(topic: str, *patterns: str) -> bool:
    found = admit(record(None, ("reply-topic", topic.encode()), input="a"), reply_patterns=patterns)
    return not isinstance(found, Rejection)


def test_patterns_allow_topics_but_never_our_own() -> None:
    assert allowed("elsewhere", "else*", "other")
    assert not allowed("elsewhere", "other-*")
    assert allowed(TOPICS.replies)
    assert allowed(TOPICS.results)
    assert not allowed(TOPICS.jobs, "*", "t.*")
    assert not allowed("elsewhere", "ELSE*")


def test_without_the_setting_replies_go_to_our_own_topics_alone() -> None:
    assert not allowed("elsewhere")
    found = rejected(record(None, ("reply-topic", b"elsewhere"), input="a", id="x"), reply_patterns=())
    assert (found.dead_letter, found.reply, found.envelope.id) == (True, False, "x")
    assert "`t.replies`, `t.results` or a topic that the service's setting `reply_topics` allows" in (
        found.error.message
    )
    assert "elsewhere" not in found.error.message


@pytest.mark.parametrize(
    "topic",
    [
        "_schemas",
        "_confluent-metrics",
        "connect-configs",
        "connect-offsets",
        "connect-status",
        "my-connect-configs",
        "mm2-offset-syncs.b.internal",
        "app-store-changelog",
        "app-keys-repartition",
        "other.control",
        "other.status",
        "other.dlq",
        "other.jobs",
        "other.jobs.bulk",
        "other.retry",
        "other.retry.1",
        "a.b.control",
    ],
)
def test_no_pattern_allows_a_topic_by_which_other_programs_work_but_its_own_name_does(topic: str) -> None:
    assert not allowed(topic, "*", f"{topic[:-1]}*", f"{topic[:3]}*", topic.replace("c", "?", 1) + "*")
    assert allowed(topic, "*", topic)


@pytest.mark.parametrize(
    "topic",
    ["team.replies", "other.results", "status", "controls", "a.controlled", "jobs-done", "x.jobs.done"],
)
def test_a_pattern_allows_what_only_looks_like_one(topic: str) -> None:
    assert allowed(topic, "*")


@pytest.mark.parametrize("topic", ["t.control", "t.dlq", "__consumer_offsets"])
def test_our_own_and_kafkas_topics_are_not_allowed_even_by_their_names(topic: str) -> None:
    assert not allowed(topic, "*", topic)


def test_a_topic_or_partition_not_seen_before_is_asked_for_first() -> None:
    for headers, param in (
        ([("reply-topic", b"new")], "reply-topic"),
        ([REPLIES, ("reply-partition", struct.pack(">i", 4))], "reply-partition"),
        ([("reply-partition", struct.pack(">i", 4))], "reply-partition"),
        ([("kafka_replyTopic", b"new")], "kafka_replyTopic"),
        ([("REPLY_TOPIC", b"new")], "REPLY_TOPIC"),
        ([REPLIES, ("kafka_replyPartition", struct.pack(">i", 4))], "kafka_replyPartition"),
        ([("REPLY_TOPIC", b"elsewhere"), ("REPLY_PARTITION", struct.pack(">i", 9))], "REPLY_PARTITION"),
    ):
        asked = record(None, *headers, input="a", id="x")
        found = admit(asked)
        assert isinstance(found, UnknownAddress)
        rejection = rules().unknown_address(asked, found)
        assert (rejection.error.code, rejection.error.param) == ("invalid_header", param)
        assert rejection.error.message.startswith(f"header `{param}`: expected ")
        assert (rejection.dead_letter, rejection.reply, rejection.envelope.id) == (True, False, "x")


@pytest.mark.parametrize("name", ["reply-topic", "kafka_replyTopic", "REPLY_TOPIC"])
def test_a_topic_that_is_not_allowed_is_named_by_the_header_that_it_came_in(name: str) -> None:
    found = rejected(record(None, (name, TOPICS.control.encode()), input="a"))
    assert (found.error.code, found.error.param) == ("invalid_header", name)
    assert found.error.message.startswith(f"header `{name}`: expected ")


def test_a_null_content_type_is_json_and_a_null_correlation_id_is_not_echoed() -> None:
    job = admitted(("content-type", None), ("correlation-id", None), input="a")
    assert (job.request.format, job.headers.echo) == ("json", ())


def test_a_bad_address_comes_before_anything_else_that_is_wrong() -> None:
    found = rejected(record(b"{", ("reply-topic", b""), ("content-type", b"text/plain"), ("deadline", b"1")))
    assert (found.error.code, found.error.param) == ("invalid_header", "reply-topic")
    assert (found.format, found.envelope.id) == ("json", None)


def test_an_unknown_content_type_is_answered_in_json_and_kept() -> None:
    found = rejected(record(None, ("content-type", b"text/plain"), input="a", id="x"))
    assert (found.error.code, found.format, found.dead_letter, found.reply) == (
        "unsupported_content_type", "json", True, True,
    )  # fmt: skip
    assert "text/plain" not in found.error.message


@pytest.mark.parametrize(("value", "kept"), [(b"{", True), (None, True), (b'{"input": 1}', False)])
def test_only_a_value_that_does_not_decode_is_kept(value: bytes | None, kept: bool) -> None:
    assert rejected(record(value)).dead_letter is kept


def test_a_late_chunk_on_a_request_without_chunks_has_no_size() -> None:
    request = msgspec.structs.replace(admitted(input="a").request, chunk=Chunking("late", None))
    with pytest.raises(RuntimeError, match="This is a bug"):
        held_bytes(request, 256)


@pytest.mark.parametrize(
    ("fields", "bytes_each"),
    [
        ({"dtype": "float32"}, 32 * 16),
        ({"dtype": "int8"}, 32 * 5),
        ({"dtype": "binary"}, 4 * 4),
        ({"dtype": "float32", "encoding_format": "base64"}, 172),
    ],
)
def test_a_vectors_bytes_are_those_of_its_longest_decimals_or_of_its_base64(
    fields: dict[str, Any], bytes_each: int
) -> None:
    assert datum_bytes(admitted(input="a", dimensions=32, **fields).request) == 192 + bytes_each


def test_in_msgpack_a_vector_takes_its_raw_bytes() -> None:
    value = codec.encode(Job(input="a", dimensions=32), "msgpack")
    found = admitted(("content-type", b"application/msgpack"), value=value)
    assert datum_bytes(found.request) == 192 + 32 * 4


def test_what_was_expected_is_said_in_the_error() -> None:
    for fields, message in (
        ({"dimensions": 300}, "`dimensions`: expected an integer from 32 to 256, the model's hidden size"),
        ({"model": "other"}, "`model`: expected 'default', the only model alias served here"),
    ):
        assert rejected(record(input="a", **fields)).error.message == message
    address = record(None, REPLIES, ("reply-partition", struct.pack(">i", 4)), input="a")
    unknown = admit(address)
    assert isinstance(unknown, UnknownAddress)
    assert unknown.error.message == (
        "header `reply-partition`: expected a number less than 4, the number of partitions of its topic"
    )


@given(
    st.binary(max_size=60) | st.none(),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "content-type",
                    "reply-topic",
                    "reply-partition",
                    "deadline",
                    "correlation-id",
                    "kafka_replyTopic",
                ]
            ),
            st.binary(max_size=12) | st.none() | st.sampled_from([b"application/msgpack", b"t.replies"]),
        ),
        max_size=4,
    ),
)
def test_no_record_makes_admission_raise(
    value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    found = record(value, *headers)
    answer = admit(found)
    if isinstance(answer, UnknownAddress):
        answer = rules().unknown_address(found, answer)
    if isinstance(answer, Rejection):
        assert answer.error.code not in ("internal", "overloaded")
