"""What a running replica shows at /metrics, beside what came out of it: every figure is counted from outside, too."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord

from embedq_sdk.dev import DevStack
from embedq_shared.topics import STATUS
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.support import patient, wait_until
from tests.helpers.tiny_models import make_tiny_qwen3

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

LONG = "a text that is longer than the model can take " * 20
PARTITIONS = 2


def data(record: ConsumerRecord) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(record.value).get("data", [])
    return found


def codes(record: ConsumerRecord) -> list[str]:
    """The error of a job, or those of its texts."""
    answer = json.loads(record.value)
    errors = [answer.get("error"), *(datum.get("error") for datum in answer.get("data", []))]
    return [error["code"] for error in errors if error]


def size(records: list[ConsumerRecord]) -> int:
    return sum(len(record.value) for record in records)


async def test_every_figure_is_what_came_out(stack: DevStack, tmp_path: Path) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=PARTITIONS)
    first = make_tiny_qwen3(tmp_path / "models/first", seed=1, max_tokens=64)
    make_tiny_qwen3(tmp_path / "models/second", seed=2, max_tokens=64)
    replica = Replica(stack, topics, first, tmp_path / "log", commit_interval_ms=100)

    async def shows(**wanted: float) -> None:
        async def shown() -> bool:
            found = await replica.metrics()
            return all(found.get(f"embedq_{name}") == value for name, value in wanted.items())

        await wait_until(shown, what=f"{wanted} at /metrics")

    async with (
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
        reader(stack, topics.status) as said,
        replicas(replica),
    ):
        # One after the other, so that each poll is known: equal texts of one poll are computed once.
        jobs: list[tuple[str, bytes]] = [
            (topics.jobs, json.dumps({"id": "list", "input": ["one", "two", "two"]}).encode()),
            (topics.bulk, json.dumps({"id": "bulk", "input": "three"}).encode()),
            # In bulk: a lone interactive text may run while the cache is asked for it, and count although it was there.
            (topics.bulk, json.dumps({"id": "again", "input": "one"}).encode()),
            (topics.bulk, json.dumps({"id": "cut", "input": LONG, "truncate": "end"}).encode()),
            (topics.jobs, json.dumps({"id": "long", "input": ["four", "another " + LONG]}).encode()),
            (topics.jobs, b"{"),
        ]
        for number, (topic, value) in enumerate(jobs, start=1):
            await client.send_and_wait(topic, value)
            await results.until(number)
        await letters.until(1)
        command = {"alias": "default", "version": 1, "path": "second", "command_id": "c"}
        for version in (1, 1):  # the second one asks for what is there already
            record = json.dumps(command | {"version": version}).encode()
            await client.send_and_wait(topics.control, record, key=b"default", partition=0)
        await shows(
            **{'reloads_total{outcome="ready"}': 1, 'reloads_total{outcome="ignored"}': 1, "ready": 1}
        )
        # The gauges of the intake follow at its next look.
        lag = {
            f'lag_records{{partition="{number}",topic="{topic}"}}': 0
            for topic in topics.lanes
            for number in range(PARTITIONS)
        }
        await shows(**lag)
        # Status records are published all the time, and counted with the results: some before, some after this look.
        before = list(await said.all())[:-1]  # the last one may be written and not yet counted
        found = {
            name.removeprefix("embedq_"): value
            for name, value in (await replica.metrics()).items()
            if name.startswith("embedq_")
        }
        after = await said.all()
        answers = await results.all()
        buried = await letters.all()

    by_id = {record.key.decode(): record for record in answers if record.key}
    lanes = {"bulk": ["bulk", "again", "cut"], "interactive": ["list", "long"]}
    statuses = Counter(
        value.decode() for record in answers for name, value in record.headers if name == STATUS
    )

    # -- intake --
    assert found['records_total{lane="interactive"}'] == 3
    assert found['records_total{lane="bulk"}'] == 3
    for status, count in statuses.items():
        assert sum(found[f'jobs_total{{lane="{lane}",status="{status}"}}'] for lane in lanes) == count, status
    for lane, ids in lanes.items():
        vectors = sum(datum.get("embedding") is not None for name in ids for datum in data(by_id[name]))
        assert found[f'inputs_total{{lane="{lane}"}}'] == vectors
        assert found[f'in_flight_jobs{{lane="{lane}"}}'] == 0
        assert found[f'in_flight_bytes{{lane="{lane}"}}'] == 0
        assert found[f'paused{{lane="{lane}"}}'] == 0
        assert found[f'waiting_tokens{{lane="{lane}"}}'] == 0
    for code, count in Counter(code for record in answers for code in codes(record)).items():
        assert found[f'errors_total{{code="{code}"}}'] == count, code
    assert found['dead_letters_total{code="malformed"}'] == len(buried) == 1
    assert found["deduplicated_total"] == 1
    assert found["truncated_total"] == sum(datum["truncated"] for datum in data(by_id["cut"])) == 1
    assert found['commits_total{outcome="ok"}'] >= 1
    assert found['commits_total{outcome="error"}'] == found['commits_total{outcome="fenced"}'] == 0
    assert found["rebalances_total"] >= 1
    assert sum(value for name, value in found.items() if name.startswith("lag_records{")) == 0
    assert found["assigned_partitions"] == 2 * PARTITIONS

    # -- micro-batches: one, two, three, four and the cut text are computed, each once --
    tokens = {name: [datum.get("tokens", 0) for datum in data(by_id[name])] for name in by_id}
    computed = sum([*tokens["list"][:2], *tokens["bulk"], *tokens["cut"], tokens["long"][0]])
    assert found["tokens_total"] == found["batch_tokens_sum"] == computed
    assert found["batch_items_sum"] == 5
    assert (
        found["batch_tokens_count"]
        == found["batch_items_count"]
        == found["batch_fill_ratio_count"]
        == found["compute_seconds_count"]
    )
    assert found["batch_fill_ratio_sum"] == pytest.approx(computed / found["batch_budget_tokens"])
    assert found["batch_splits_total"] == 0

    # -- stages: each job passed each of them --
    assert found['queue_seconds_count{lane="interactive"}'] == 2
    assert found['queue_seconds_count{lane="bulk"}'] == 2  # one of three came from the cache
    assert found["tokenize_seconds_count"] == 4  # polls with a text that the cache did not have
    assert found['job_seconds_count{lane="interactive"}'] == 3
    assert found['job_seconds_count{lane="bulk"}'] == 3
    assert found["publish_seconds_count"] == 6
    for stage in ("tokenize_seconds_sum", "compute_seconds_sum", "publish_seconds_sum"):
        assert 0 < found[stage] < sum(found[f'job_seconds_sum{{lane="{lane}"}}'] for lane in lanes)

    # -- cache --
    assert found['cache_lookups_total{outcome="hit"}'] == 1
    assert found['cache_lookups_total{outcome="miss"}'] == 6  # `two` is asked for once
    assert found['cache_writes_total{outcome="ok"}'] == 5  # and written once
    assert found['cache_seconds_count{operation="get"}'] >= 4
    assert found['cache_seconds_count{operation="put"}'] >= 3
    assert found["cache_breaker_open"] == 0

    # -- results --
    least, most = [*answers, *buried, *before], [*answers, *buried, *after]
    assert len(least) <= found["results_total"] <= len(most)
    assert size(least) <= found["result_bytes_total"] <= size(most)
    assert found["producer_restarts_total"] == 0

    # -- model --
    assert found["ready"] == 1
    assert found['reloads_total{outcome="ready"}'] == 1
    version = json.loads(by_id["list"].value)["model_version"]
    (serving,) = (name for name in found if name.startswith("model_info{"))
    assert found[serving] == 1
    assert 'model_info{alias="default",hidden_size="256",' in serving
    assert version not in serving  # another model serves than the one that answered
    assert found['reload_step_seconds_count{step="load"}'] >= 1
    assert found["loop_heartbeat_age_seconds"] < patient(30)
