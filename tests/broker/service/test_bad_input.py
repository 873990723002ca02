"""Whatever comes in gets its documented answer, the job behind it is answered, and the service stays as it was.

One replica gets every case of `bad_inputs.py`, a good job right behind each on the same partition, and then a flood. What came
back is judged case by case.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.structs import RecordMetadata
from tokenizers import Tokenizer

from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import Topics
from embedq_shared.vectors import cut_and_normalize, dequantize, quantize
from tests.helpers.bad_inputs import (
    CANARY,
    HIDDEN,
    NAN_TOKEN,
    PARTITIONS,
    Bad,
    Odd,
    bad_inputs,
    odd_jobs,
)
from tests.helpers.service_process import Replica, fresh_prefix, producer, reader, replicas
from tests.helpers.support import wait_until
from tests.helpers.tiny_models import make_tiny_qwen3

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

MB = 1024 * 1024
ROOM = 16 * MB
"""What the job topics take in one record: far more than the results and dead letters, which take Kafka's 1 MB."""
GROWTH = 1500 * MB
"""What a flood may add to the service's memory, whatever its length. Most of it is the tokenizer's: it holds some 550 bytes for
each token while it works, a text of 1 MB may have a token for each byte, and two threads tokenize. The rest is what is in
flight and fetched ahead, 32 MB each for either lane."""
GOOD = ("The tide turns twice a day.", "Water boils at one hundred degrees.", "def embed(text): ...")


@dataclass
class Run:
    """Everything that one replica was sent, and what came of it."""

    topics: Topics
    sent: dict[str, RecordMetadata] = field(default_factory=dict)
    good: dict[str, str] = field(default_factory=dict)  # id of the job behind a case → its text
    answers: list[ConsumerRecord] = field(default_factory=list)
    letters: list[ConsumerRecord] = field(default_factory=list)
    by_id: defaultdict[str, list[ConsumerRecord]] = field(default_factory=lambda: defaultdict(list))
    by_correlation: defaultdict[bytes, list[ConsumerRecord]] = field(
        default_factory=lambda: defaultdict(list)
    )
    vectors: dict[str, npt.NDArray[np.float32]] = field(
        default_factory=dict
    )  # text as the model gets it → raw
    model_version: str = ""
    sent_at_ms: int = field(default_factory=lambda: int(time.time() * 1000) - 5000)
    bad: dict[str, Bad] = field(default_factory=dict)
    odd: dict[str, Odd] = field(default_factory=dict)
    flooded: int = 0
    flood_answered: int = 0
    rss_before: int = 0
    rss_peak: int = 0
    readiness: int | None = None
    liveness: int | None = None
    in_flight: dict[str, float] = field(default_factory=dict)
    exit_code: int | None = None
    log: str = ""

    def answer_to(self, name: str) -> list[ConsumerRecord]:
        """The records that answer one case, found by its correlation id, or by the id in the answer."""
        where = self.sent[name]
        found = [
            *self.by_correlation.get(name.encode(), []),
            *self.by_id.get(name, []),
            *self.by_id.get(f"{where.topic}-{where.partition}-{where.offset}", []),
        ]
        return list({(record.topic, record.partition, record.offset): record for record in found}.values())

    def index(self) -> None:
        """Sort the answers by what they say they answer."""
        for record in self.answers:
            self.by_id[body(record)["id"]].append(record)
            if (correlation := value_of(record.headers, "correlation-id")) is not None:
                self.by_correlation[correlation].append(record)

    def letters_of(self, name: str) -> list[ConsumerRecord]:
        """The dead letters of one case, found by where its record stood."""
        where = self.sent[name]
        place = where.topic.encode(), struct.pack(">i", where.partition), struct.pack(">q", where.offset)
        names = [f"kafka_dlt-original-{name}" for name in ("topic", "partition", "offset")]
        return [
            letter
            for letter in self.letters
            if tuple(value_of(letter.headers, name) for name in names) == place
        ]


def body(record: ConsumerRecord) -> dict[str, Any]:
    """An answer's value, whatever its content type."""
    packed = value_of(record.headers, "content-type") == b"application/msgpack"
    found: dict[str, Any] = (msgspec.msgpack if packed else msgspec.json).decode(record.value)
    return found


