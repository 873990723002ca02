"""What one client, topic, model or Redis may do to the jobs of all others: each thing that used to stop the service, and how long others wait.

    python -m benchmarks.bad_neighbors                        # every row, some eight minutes
    python -m benchmarks.bad_neighbors --only bomb pipes      # these

One replica of all-MiniLM-L6-v2 (or `--model tiny`) for each row, on a Kafka and a Redis of its own (three brokers where one is lost); four replicas of a tiny
model, started again whenever they end, where a job kills its process. Others' jobs come at a steady rate on all partitions
of the interactive lane, whatever becomes of their answers; waits are client to client. They are measured before the fault, and from its
first record to its end. Prints a table, writes it as JSON below benchmarks/results, and ends with code 1 if another's p99 is not
below a second, a job of others has no vector, or a replica does not end when told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import psutil
from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.admin import NewTopic
from rich.console import Console
from rich.table import Table

from benchmarks.fairness import equal_inputs, single_texts
from benchmarks.machine import write
from benchmarks.poison import beside, poison
from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import Topics
from tests.broker.service.test_reload import command, outcomes
from tests.helpers.bad_models import HARMS, copied
from tests.helpers.cluster import Cluster
from tests.helpers.delivery import administering
from tests.helpers.hostile_redis import HOSTILE, HostileRedis, hostile_redis
from tests.helpers.neighbors import Neighbors, neighbors
from tests.helpers.record_batches import ZSTD, bomb, send_batch
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.support import wait_until
from tests.helpers.tiny_models import make_tiny_bert, minilm_path

_QUIET_S: Final = 5.0
"""Before a fault: others' waits without it."""
_LEAST_S: Final = 10.0
"""A fault that takes less is repeated for so long: a p99 of some hundred jobs."""
_MOST_P99_S: Final = 1.0
_LOST: Final = 3
"""The broker that dies, and with it the only copy of one client's reply topic."""
_LOAD_TIMEOUT_S: Final = 20
"""Of the row whose load hangs; a dry run before it has no longer."""
_KILLERS_RATE: Final = 100.0


class Scene(NamedTuple):
    """Where a fault happens."""

    stack: DevStack
    topics: Topics
    replica: Replica
    client: AIOKafkaProducer
    others: Neighbors
    models: Path
    redis: HostileRedis
    """The row's cache, if it is told to be `hostile`."""
    prepared: str = ""
    """What the row's preparation made."""


Fault = Callable[[Scene], Awaitable[Iterable[str]]]
"""Lets it happen, waits until it is over, and returns what an operator is told."""


class Row(NamedTuple):
    """One thing that used to stop the service."""

    title: str
    fault: Fault
    prepare: Callable[[Scene], Awaitable[str]] | None = None
    """Comes before others' waits are measured."""
    settings: Mapping[str, Any] = {}
    module: str = "embedq_consumer"
    hostile: bool = False
    cluster: bool = False


# -- an address ----------------------------------------------------------------------------------------------------------


async def make_strict_topic(scene: Scene) -> str:
    """A reply topic that takes no record of ours."""
    topic = f"{fresh_prefix()}.strict"
    async with administering(scene.stack) as admin:
        await admin.create_topics(
            [NewTopic(topic, 1, 1, topic_configs={"message.timestamp.before.max.ms": "0"})]
        )
    return topic


async def refusing_address(scene: Scene) -> Iterable[str]:
    """Two jobs a second that name it."""
    count = int(2 * _LEAST_S)
    for number in range(count):
        await send(scene, job(f"guilty-{number}"), reply_topic=scene.prepared)
        await asyncio.sleep(_LEAST_S / count)
    async with reader(
        scene.stack, scene.prepared
    ) as taken:  # within its millisecond a record is not too old for it
        in_time = len(await taken.all())
    return [f"{in_time} answered there", *await letters(scene, count - in_time)]


async def lose_a_broker(scene: Scene) -> str:
    """A reply topic of one copy whose broker is gone, and everything else has other leaders."""
    topic = f"{fresh_prefix()}.lonely"
    async with administering(scene.stack) as admin:
        await admin.create_topics([NewTopic(topic, -1, -1, replica_assignments={0: [_LOST]})])
    assert isinstance(scene.stack, Cluster)
    await asyncio.to_thread(scene.stack.stop_kafka, _LOST, kill=True)
    await scene.others.progress(200)
    await scene.others.catch_up()
    return topic


