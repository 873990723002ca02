"""The command line as a user runs it: another process, a real Kafka, exit codes and what is on which stream."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from embedq_sdk.admin import splits
from embedq_sdk.admin.control import LostRace, write_record
from embedq_sdk.admin.topics import create_topics
from embedq_shared.messages import Datum, ErrorBody, Rollout, Split
from tests.helpers.command_line import Run
from tests.helpers.fake_replica import Replica, failing, failing_in_turn, silent
from tests.helpers.fake_service import OLD, Answer, Received, changed, expected
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

Responders = Callable[..., Responder]


async def test_texts_become_json_lines(embedq: Run, responder: Responders) -> None:
    async with responder():
        done = await embedq("embed", "hello", "", "--dimensions", "32")

    assert (done.code, done.err) == (0, "")
    first, second = done.lines()
    assert first.keys() == {"index", "embedding", "model_version", "tokens"}
    assert (first["index"], first["model_version"], first["tokens"]) == (0, OLD, 1)
    assert np.array_equal(np.float32(first["embedding"]), expected("hello", 32))
    assert np.array_equal(np.float32(second["embedding"]), expected("", 32))


async def test_a_file_becomes_an_array(embedq: Run, responder: Responders, tmp_path: Path) -> None:
    texts = [f"line {n} with \u2028 inside" for n in range(500)]
    (tmp_path / "in.txt").write_text("\r\n".join(texts) + "\n", encoding="utf-8", newline="")
    async with responder() as other:
        done = await embedq(
            *("embed", "--file", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out.npy")),
            *("--query", "--instruction", "find", "--lane", "bulk", "--batch-size", "50"),
            *("--model-version", OLD),
        )

    assert (done.code, done.out, done.err) == (0, "", "")
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.stack([expected(text) for text in texts]))
    job = other.received[0]
    assert (job.job.input_type, job.job.instruction, job.job.model_version) == ("query", "find", OLD)
    assert job.topic.endswith(".bulk")


async def test_standard_input_becomes_a_file_of_lines(
    embedq: Run, responder: Responders, tmp_path: Path
) -> None:
    async with responder():
        done = await embedq(
            "embed", "--file", "-", "--with-text", "--out", str(tmp_path / "o.jsonl"), stdin="eins\nzwei"
        )

    assert (done.code, done.out) == (0, "")
    lines = [msgspec.json.decode(line) for line in (tmp_path / "o.jsonl").read_bytes().splitlines()]
    assert [line["text"] for line in lines] == ["eins", "zwei"]


async def test_json_lines_and_columns_are_read_as_what_they_are(
    embedq: Run, responder: Responders, tmp_path: Path
) -> None:
    """Their source code was embedded, and nothing said so."""
    (tmp_path / "rows.jsonl").write_text('{"id": "r1", "text": "one"}\n{"text": "two", "id": 2}\n')
    (tmp_path / "rows.csv").write_text('id,text\nr1,"one, and"\nr2,two\n')
    (tmp_path / "rows.json").write_text('[{"text": "one"}]')
    async with responder() as other:
        rows = await embedq("embed", "--file", str(tmp_path / "rows.jsonl"), "--with-text")
        columns = await embedq("embed", "--file", str(tmp_path / "rows.csv"), "--with-text")
        refused = await embedq("embed", "--file", str(tmp_path / "rows.json"))
        piped = await embedq("embed", "-", stdin='{"text": "one"}\n')
        told = await embedq("embed", "-", "--format", "jsonl", stdin='{"text": "one", "id": "p"}\n')

    assert [(row["id"], row["text"]) for row in rows.lines()] == [("r1", "one"), (2, "two")]
    assert np.array_equal(np.float32(rows.lines()[0]["embedding"]), expected("one"))
    assert [(row["id"], row["text"]) for row in columns.lines()] == [("r1", "one, and"), ("r2", "two")]
    assert (refused.code, refused.out, piped.code, piped.out) == (2, "", 2, "")
    assert "jq -c '.[]'" in refused.err
    assert "--format jsonl reads `text` and `id`" in piped.err
    assert np.array_equal(np.float32(told.lines()[0]["embedding"]), expected("one"))
    assert {text for job in other.received for text in job.texts} == {"one", "two", "one, and"}


async def test_a_dash_is_standard_input(embedq: Run, responder: Responders) -> None:
    async with responder() as other:
        done = await embedq("embed", "-", stdin="eins\nzwei")

    assert done.code == 0
    assert len(done.lines()) == 2
    assert [job.texts for job in other.received] == [["eins", "zwei"]]


async def test_a_line_is_answered_while_the_next_one_is_still_awaited(
    servers: str, prefix: str, responder: Responders
) -> None:
    async with responder(), asyncio.timeout(patient(60)):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from embedq_sdk.cli import main; main()", "embed", "-", "--with-text"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": prefix},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for text in ("one", "two"):
            process.stdin.write(text.encode() + b"\n")
            await process.stdin.drain()
            assert msgspec.json.decode(await process.stdout.readline())["text"] == text
        await process.communicate(b"")  # without input it would leave the stream open
    assert process.returncode == 0


async def test_files_that_are_not_there_are_one_line(
    embedq: Run, responder: Responders, tmp_path: Path
) -> None:
    async with responder():
        missing = await embedq("embed", "--file", str(tmp_path / "nosuch.txt"))
        nowhere = await embedq("embed", "x", "--out", str(tmp_path / "nosuch" / "x.npy"))

    assert (missing.code, nowhere.code) == (2, 1)
    for done in (missing, nowhere):
        assert done.err.endswith(": No such file or directory\n")
        assert done.err.count("\n") == 1


async def test_a_failed_text_is_told_and_changes_the_exit_code(embedq: Run, responder: Responders) -> None:
    def second_fails(job: Received) -> list[Answer]:
        good = other.good(job)
        bad = Datum(index=1, embedding=None, error=ErrorBody.of("text_too_long", "expected less", "input[1]"))
        return [changed(good, data=[good.data[0], bad])]

    async with responder() as other:
        other.behave = second_fails
        done = await embedq("embed", "a", "b")

    assert done.code == 1
    assert done.err == "embedq: text 1: text_too_long: expected less\n"
    assert [set(line) & {"embedding", "error"} for line in done.lines()] == [{"embedding"}, {"error"}]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("embed",), "give either TEXTS or --file"),
        (("embed", "x", "--out", "x.csv"), ".jsonl or .npy"),
        (("embed", "x", "--dimensions", "5"), "`dimensions`: expected an integer of at least 32, got 5"),
        (("embed", "x", "--timeout", "0"), "`timeout`"),
        (("embed", "x", "--instruction", "i", "--document"), "`instruction`"),
        (("reload", "/m", "--digest", "abc"), "`digest`: expected sha256:"),
        (("reload", "/m", "--min-cosine", "3"), "min-cosine"),
        (("split", "ab", "new"), "expected ALIAS=WEIGHT"),
        (("split", "ab"), "give ALIAS=WEIGHT for each share, or --end"),
        (("split", "ab", "ab=1"), "got the alias itself"),
        (("split", "ab", "new=0"), "`weights`"),
        (("embed", "x", "--model-version", ""), "`model_version`"),
        (("topics", "create", "--partitions", "0"), "partitions"),
        (("topics", "create", "--pool", "bulk"), "`pool`"),
        (("reload", "/m", "--pool", "big"), "`pool`: expected default for the alias default"),
        (("status", "--pool", "a.b"), "`pool`"),
    ],
)
async def test_wrong_usage_is_exit_code_2(embedq: Run, arguments: tuple[str, ...], told: str) -> None:
    done = await embedq(*arguments)

    assert done.code == 2
    assert told in done.err


async def test_bytes_that_are_no_text_are_named_by_line(embedq: Run, responder: Responders) -> None:
    async with responder():
        done = await embedq("embed", "--file", "-", stdin=b"good\n\xff\xfe\n")

    assert done.code == 2
    assert "line 2" in done.err


@pytest.mark.parametrize(
    "arguments", [("embed", "x"), ("reload", "/m"), ("status",), ("topics", "create")], ids=lambda a: a[0]
)
async def test_without_kafka_one_line_says_so(
    embedq: Run, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = await embedq(*arguments, EMBEDQ_KAFKA_SERVERS="127.0.0.1:1")

    assert done.code == 3
    assert done.err.count("\n") == 1
    assert done.err.startswith("embedq: Kafka at 127.0.0.1:1 does not answer")


async def test_a_missing_topic_is_one_line(embedq: Run) -> None:
    done = await embedq("embed", "x", EMBEDQ_TOPIC_PREFIX="nowhere")

    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "embedq topics create" in done.err


async def test_the_version_is_the_distributions(embedq: Run) -> None:
    assert (await embedq("--version")).out.startswith("embedq, version ")


async def test_topics_are_created_and_then_exist(embedq: Run) -> None:
    prefix = f"cli-{uuid.uuid4().hex[:8]}"
    command = ("topics", "create", "--reply-partitions", "2", "--prefix", prefix)

    first = await embedq(*command, "--partitions", "2")
    second = await embedq(*command, "--partitions", "3")
    pool = await embedq(*command, "--partitions", "1", "--retry-tiers", "1", "--pool", "big")

    assert first.code == second.code == pool.code == 0
    names = ("jobs.big", "jobs.big.bulk", "retry.big.1")
    assert pool.out.splitlines() == [f"{prefix}.{name}: created, 1 partitions" for name in names]
    assert f"{prefix}.jobs: created, 2 partitions" in first.out.splitlines()
    assert f"{prefix}.jobs: exists, 2 partitions" in second.out.splitlines()
    assert f"embedq: warning: {prefix}.jobs has 2 partitions, not 3" in second.err.splitlines()


@pytest.fixture
def fresh(servers: str) -> str:
    name = f"cli-{uuid.uuid4().hex[:8]}"
    asyncio.run(create_topics(servers, prefix=name, partitions=2, reply_partitions=1))
    return name


async def test_reload_shows_each_step_and_ends_well(embedq: Run, servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1") as replica:
        done = await embedq("reload", "/models/new", "--prefix", fresh, "--policy", "resource")

    assert done.code == 0
    assert "r1: READY serving (version 1)" in done.out
    assert done.out.splitlines()[-1] == "default version 1: READY on 1 of 1 replicas"
    assert replica.commands[0].policy == "resource_preserving"


async def test_a_split_is_written_shown_and_ended(embedq: Run, servers: str, fresh: str) -> None:
    first = await embedq("split", "ab", "default=90", "new=10", "--prefix", fresh)
    changed_to = await embedq("split", "ab", "default=1", "new=1", "--prefix", fresh)
    other = await embedq("split", "cd", "new=1", "--prefix", fresh)
    shown = await embedq("split", "--prefix", fresh)
    ended = await embedq("split", "ab", "--end", "--prefix", fresh)
    left = await embedq("split", "--prefix", fresh)

    assert [done.code for done in (first, changed_to, other, shown, ended, left)] == [0] * 6
    assert first.out == "ab version 1: default 90.0%, new 10.0%\n"
    assert changed_to.out == "ab version 2: default 50.0%, new 50.0%\n"
    assert shown.out.splitlines() == ["ab: default 50.0%, new 50.0%", "cd: new 100.0%"]
    assert ended.out == "ab version 3: ended\n"
    assert left.out.splitlines() == ["cd: new 100.0%"]


async def test_of_two_that_write_a_split_at_once_one_is_told_that_it_lost(
    servers: str, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = write_record
    rival = Split(alias="ab", version=1, command_id="rival", split={"rival": 1})

    async def beaten(where: Any, topic: str, split: Split, timeout: float) -> int:
        """Both have read the topic to its end before either writes: the rival's record comes in between."""
        monkeypatch.setattr(splits, "write_record", write)
        await write(where, topic, rival, timeout)
        return await write(where, topic, split, timeout)

    monkeypatch.setattr(splits, "write_record", beaten)
    with pytest.raises(LostRace):
        await splits.split_alias(servers, "ab", {"new": 1}, topic_prefix=fresh)
    assert await splits.splits_in_force(servers, topic_prefix=fresh) == {"ab": {"rival": 1}}
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(f"{fresh}.control", 0)])
        found: list[bytes] = []
        while len(found) < 3:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                found += [record.value for record in records]
    finally:
        await consumer.stop()
    assert b'"rival"' in found[-1], "what compaction keeps is what is in force"