def make_cracked(path: Path) -> str:
    """A real model with two faults: NaN for `NAN_TOKEN`, and no row for the tokenizer's last token, whose text is returned."""
    from safetensors.torch import load_file, save_file

    make_tiny_qwen3(path, seed=3, hidden=HIDDEN, max_tokens=512)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    weights = load_file(path / "model.safetensors")
    weights["embed_tokens.weight"][tokenizer.token_to_id(NAN_TOKEN)] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    poison = "<|beyond|>"
    tokenizer.add_special_tokens([poison])
    tokenizer.save(str(path / "tokenizer.json"))
    assert json.loads((path / "config.json").read_text())["vocab_size"] in tokenizer.encode(poison).ids
    return poison


BAD = bad_inputs(Topics("names-only"), "poison")
ODD = odd_jobs(Topics("names-only"))


@pytest.fixture(scope="module")
def run(stack: DevStack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of everything: the tests below only look at what it left."""
    folder = tmp_path_factory.mktemp("bad-input")
    poison = make_cracked(folder / "cracked")
    run = Run(Topics(fresh_prefix()))
    bad = {case.name: case for case in bad_inputs(run.topics, poison)}
    odd = {job.name: job for job in odd_jobs(run.topics)}
    run.bad, run.odd = bad, odd
    _embed(run, folder / "cracked")
    asyncio.run(_run(run, stack, folder))
    return run


def _embed(run: Run, model: Path) -> None:
    """The model's own vectors of every text that must come back as one."""
    encoder = load_encoder(model, device="cpu", threads=1)
    run.model_version = encoder.model_version
    cut = {text: job.truncated or "error" for job in run.odd.values() for text in job.texts}
    texts = [*dict.fromkeys((*GOOD, *cut, "a", "b", "c"))]
    tokens = encoder.tokenize([Text(text, truncate=cut.get(text, "error")) for text in texts])
    ids = [found.ids for found in tokens if isinstance(found, Tokens)]
    run.vectors = dict(zip(texts, encoder.encode(ids), strict=True))


async def _run(run: Run, stack: DevStack, folder: Path) -> None:
    await _make_topics(stack, run.topics)
    replica = Replica(
        stack, run.topics, folder / "cracked", folder / "log", redis=False, commit_interval_ms=100
    )
    topics = run.topics
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results, topics.replies) as answers,
        reader(stack, topics.dead_letters) as letters,
    ):
        await _send_cases(run, client)
        await answers.until(2 * (len(run.bad) + len(run.odd)) + 1, within=60)
        await _until_all_committed(run, stack)
        run.answers = list(await answers.all())
        run.index()

        answered = len(answers.records)
        run.rss_before = psutil.Process(replica.pid).memory_info().rss
        sampler = asyncio.create_task(_sample(run, replica.pid))
        run.flooded = await _flood(run, client)
        await answers.until(answered + run.flooded, within=120)
        await _until_all_committed(run, stack)
        sampler.cancel()
        run.flood_answered = len(await answers.all()) - answered
        run.letters = list(await letters.all())

        run.readiness, run.liveness = await replica.get("/readyz"), await replica.get("/livez")
        metrics = await replica.metrics()
        run.in_flight = {
            name: value for name, value in metrics.items() if name.startswith("embedq_in_flight")
        }
        run.exit_code = await replica.stop()
        run.log = replica.log.read_text()


async def _make_topics(stack: DevStack, topics: Topics) -> None:
    roomy = {"max.message.bytes": str(ROOM)}
    compact = {"cleanup.policy": "compact"}
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        response = await admin.create_topics(
            [
                *(NewTopic(name, PARTITIONS, 1, topic_configs=roomy) for name in topics.lanes),
                *(
                    NewTopic(name, PARTITIONS, 1)
                    for name in (topics.results, topics.replies, topics.dead_letters)
                ),
                *(NewTopic(name, 1, 1, topic_configs=compact) for name in (topics.control, topics.status)),
            ]
        )
        assert not [error for error in response.topic_errors if error[1]]
    finally:
        await admin.close()