async def lost_partition(scene: Scene) -> Iterable[str]:
    """Twenty jobs that name it."""
    for number in range(20):
        await send(scene, job(f"guilty-{number}"), reply_topic=scene.prepared)
    return await letters(scene, 20)


# -- records -------------------------------------------------------------------------------------------------------------


async def inflating_batches(scene: Scene) -> Iterable[str]:
    """A batch of 38 KB that inflates to 1.2 GB, five times."""
    data = await asyncio.to_thread(bomb, ZSTD, 1200 << 20, count=10)
    for _ in range(5):
        await send_batch(scene.client, scene.topics.jobs, 1, data)
        await asyncio.sleep(_LEAST_S / 5)
    return await letters(scene, 5)


def flood(values: Callable[[], Iterable[bytes]]) -> Fault:
    """A client's jobs all at once; it is over when the group has committed them."""

    async def fault(scene: Scene) -> Iterable[str]:
        headers = [("client-id", b"flood"), ("reply-topic", scene.topics.replies.encode())]
        partitions = sorted(await scene.client.partitions_for(scene.topics.jobs))
        sent = [
            await scene.client.send(
                scene.topics.jobs, value, partition=partitions[number % len(partitions)], headers=headers
            )
            for number, value in enumerate(values())
        ]
        ends: dict[int, int] = {}
        for record in await asyncio.gather(*sent):
            ends[record.partition] = record.offset + 1
        async with administering(scene.stack) as admin:

            async def committed() -> bool:
                found = await admin.list_consumer_group_offsets(f"{scene.topics.prefix}.embedq")
                reached = {
                    at.partition: on.offset for at, on in found.items() if at.topic == scene.topics.jobs
                }
                return all(reached.get(partition, 0) >= end for partition, end in ends.items())

            await wait_until(committed, within=300.0, what="a commit of the flood")
        return [f"{len(sent):,} jobs answered"]

    return fault


# -- model directories ---------------------------------------------------------------------------------------------------


def reloads(*names: str) -> Fault:
    """Commands to load directories that would harm, again and again."""

    async def fault(scene: Scene) -> Iterable[str]:
        told = []
        version = 0
        began = time.monotonic()
        async with reader(scene.stack, scene.topics.status) as status:
            while version < len(names) or time.monotonic() - began < _LEAST_S:
                name = names[version % len(names)]
                version += 1
                sent = await command(scene.client, scene.topics, version, name)
                [outcome] = await outcomes(status, sent, 1)
                if outcome["state"] != "FAILED":
                    raise AssertionError(f"{name} became {outcome['state']}")
                told.append(f"{name}: {outcome['error']}")
        return told

    return fault


async def hanging_loads(scene: Scene) -> Iterable[str]:
    """A load that never ends is given up; another one hangs when the replica is told to end."""
    async with reader(scene.stack, scene.topics.status) as status:
        sent = await command(scene.client, scene.topics, 1, "stuck")
        [outcome] = await outcomes(status, sent, 1)
    if "load: it did not end within" not in outcome["error"]:
        raise AssertionError(outcome["error"])
    await command(scene.client, scene.topics, 2, "stuck")
    begun = scene.models / "stuck.begun"
    await wait_until(lambda: begun.stat().st_size == 2, what="a second load")
    return [f"stuck: {outcome['error']}"]


# -- Redis ---------------------------------------------------------------------------------------------------------------


async def hostile_answers(scene: Scene) -> Iterable[str]:
    """Redis answers each look-up by something else that is no answer."""
    told: list[str] = []
    kinds = list(HOSTILE)

    def answer(keys: int) -> bytes:
        told.append(kinds[len(told) % len(kinds)])
        return HOSTILE[told[-1]](keys)

    scene.redis.answer = answer
    await asyncio.sleep(_LEAST_S)
    metrics = await scene.replica.metrics()
    return [
        f"{len(told)} look-ups answered by {', '.join(dict.fromkeys(told))}",
        *(
            f"{name} {value:.0f}"
            for name, value in metrics.items()
            if name.startswith("embedq_cache_failures_total") and value
        ),
    ]