async def test_a_failed_reload_gives_the_reason(embedq: Run, servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1"), Replica(servers, fresh, "r2", failing):
        done = await embedq("reload", "/models/bad", "--prefix", fresh)

    assert done.code == 4  # r1 serves another model now
    assert done.err == "embedq: r2 FAILED and keeps its old model: no such directory\n"


async def test_a_reload_that_was_taken_back_is_exit_code_1_and_names_the_reason(
    embedq: Run, servers: str, fresh: str
) -> None:
    async with Replica(servers, fresh, "r1", failing_in_turn) as replica:
        await replica.say(step="serving", state="READY", version=None, serving=True, path="old")
        done = await embedq("reload", "bad", "--prefix", fresh)

    assert (done.code, done.err.splitlines()) == (
        1,
        [
            "embedq: default version 1 failed: r1: no such directory",
            "embedq: version 2 has brought the old model back on 1 of 1 replicas",
        ],
    )
    assert "default version 1 failed: r1: no such directory; version 2 brings the old model back" in done.out
    assert [(command.path, command.rollback_of) for command in replica.commands] == [
        ("bad", None),
        ("old", 1),
    ]


async def test_a_rollback_goes_to_what_was_there_before_and_says_so_where_nothing_was(
    embedq: Run, servers: str, fresh: str
) -> None:
    async with Replica(servers, fresh, "r1") as replica:
        nothing = await embedq("rollback", "--prefix", fresh)
        await embedq("reload", "one", "--prefix", fresh)
        await embedq("reload", "two", "--prefix", fresh, "--max-unavailable", "3", "--same-space")
        back = await embedq("rollback", "--prefix", fresh)
        expected = await embedq("reload", "three", "--prefix", fresh, "--expect-version", "7")

    assert (nothing.code, nothing.err) == (
        2,
        "embedq: There is nothing to take default back to: no command was ever written for it\n",
    )
    assert back.code == 0
    assert [command.path for command in replica.commands] == ["one", "two", "one"]
    _, two, one = replica.commands
    assert (two.rollout, two.min_cosine) == (Rollout(max_unavailable=3, canary=True), 0.995)
    assert (one.rollback_of, one.fallback, one.rollout) == (2, "two", Rollout(max_unavailable=1))
    assert (expected.code, "Version 3 of default is in force, not 7" in expected.err) == (2, True)


async def test_a_command_that_is_not_waited_for_is_written(embedq: Run, servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1", silent) as replica:
        done = await embedq("reload", "m", "--prefix", fresh, "--no-wait")
        assert (done.code, done.out) == (0, "default version 1 is written\n")
        await wait_until(lambda: len(replica.commands) == 1, what="the command")


async def test_models_are_shown_with_what_they_take(embedq: Run, servers: str, fresh: str) -> None:
    serves = {
        "serving": True,
        "path": "m/one",
        "dimensions": 256,
        "max_tokens": 512,
        "model_version": "sha256:1",
    }
    async with Replica(servers, fresh, "r1") as replica:
        await replica.say(
            step="serving",
            state="READY",
            version=3,
            memory_used=2_000_000_000,
            memory_total=8_000_000_000,
            **serves,
        )
        plain = await embedq("models", "--prefix", fresh)
        program = await embedq("models", "--json", "--prefix", fresh)
    nobody = await embedq("models", "--prefix", fresh)

    assert plain.out == (
        "r1 default READY directory=m/one model=sha256:1 version=3 step=serving dimensions=256 max_tokens=512 memory=2.0/8.0GB\n"
    )
    [one] = json.loads(program.out)
    assert (one["path"], one["memory_used"]) == ("m/one", 2_000_000_000)
    assert nobody.out == "no live replicas\n"


async def test_a_reload_that_nobody_answers_is_exit_code_2(embedq: Run, servers: str, fresh: str) -> None:
    alone = await embedq("reload", "/m", "--prefix", fresh, "--timeout", "1")
    async with Replica(servers, fresh, "stuck", silent):
        stuck = await embedq("reload", "/m", "--prefix", fresh, "--timeout", "2")

    assert alone.code == stuck.code == 2
    assert "no live replica" in alone.err
    assert "no answer within 2 s from stuck" in stuck.err


async def test_status_for_people_and_for_programs(embedq: Run, servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1"):
        plain = await embedq("status", "--prefix", fresh)
        program = await embedq("status", "--json", "--prefix", fresh)

    assert plain.code == program.code == 0
    assert plain.out.startswith("r1 default READY model=- age=")
    assert f"{fresh}.jobs: 0 jobs waiting" in plain.out
    found = msgspec.json.decode(program.out)
    assert found["replicas"][0]["replica"] == "r1"
    assert found["lag"][0] == {"topic": f"{fresh}.jobs", "jobs": 0}


LONG_TEXT = "The moon is round. 😀 And the sun is too."


async def test_the_command_writes_a_line_for_each_span(embedq: Run, responder: Responders) -> None:
    def second_fails(received: Received) -> list[Answer]:
        whole = other.good(received)
        error = ErrorBody.of("non_finite", "`input[1]`: not finite", "input[1]")
        data = [datum for datum in whole.data if datum.index != 1]
        return [changed(whole, data=[*data, Datum(index=1, embedding=None, error=error)])]

    async with responder() as other:
        done = await embedq("embed", LONG_TEXT, "b", "--chunk", "late", "--chunk-tokens", "16")
        other.behave = second_fails
        partly = await embedq("embed", LONG_TEXT, "b", "--chunk", "late", "--chunk-tokens", "16")
    assert (done.code, done.err) == (0, "")
    lines = done.lines()
    assert [(line["index"], line["span"]) for line in lines] == [
        (0, [0, 16]),
        (0, [16, 32]),
        (0, [32, len(LONG_TEXT)]),
        (1, [0, 1]),
    ]
    assert np.array_equal(np.float32(lines[1]["embedding"]), expected(LONG_TEXT[16:32]))
    assert partly.code == 1
    assert [line.get("span") for line in partly.lines()] == [[0, 16], [16, 32], [32, len(LONG_TEXT)], None]


async def test_the_command_refuses_what_makes_no_sense(embedq: Run, tmp_path: Path) -> None:
    for arguments, reason in (
        (("--chunk-tokens", "16"), "is for --chunk"),
        (("--chunk", "late", "--out", str(tmp_path / "a.npy")), ".jsonl"),
        (("--chunk", "mean", "--chunk-tokens", "7"), "at least 8"),
    ):
        done = await embedq("embed", "a", *arguments)
        assert done.code == 2
        assert reason in done.err


async def test_golden_texts_of_the_model_that_serves_are_written_and_compared(
    embedq: Run, responder: Responders, tmp_path: Path
) -> None:
    file = tmp_path / "golden.json"
    (tmp_path / "texts.txt").write_text("hello\nworld\n")
    async with responder() as other:
        wrote = await embedq(
            "golden", "write", "--texts", str(tmp_path / "texts.txt"), "--query", "--out", str(file)
        )
        same = await embedq("golden", "check", str(file))
        stored = json.loads(file.read_bytes())
        stored["texts"][1]["embedding"][0] -= 1.0
        file.write_text(json.dumps(stored))
        another = await embedq("golden", "check", str(file))

    assert (wrote.code, wrote.err) == (0, "")
    assert stored["model_version"] == OLD
    assert (same.code, same.err) == (0, "")
    assert another.code == 1
    assert "texts[1]: expected a cosine of at least 0.995 to the stored vector" in another.err
    assert {job.job.input_type for job in other.received} == {"query"}