async def _send_cases(run: Run, client: AIOKafkaProducer) -> None:
    """Each case, and right behind it on the same partition a good job, over both lanes and all partitions."""
    cases: list[Bad | Odd] = [*run.bad.values(), *run.odd.values()]
    pending = []
    for number, case in enumerate(cases):
        topic, partition = run.topics.lanes[number % 2], number // 2 % PARTITIONS
        headers = [("correlation-id", case.name.encode()), *case.headers]
        # A batch of our own, since the producer refuses a record with neither key nor value, and others do not.
        batch = client.create_batch()
        batch.append(key=case.key, value=case.value, timestamp=run.sent_at_ms, headers=headers)
        sending = await client.send_batch(batch, topic, partition=partition)
        run.good[f"behind {case.name}"] = text = GOOD[number % len(GOOD)]
        good = json.dumps({"input": text, "id": f"behind {case.name}"}).encode()
        pending += [
            (case.name, sending),
            (f"behind {case.name}", await client.send(topic, good, partition=partition)),
        ]
    for name, sending in pending:
        run.sent[name] = await sending


async def _flood(run: Run, client: AIOKafkaProducer) -> int:
    """Texts over the service's limit, texts just under it (a token for each byte), and garbage; how many records."""
    huge = b'{"input": "' + CANARY.encode() * 500_000 + b'"}'
    dense = b'{"input": ["a", "' + b"7" * 999_000 + b'"]}'
    values = [*[huge] * 60, *[dense] * 6, *[b"\xff" + CANARY.encode()] * 2000]
    sending = []
    for number, value in enumerate(values):
        sending.append(await client.send(run.topics.jobs, value, partition=number % PARTITIONS))
    await asyncio.gather(*sending)
    return len(values)


async def _sample(run: Run, pid: int) -> None:
    process = psutil.Process(pid)
    while True:
        run.rss_peak = max(run.rss_peak, process.memory_info().rss)
        await asyncio.sleep(0.02)


async def _until_all_committed(run: Run, stack: DevStack) -> None:
    partitions = [TopicPartition(topic, p) for topic in run.topics.lanes for p in range(PARTITIONS)]
    consumer = AIOKafkaConsumer(bootstrap_servers=stack.kafka_servers)
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await consumer.start()
    await admin.start()
    try:
        ends = await consumer.end_offsets(partitions)

        async def all_committed() -> bool:
            found = await admin.list_consumer_group_offsets(
                f"{run.topics.prefix}.embedq", partitions=partitions
            )
            return bool({place: found[place].offset for place in partitions} == ends)

        await wait_until(all_committed, within=30, what="a commit of every record")
    finally:
        await admin.close()
        await consumer.stop()


# -- each bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [case.name for case in BAD])
def test_bad_input_gets_its_documented_answer_and_the_job_behind_it_its_vector(run: Run, name: str) -> None:
    _check_error(run, name)
    _check_address(run, name)
    _check_dead_letter(run, name)
    _check_good_job(run, name)


def _check_error(run: Run, name: str) -> None:
    """Code, parameter and message, and what is repeated of the job."""
    case, sent = run.bad[name], run.sent[name]
    [answer] = run.answer_to(name)
    found = body(answer)
    place = f"{sent.topic}-{sent.partition}-{sent.offset}"
    assert found["id"] == (case.id if case.id is not None else place)
    assert (found["model"], found["metadata"]) == (case.model, case.metadata)
    assert found["model_version"] == (run.model_version if case.ran else None)
    if case.input is None:
        assert found["object"] == "error"
        error = found["error"]
    else:
        assert found["object"] == "list"
        error = found["data"][case.input]["error"]
        _check_the_others(run, case, found["data"])
    assert (error["code"], error["param"]) == (case.code, case.param)
    assert error["retryable"] is (case.code == "internal")
    assert error["message"]
    assert CANARY not in json.dumps(error)