ROWS: Final = {
    "refusing": Row("an address that refuses our records", refusing_address, prepare=make_strict_topic),
    "lost": Row("an address whose only broker is lost", lost_partition, prepare=lose_a_broker, cluster=True),
    "bomb": Row("38 KB that inflate to 1.2 GB", inflating_batches),
    "equal": Row("60 jobs of 2,048 equal inputs", flood(lambda: equal_inputs(60))),
    "single": Row("6,000 jobs of one client", flood(lambda: single_texts(6000))),
    "pipes": Row("reloads: pipes", reloads("pipe-as-config", "pipe-as-weights", "pipe-beside")),
    "hang": Row(
        "reloads: a load that hangs",
        hanging_loads,
        settings={"load_timeout_s": _LOAD_TIMEOUT_S},
        module="tests.helpers.bad_loads",
    ),
    "tokenizers": Row("reloads: tokenizers that panic or lack a token", reloads("panic", "no-unknown-token")),
    "endless": Row(
        "reloads: links to /dev/zero, sparse files of gigabytes",
        reloads("endless-link", "secret-link", "sparse-map", "sparse-tokenizer", "sparse-config"),
    ),
    "redis": Row("a Redis that answers what none does", hostile_answers, hostile=True),
}
"""But for the job that kills its process, which `benchmarks.poison` has."""
KILLS: Final = "kills"


# -- the frame -----------------------------------------------------------------------------------------------------------


def job(id: str) -> bytes:
    """A job of one text."""
    return json.dumps({"id": id, "input": f"the text of {id}", "dimensions": 32}).encode()


async def send(scene: Scene, value: bytes, *, reply_topic: str) -> None:
    """A job that wants its result there."""
    await scene.client.send_and_wait(
        scene.topics.jobs, value, headers=[("client-id", b"guilty"), ("reply-topic", reply_topic.encode())]
    )


async def letters(scene: Scene, count: int) -> list[str]:
    """The reasons of so many dead letters, once they are there."""
    async with reader(scene.stack, scene.topics.dead_letters) as dead:
        found = await dead.until(count, within=120.0)
    return [f"{len(found)} dead letters", *dict.fromkeys(map(_reason, found))]


def _reason(letter: ConsumerRecord) -> str:
    return (value_of(letter.headers, "embedq-error-message") or b"").decode()


async def run(row: Row, stack: DevStack, models: Path, log: Path, rate: float) -> dict[str, Any]:
    """One row; its figures."""
    topics = await make_topics(stack, fresh_prefix(), copies=3 if row.cluster else 1)
    async with hostile_redis() as redis:
        replica = Replica(
            stack, topics, models / "served", log, python=["-u", "-m", row.module], **row.settings
        )
        if row.hostile:
            replica.in_environment({"EMBEDQ_REDIS_URL": redis.url})
        async with replicas(replica):
            async with producer(stack) as client, neighbors(stack, topics, rate=rate) as others:
                scene = Scene(stack, topics, replica, client, others, models, redis)
                await others.progress(100)
                if row.prepare is not None:
                    scene = scene._replace(prepared=await row.prepare(scene))
                quiet = time.monotonic()
                await asyncio.sleep(_QUIET_S)
                resident = Resident(replica.pid)
                async with beside(resident.watch()):
                    begun = time.monotonic()
                    told = list(await row.fault(scene))
                    over = time.monotonic()
                lived = replica.returncode is None
            asked = time.monotonic()
            code = await replica.stop()
            ended = time.monotonic() - asked
    return {
        "before": msgspec.to_builtins(others.waited(quiet, begun)),
        "others": msgspec.to_builtins(others.waited(begun, over)),
        "seconds": round(over - begun, 1),
        "errors_of_others": len(others.errors),
        "repeats": others.repeats,
        "same_process": lived,
        "exit_code": code,
        "seconds_to_end": round(ended, 1),
        "resident_mb": {"before": resident.before_mb, "most": resident.most_mb},
        "told": list(dict.fromkeys(line[:300] for line in told)),
    }


