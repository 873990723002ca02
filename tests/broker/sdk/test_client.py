"""EmbedClient on a real Kafka, against a responder that keeps or breaks the contract on demand."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedq_sdk import (
    ClientClosed,
    DeadlineExceeded,
    EmbedClient,
    Expired,
    InternalError,
    InvalidArgument,
    InvalidJob,
    JobFailed,
    MixedModelVersions,
    Overloaded,
    PartialFailure,
    ServiceOverloaded,
    TextTooLong,
    TopicMissing,
    UnknownModel,
    UnreadableReply,
)
from embedq_shared.messages import Datum, ErrorBody
from tests.helpers.fake_service import NEW, OLD, Answer, Received, changed, expected, rows
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

Clients = Callable[..., EmbedClient]
Responders = Callable[..., Responder]


async def test_a_text_comes_back_as_its_vector(client: Clients, responder: Responders) -> None:
    async with responder(), client() as embedq:
        vector = await embedq.embed("hello")

    assert vector.dtype == np.float32
    assert np.array_equal(vector, expected("hello"))
    vector[0] = 1.0  # it is the caller's own array


async def test_a_list_comes_back_in_its_order(client: Clients, responder: Responders) -> None:
    texts = ["b", "a", "", "b", "日本語 🎉"]
    async with responder(), client() as embedq:
        assert np.array_equal(await embedq.embed(texts), rows(texts))


async def test_what_is_asked_for_is_what_is_sent(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        before = time.time()
        found = await embedq.embed_detailed(
            "x",
            model="m",
            dimensions=32,
            dtype="int8",
            input_type="query",
            instruction="find",
            truncate="end",
            metadata={"n": [1, {"k": None}]},
            timeout=20,
            lane="bulk",
            trace="00-aa-bb-01",
        )

    (job,) = other.received
    assert job.topic.endswith(".jobs.bulk")
    assert job.format == "msgpack"
    assert (job.job.model, job.job.dimensions, job.job.dtype) == ("m", 32, "int8")
    assert (job.job.input_type, job.job.instruction, job.job.truncate) == ("query", "find", "end")
    assert job.headers.deadline_ms == pytest.approx((before + 20) * 1000, abs=2000)
    assert job.headers.reply_partition == embedq.reply_partition
    echo = dict(job.headers.echo)
    assert len(echo["correlation-id"]) == 16
    assert echo["traceparent"] == b"00-aa-bb-01"
    assert found.metadata == {"n": [1, {"k": None}]}
    assert found.dimensions == 32
    assert found.vectors.dtype == np.float32
    assert np.abs(found.vectors[0] - expected("x", 32)).max() < 0.01


async def test_bits_come_back_packed(client: Clients, responder: Responders) -> None:
    async with responder(), client() as embedq:
        bits = await embedq.embed(["x", "y"], dtype="binary")

    assert bits.dtype == np.uint8
    assert bits.shape == (2, 8)
    assert np.array_equal(np.unpackbits(bits[0]), expected("x") > 0)


async def test_details_say_which_model_and_how_many_tokens(client: Clients, responder: Responders) -> None:
    async with responder(), client() as embedq:
        found = await embedq.embed_detailed(["one", "one two three"])

    assert found.model_version == OLD
    assert found.tokens.tolist() == [1, 3]
    assert found.total_tokens == 4
    assert not found.truncated.any()
    assert not found.cached.any()
    assert found.timings[0].compute == 0.002


async def test_a_long_list_becomes_several_jobs_and_one_array(client: Clients, responder: Responders) -> None:
    texts = [f"text {n}" for n in range(25)]
    async with responder() as other, client(max_inputs=10) as embedq:
        assert np.array_equal(await embedq.embed(texts), rows(texts))

    assert sorted(len(job.texts) for job in other.received) == [5, 10, 10]


async def test_large_texts_are_split_by_bytes(client: Clients, responder: Responders) -> None:
    texts = [f"{n} " + "x" * 400_000 for n in range(5)]
    async with responder() as other, client() as embedq:
        assert np.array_equal(await embedq.embed(texts), rows(texts))

    assert sorted(len(job.texts) for job in other.received) == [1, 2, 2]


async def test_parts_out_of_order_and_repeated_are_joined(client: Clients, responder: Responders) -> None:
    def shuffled(job: Received) -> list[Answer]:
        first, *others = other.parts(job, 2)
        return [*reversed(others), *others, first, first]

    texts = [str(n) for n in range(9)]
    async with responder() as other, client() as embedq:
        other.behave = shuffled
        assert np.array_equal(await embedq.embed(texts), rows(texts))
        other.behave = None
        await embedq.embed("the next call is not disturbed")

        assert embedq.in_flight == 0
        assert embedq.unclaimed_replies >= 1


async def test_many_clients_share_partitions_and_get_their_own(
    client: Clients, responder: Responders
) -> None:
    async with responder() as other:
        clients = [client() for _ in range(8)]
        await asyncio.gather(*(embedq.__aenter__() for embedq in clients))
        try:
            texts = [[f"client {n}, text {m}" for m in range(40)] for n in range(8)]
            found = await asyncio.gather(
                *(
                    asyncio.gather(*(embedq.embed(text) for text in mine))
                    for embedq, mine in zip(clients, texts, strict=True)
                )
            )
        finally:
            await asyncio.gather(*(embedq.close() for embedq in clients))

    assert {embedq.reply_partition for embedq in clients} <= {0, 1}
    assert len(other.received) == 320
    for mine, vectors in zip(texts, found, strict=True):
        assert np.array_equal(np.stack(vectors), rows(mine))


async def test_the_same_instance_name_has_the_same_partition(client: Clients) -> None:
    async with client(instance="pod-7") as first, client(instance="pod-7") as second:
        assert first.reply_partition == second.reply_partition


async def test_a_burst_reaches_every_partition_of_the_lane(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        await asyncio.gather(*(embedq.embed(str(n)) for n in range(400)))

    assert {job.partition for job in other.received} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_value", InvalidJob),
        ("too_many_inputs", InvalidJob),
        ("unknown_model", UnknownModel),
        ("text_too_long", TextTooLong),
        ("expired", Expired),
    ],
)
async def test_an_error_of_the_service_has_its_type(
    client: Clients, responder: Responders, code: Any, kind: type[JobFailed]
) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: [other.failure(job, ErrorBody.of(code, "expected better", "input"))]
        with pytest.raises(kind) as raised:
            await embedq.embed(["x", "y"])

    assert raised.value.code == code
    assert raised.value.param == "input"
    assert str(raised.value) == f"{code}: expected better"
    assert len(other.received) == 1


async def test_one_bad_text_leaves_the_others_their_vectors(client: Clients, responder: Responders) -> None:
    def second_fails(job: Received) -> list[Answer]:
        good = other.good(job)
        bad = Datum(index=1, embedding=None, error=ErrorBody.of("text_too_long", "m", "input[1]"))
        return [changed(good, data=[good.data[0], bad, *good.data[2:]])]

    texts = ["a", "b", "c"]
    async with responder() as other, client() as embedq:
        other.behave = second_fails
        with pytest.raises(PartialFailure) as raised:
            await embedq.embed(texts)
        returned = await embedq.embed_detailed(texts, errors="return")
        other.behave = lambda job: [
            changed(
                other.good(job), data=[Datum(index=0, embedding=None, error=ErrorBody.of("non_finite", "m"))]
            )
        ]
        with pytest.raises(JobFailed, match="non_finite"):
            await embedq.embed("alone")

    assert list(raised.value.errors) == [1]
    assert np.array_equal(raised.value.vectors[[0, 2]].data, rows(["a", "c"]))
    assert isinstance(returned.errors[1], TextTooLong)


@pytest.mark.parametrize("code", ["overloaded", "internal"])
async def test_a_passing_error_is_retried_with_the_same_id(
    client: Clients, responder: Responders, code: Any
) -> None:
    def third_time_lucky(job: Received) -> list[Answer]:
        return [other.failure(job, ErrorBody.of(code, "busy"))] if job.seen < 3 else [other.good(job)]

    async with responder() as other, client() as embedq:
        other.behave = third_time_lucky
        assert np.array_equal(await embedq.embed("x"), expected("x"))

    assert len(other.received) == 3
    assert len({job.id for job in other.received}) == 1


@pytest.mark.parametrize(("code", "kind"), [("overloaded", ServiceOverloaded), ("internal", InternalError)])
async def test_a_lasting_error_is_raised_within_the_deadline(
    client: Clients, responder: Responders, code: Any, kind: type[JobFailed]
) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: [other.failure(job, ErrorBody.of(code, "busy"))]
        with pytest.raises(kind):
            await embedq.embed("x", timeout=patient(1.5))

        assert embedq.in_flight == 0


async def test_no_answer_is_a_deadline_exceeded_and_a_late_one_is_only_counted(
    client: Clients, responder: Responders
) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: None
        with pytest.raises(DeadlineExceeded, match="the job is in Kafka") as raised:
            await embedq.embed("x", timeout=patient(1.5))
        late = other.received[0]
        counted = embedq.unclaimed_replies
        await other.send(late, other.good(late))
        await wait_until(lambda: embedq.unclaimed_replies > counted, what="the late reply")

        assert isinstance(raised.value, TimeoutError)
        assert embedq.in_flight == 0


async def test_cancelling_a_call_leaves_nothing_over(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: None
        calls = [asyncio.create_task(embedq.embed([f"{n}", "b"])) for n in range(50)]
        await wait_until(lambda: len(other.received) == 50, what="all jobs at the service")
        assert embedq.in_flight == 50
        for call in calls:
            call.cancel()
        ended = await asyncio.gather(*calls, return_exceptions=True)

        assert all(isinstance(end, asyncio.CancelledError) for end in ended)
        assert embedq.in_flight == 0
        assert embedq._runner.in_flight.held == (0, 0)
        other.behave = None
        assert np.array_equal(await embedq.embed("x"), expected("x"))


async def test_closing_ends_waiting_calls(client: Clients, responder: Responders) -> None:
    async with responder() as other:
        async with client() as embedq:
            other.behave = lambda job: None
            waiting = asyncio.create_task(embedq.embed("x"))
            await wait_until(lambda: len(other.received) == 1, what="the job at the service")
        with pytest.raises(ClientClosed):
            await waiting
        with pytest.raises(ClientClosed):
            await embedq.embed("y")
        with pytest.raises(ClientClosed):
            await embedq.__aenter__()


async def test_more_than_the_client_may_have_in_flight_waits_then_says_so(
    client: Clients, responder: Responders
) -> None:
    async with responder() as other, client(max_in_flight_texts=2) as embedq:
        other.behave = lambda job: None
        first = asyncio.create_task(embedq.embed(["a", "b"]))
        await wait_until(lambda: embedq.in_flight == 1, what="the first call")
        with pytest.raises(Overloaded, match=r"^2 texts and 2 bytes are in flight"):
            await embedq.embed("c", timeout=0.2)
        first.cancel()
        other.behave = None

        assert np.array_equal(await embedq.embed("d"), expected("d"))


async def test_a_reload_between_two_jobs_of_a_call_asks_again_for_the_older_part(
    client: Clients, responder: Responders
) -> None:
    def reloading(job: Received) -> list[Answer]:
        other.version = NEW if "5" in job.texts or len(other.received) > 3 else OLD
        return [other.good(job)]

    texts = [str(n) for n in range(6)]
    async with responder() as other, client(max_inputs=2) as embedq:
        other.behave = reloading
        found = await embedq.embed_detailed(texts)

    assert found.model_version == NEW
    assert np.array_equal(found.vectors, rows(texts, NEW))
    assert len(other.received) == 5


async def test_vectors_of_two_models_are_never_returned_as_one_array(
    client: Clients, responder: Responders
) -> None:
    def torn(job: Received) -> list[Answer]:
        other.version = NEW if "3" in job.texts else OLD
        return [other.good(job)]

    texts = ["0", "1", "2", "3"]
    async with responder() as other, client(max_inputs=2) as embedq:
        other.behave = torn
        with pytest.raises(MixedModelVersions) as raised:
            await embedq.embed(texts)
        allowed = await embedq.embed_detailed(texts, allow_mixed=True)

    assert raised.value.versions == [OLD, OLD, NEW, NEW]
    assert allowed.model_versions == [OLD, OLD, NEW, NEW]


async def test_a_reply_that_is_garbage_ends_its_call_at_once(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: None
        waiting = asyncio.create_task(embedq.embed("x"))
        await wait_until(lambda: len(other.received) == 1, what="the job")
        echo = other.received[0].headers.echo
        await other._producer.send_and_wait(
            f"{embedq._topics.replies}", b"\xc1", partition=embedq.reply_partition, headers=list(echo)
        )
        with pytest.raises(UnreadableReply):
            await waiting


async def test_a_foreign_record_that_aiokafka_cannot_read_is_stepped_over(
    client: Clients, responder: Responders
) -> None:
    async with responder() as other, client() as embedq:
        batch = other._producer.create_batch()
        name = "bad-name"
        batch.append(timestamp=None, key=None, value=b"x", headers=[(name, b"v")])
        raw = bytearray(batch._build())
        at = raw.find(name.encode())
        raw[at : at + 2] = b"\xff\xfe"
        _fix_crc(raw)
        batch._buffer = bytes(raw)
        sent = await other._producer.send_batch(
            batch, embedq._topics.replies, partition=embedq.reply_partition
        )
        await sent

        assert np.array_equal(await embedq.embed("x"), expected("x"))


def _fix_crc(batch: bytearray) -> None:
    """The checksum of a record batch covers everything after it."""
    from aiokafka.record.util import calc_crc32c_py

    struct.pack_into(">I", batch, 17, calc_crc32c_py(bytes(batch[21:])))


async def test_a_missing_topic_is_named(servers: str) -> None:
    with pytest.raises(
        TopicMissing,
        match=r"has no topic nowhere\.jobs, or does not show it to this user: `embedq topics create`",
    ):
        async with EmbedClient(servers, topic_prefix="nowhere"):
            pass


async def test_wrong_arguments_send_nothing(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        for wrong in ([], None, ["a", 3], b"x"):
            with pytest.raises(InvalidArgument):
                await embedq.embed(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="`timeout`"):
            await embedq.embed("x", timeout=0)
        with pytest.raises(InvalidArgument, match="`texts`: expected at most 900,000 bytes"):
            await embedq.embed("x" * 5_000_000)
        with pytest.raises(InvalidArgument, match="`errors`"):
            await embedq.embed_detailed("x", errors="ignore")  # type: ignore[arg-type]
        await embedq.embed("the only one")

        assert len(other.received) == 1