def _check_address(run: Run, name: str) -> None:
    """Where the error goes, its key, and exactly these headers."""
    case = run.bad[name]
    [answer] = run.answer_to(name)
    assert answer.topic == (run.topics.replies if case.to == "replies" else run.topics.results)
    if case.partition is not None:
        assert answer.partition == case.partition
    sent_key = case.key if case.bare is None else None
    assert answer.key == (sent_key if sent_key is not None else body(answer)["id"].encode())
    expected = {
        "content-type": b"application/msgpack" if case.format == "msgpack" else b"application/json",
        "embedq-status": b"error" if case.input is None else b"partial",
    }
    if case.ran:
        expected["embedq-model-version"] = run.model_version.encode()
    if case.bare != "headers":
        expected["correlation-id"] = name.encode()
    assert dict(answer.headers) == expected


def _check_dead_letter(run: Run, name: str) -> None:
    """What no answer can make up for is kept as it came, and nothing else is."""
    case, sent = run.bad[name], run.sent[name]
    letters = run.letters_of(name)
    if not case.buried:
        assert not letters
        return
    [letter] = letters
    error = body(run.answer_to(name)[0])["error"]
    own = [("correlation-id", name.encode()), *case.headers] if case.whole else []
    assert letter.value == (case.value if case.whole else None)
    place = f"{sent.topic}-{sent.partition}-{sent.offset}".encode()
    assert letter.key == (place if not case.whole or (case.key is None and case.value is None) else case.key)
    # One without its content is sent after the whole was refused, also for what may have been wrong with its time.
    assert letter.timestamp == run.sent_at_ms if case.whole else letter.timestamp >= run.sent_at_ms
    assert list(letter.headers[: len(own)]) == own
    said = dict(letter.headers[len(own) :])
    assert run.sent_at_ms <= int(said.pop("embedq-first-seen")) <= time.time() * 1000
    assert said.pop("embedq-replica")
    said.pop("embedq-model-version", None)  # of a job that was decoded
    assert said == {
        "kafka_dlt-original-topic": sent.topic.encode(),
        "kafka_dlt-original-partition": struct.pack(">i", sent.partition),
        "kafka_dlt-original-offset": struct.pack(">q", sent.offset),
        "kafka_dlt-original-timestamp": struct.pack(">q", run.sent_at_ms),
        "kafka_dlt-original-timestamp-type": b"CreateTime",
        "kafka_dlt-original-consumer-group": f"{run.topics.prefix}.embedq".encode(),
        "kafka_dlt-exception-fqcn": f"embedq.{case.code}".encode(),
        "kafka_dlt-exception-message": error["message"].encode(),
        "__connect.errors.topic": sent.topic.encode(),
        "__connect.errors.partition": str(sent.partition).encode(),
        "__connect.errors.offset": str(sent.offset).encode(),
        "__connect.errors.connector.name": f"{run.topics.prefix}.embedq".encode(),
        "__connect.errors.stage": b"HEADER_CONVERTER"
        if case.code == "invalid_header"
        else b"VALUE_CONVERTER",
        "__connect.errors.class.name": b"embedq_consumer",
        "__connect.errors.exception.class.name": f"embedq.{case.code}".encode(),
        "__connect.errors.exception.message": error["message"].encode(),
        "embedq-error-code": case.code.encode(),
        "embedq-error-message": error["message"].encode(),
        "embedq-attempts": b"1",
        "embedq-result-sent": b"true",
    }


def _check_good_job(run: Run, name: str) -> None:
    """The job right behind, on the same partition."""
    behind = f"behind {name}"
    [answer] = run.answer_to(behind)
    found = body(answer)
    expected = cut_and_normalize(run.vectors[run.good[behind]], HIDDEN)
    np.testing.assert_allclose(found["data"][0]["embedding"], expected, atol=1e-5)
    assert dict(answer.headers)["embedq-status"] == b"ok"


def _check_the_others(run: Run, case: Bad, data: Sequence[dict[str, Any]]) -> None:
    """Beside an input that failed alone, the others have their vectors."""
    texts = json.loads(case.value or b"")["input"]
    assert [datum["index"] for datum in data] == list(range(len(texts)))
    for datum, text in zip(data, texts, strict=True):
        if datum["index"] == case.input:
            assert datum["embedding"] is None
            continue
        assert datum["error"] is None
        expected = cut_and_normalize(run.vectors[text], HIDDEN)
        np.testing.assert_allclose(datum["embedding"], expected, atol=1e-5)