class Resident:
    """The memory of a process, in MB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before_mb = self.most_mb = self._now()

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            self.most_mb = max(self.most_mb, self._now())
            await asyncio.sleep(0.02)

    def _now(self) -> int:
        return round(self._process.memory_info().rss / 1e6)


async def killing_job(stack: DevStack, directory: Path) -> dict[str, Any]:
    """The row of `benchmarks.poison`."""
    found = await poison(stack, "device-kill", 4, _KILLERS_RATE, directory)

    def waited(name: str) -> dict[str, Any]:
        return {("longest_s" if key == "max_s" else key): value for key, value in found[name].items()}

    return {
        "before": waited("before"),
        "others": waited("others"),
        "of_the_dead": waited("of_the_dead"),
        "seconds": found["seconds_until_the_dead_letter"],
        "errors_of_others": len(found["errors_of_others"]),
        "deaths": found["deaths"],
        "told": [f"{len(found['dead_letters'])} dead letters: {found['dead_letters'][:3]}"],
    }


def kept(found: Mapping[str, Any]) -> bool:
    """Whether what is promised holds."""
    return (
        found["others"]["p99_s"] < _MOST_P99_S
        and not found["errors_of_others"]
        and found.get("same_process", True)
        and found.get("exit_code", 0) == 0
    )


def make_models(root: Path, served: str) -> None:
    """The model that serves, and the directories that harm."""
    tiny = make_tiny_bert(root / "tiny", hidden=256, layers=2, max_tokens=2048)
    shutil.copytree(minilm_path() if served == "minilm" else tiny, root / "served")
    for name, harm in HARMS.items():
        harm.do(copied(tiny, root / name))
    (copied(tiny, root / "stuck") / "hangs").touch()


def measure(only: Collection[str], rate: float, served: str) -> dict[str, Any]:
    """Each row in turn."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, DevStack(report=print) as stack:
        kafka = stack.kafka_description
        models = Path(directory) / "models"
        make_models(models, served)
        for name in only:
            log = Path(directory) / f"{name}.log"
            load = os.getloadavg()[0]
            if name == KILLS:
                one = asyncio.run(killing_job(stack, Path(directory)))
            elif ROWS[name].cluster:
                with Cluster() as cluster:
                    one = asyncio.run(run(ROWS[name], cluster, models, log, rate))
            else:
                one = asyncio.run(run(ROWS[name], stack, models, log, rate))
            found[name] = {"title": _title(name), "load_average": load, **one, "kept": kept(one)}
            print(found[name], flush=True)
    return {"kafka": kafka, "model": served, "jobs_per_second_of_others": rate, "rows": found}


def _title(name: str) -> str:
    return "a job that kills its process, 4 replicas" if name == KILLS else ROWS[name].title


def show(rows: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table(title="others' jobs beside somebody's fault, seconds client to client")
    for column in ("beside", "jobs", "p50", "p99", "longest", "p99 before", "MB more", "ends in s", "kept"):
        table.add_column(column, justify="left" if column == "beside" else "right")
    for row in rows.values():
        memory = row.get("resident_mb")
        cells = (
            row["title"],
            row["others"]["jobs"],
            row["others"]["p50_s"],
            row["others"]["p99_s"],
            row["others"]["longest_s"],
            row["before"]["p99_s"],
            memory["most"] - memory["before"] if memory else "",
            row.get("seconds_to_end", ""),
            "yes" if row["kept"] else "NO",
        )
        table.add_row(*map(str, cells))
    Console(width=140).print(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*ROWS, KILLS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these rows; default: all")
    parser.add_argument(
        "--model",
        choices=["minilm", "tiny"],
        default="minilm",
        help="which serves; tiny: with random weights",
    )
    parser.add_argument("--rate", type=float, default=25.0, help="others' jobs a second")
    parser.add_argument("--name", default="bad_neighbors", help="of the JSON file")
    options = parser.parse_args()
    found = measure(options.only, options.rate, options.model)
    show(found["rows"])
    print(write(options.name, found, "embedq", "torch", "aiokafka"))
    return 0 if all(row["kept"] for row in found["rows"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