# -- each odd job -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [job.name for job in ODD])
def test_an_odd_job_is_a_job(run: Run, name: str) -> None:
    _check_result(run, name)
    _check_result_address(run, name)
    _check_good_job(run, name)


def _check_result(run: Run, name: str) -> None:
    """The vectors, and all that stands about them."""
    job, sent = run.odd[name], run.sent[name]
    parts = sorted((body(answer) for answer in run.answer_to(name)), key=lambda part: part["part"])
    assert [part["part"] for part in parts] == list(range(parts[0]["parts"]))
    assert {part["id"] for part in parts} == {job.id or f"{sent.topic}-{sent.partition}-{sent.offset}"}
    data = [datum for part in parts for datum in part["data"]]
    assert [datum["index"] for datum in data] == list(range(len(job.texts)))
    tokens = sum(datum["tokens"] for datum in data)
    for part in parts:
        assert (part["object"], part["model"], part["model_version"]) == (
            "list",
            "default",
            run.model_version,
        )
        assert (part["dimensions"], part["dtype"]) == (job.dimensions, job.dtype)
        assert part["metadata"] == job.metadata
        assert part["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for datum, text in zip(data, job.texts, strict=True):
        assert datum["truncated"] is (job.truncated is not None)
        _check_vector(job, datum, cut_and_normalize(run.vectors[text], job.dimensions))


def _check_result_address(run: Run, name: str) -> None:
    """Where the result goes, its key, and exactly these headers."""
    job = run.odd[name]
    for answer in run.answer_to(name):
        assert answer.topic == (run.topics.replies if job.to == "replies" else run.topics.results)
        if job.partition is not None:
            assert answer.partition == job.partition
        assert answer.key == (job.key if job.key is not None else body(answer)["id"].encode())
        kind = b"application/msgpack" if job.format == "msgpack" else b"application/json"
        assert dict(answer.headers) == {
            "correlation-id": name.encode(),
            **dict(job.echoed),
            "content-type": kind,
            "embedq-status": b"ok",
            "embedq-model-version": run.model_version.encode(),
        }
    assert not run.letters_of(name)


def _check_vector(job: Odd, datum: dict[str, Any], expected: npt.NDArray[np.float32]) -> None:
    found = datum["embedding"]
    if job.format == "json":
        whole = {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}[job.dtype]
        found = (
            base64.b64decode(found, validate=True) if job.base64 else np.array(found, dtype=whole).tobytes()
        )
    raw, scale = quantize(expected, job.dtype)  # type: ignore[arg-type]
    assert len(found) == len(raw)
    assert ("scale" in datum) is (scale is not None)
    # The model may round otherwise in another batch: a step of the dtype's, or a bit at zero.
    near = {"float32": 1e-5, "float16": 1e-3, "int8": 0.01, "binary": 1.0}[job.dtype]
    vector = dequantize(found, job.dtype, datum.get("scale"))  # type: ignore[arg-type]
    np.testing.assert_allclose(vector, dequantize(raw, job.dtype, scale), atol=near)  # type: ignore[arg-type]
    if job.dtype == "binary":
        assert (vector != dequantize(raw, "binary")).sum() <= 1


# -- the service behind all that ------------------------------------------------------------------------------------------


def test_every_record_has_one_answer(run: Run) -> None:
    parts = sum(body(answer).get("part", 0) > 0 for answer in run.answers)
    assert len(run.answers) - parts == 2 * (len(run.bad) + len(run.odd))
    assert len(run.bad) >= 80


def test_the_process_lived_through_it_and_ended_when_told(run: Run) -> None:
    assert (run.readiness, run.liveness, run.exit_code) == (200, 200, 0)


def test_a_flood_is_answered_record_by_record(run: Run) -> None:
    assert run.flood_answered == run.flooded


def test_nothing_is_left_in_flight(run: Run) -> None:
    assert len(run.in_flight) == 4
    assert set(run.in_flight.values()) == {0.0}


def test_memory_stays_bounded_in_a_flood(run: Run) -> None:
    growth = run.rss_peak - run.rss_before
    assert growth < GROWTH, f"{growth / MB:.0f} MB on top of {run.rss_before / MB:.0f} MB"


def test_the_log_repeats_no_text(run: Run) -> None:
    assert CANARY not in run.log
