"""A job that kills its process, each time: how long everybody else's jobs wait until it is among the dead letters.

    python -m benchmarks.poison                             # SIGKILL in the compute thread
    python -m benchmarks.poison --word segfault             # a read of address 0 in the tokenizer's thread

Four replicas of a tiny model on a Kafka of their own, each started again whenever it ends. Jobs come at a steady rate on every
partition of the interactive lane, and waits are client to client. A job is *another's* unless its partition belonged to a dead
process at some time between its being sent and answered; whose a partition is, the group's own commits say. Prints a table,
writes it as JSON below benchmarks/results, and ends with code 1 if another's p99 is not below a second, a job is lost, or
anything but the guilty one is dead-lettered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from aiokafka.admin import AIOKafkaAdminClient

from benchmarks.machine import write
from embedq_consumer.quarantine.custody import decode
from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import Topics
from tests.helpers.service_process import (
    End,
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    supervised,
)
from tests.helpers.support import wait_until
from tests.helpers.tiny_models import make_tiny_bert

_PARTITIONS: Final = 8
_SESSION_S: Final = 6.0
_QUIET_S: Final = 5.0
"""Before the guilty job is sent, and after it is condemned."""
_LOOK_S: Final = 0.05
"""How often the group's commits are looked at; a job that is sent within this of a hand-over may count for the dead."""
_LATE_S: Final = 1.0
"""What is seen of a commit may be so late; two deaths of one replica are further apart."""
_MOST_P99_S: Final = 1.0
_WORDS: Final = ("device-kill", "tokenizer-kill", "segfault", "device-lost")


class Sent(NamedTuple):
    """A job of somebody else: where it lies, and when it was sent and answered, in monotonic seconds."""

    partition: int
    sent: float
    answered: float


class Owners:
    """Which process each partition belonged to, as the group's commits said it, and from when on."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[float, str, str]]] = defaultdict(list)

    def note(self, partition: int, at: float, owner: str, replica: str) -> None:
        """At this time the partition belonged to this process of this replica."""
        seen = self._seen[partition]
        if owner and (not seen or seen[-1][1] != owner):
            seen.append((at, owner, replica))

    def orphaned(self, deaths: Sequence[tuple[float, str]]) -> dict[int, list[tuple[float, float]]]:
        """When each partition belonged to a dead process: from the death of its replica until another one has it."""
        found: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for partition, seen in self._seen.items():
            until = [at for at, _, _ in seen[1:]] + [float("inf")]
            for (begin, _, replica), end in zip(seen, until, strict=True):
                # A process may be dead before its first commit is seen.
                died = [at for at, name in deaths if name == replica and begin - _LATE_S <= at < end]
                if died:
                    found[partition].append((min(died), end))
        return found


async def poison(stack: DevStack, word: str, count: int, rate: float, directory: Path) -> dict[str, Any]:
    """Run it once; the figures."""
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    model = make_tiny_bert(directory / "model")
    names = {}
    for number in range(count):
        one = Replica(
            stack,
            topics,
            model,
            directory / f"{number}.log",
            redis=False,
            python=[
                "-u",
                "-m",
                "tests.helpers.deadly_model",
            ],  # not from a warm process: a restart is measured
            replica=f"r{number}",
            device="cpu",
            session_timeout_ms=int(_SESSION_S * 1000),
        )
        names[one] = f"r{number}"
    owners = Owners()
    sent: dict[str, tuple[int, float]] = {}
    answered: dict[str, float] = {}
    errors: list[str] = []
    async with (
        supervised(*names) as ends,
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
    ):

        async def send() -> None:
            started = time.monotonic()
            while True:
                id, partition = f"job-{len(sent)}", len(sent) % _PARTITIONS
                sent[id] = (partition, time.monotonic())
                value = json.dumps({"input": f"text of {id}", "dimensions": 32, "id": id}).encode()
                await client.send(topics.jobs, value, partition=partition)
                await asyncio.sleep(max(0.0, started + len(sent) / rate - time.monotonic()))

        async def look() -> None:
            seen = 0
            while True:
                records = await results.all()
                now = time.monotonic()
                for record in records[seen:]:
                    answer = json.loads(record.value)
                    answered.setdefault(answer["id"], now)
                    if answer["object"] == "error":
                        errors.append(answer["error"]["code"])
                seen = len(records)

        async def condemned() -> bool:
            return bool(await letters.all())

        async with beside(send()) as sending, beside(look()), beside(_watch(stack, topics, owners)):
            await asyncio.sleep(_QUIET_S)
            begun = time.monotonic()
            guilty = json.dumps({"input": f"a {word}", "id": "guilty"}).encode()
            # Its error goes elsewhere: a condemned job is never decoded, so that the answer does not name it.
            headers = [("reply-topic", topics.replies.encode())]
            await client.send_and_wait(topics.jobs, guilty, partition=1, headers=headers)
            await wait_until(condemned, within=180.0, what="a dead letter")
            over = time.monotonic()
            await asyncio.sleep(_QUIET_S)
            sending.cancel()
            await wait_until(lambda: sent.keys() <= answered.keys(), within=120.0, what="all answers")
        buried = await letters.all()
    deaths = [(end.at, names[end.replica]) for end in ends]
    jobs = [Sent(partition, at, answered[id]) for id, (partition, at) in sent.items()]
    return _figures(jobs, owners.orphaned(deaths), (begun, over)) | {
        "word": word,
        "replicas": count,
        "jobs_per_second_sent": rate,
        "session_timeout_s": _SESSION_S,
        "deaths": len(deaths),
        "seconds_until_the_dead_letter": round(over - begun, 1),
        "dead_letters": [json.loads(letter.value)["id"] for letter in buried],
        "attempts": [(value_of(letter.headers, "embedq-attempts") or b"").decode() for letter in buried],
        "errors_of_others": errors,
        "lost": len(sent.keys() - answered.keys()),
        "exit_codes": _codes(ends),
    }


def _figures(
    jobs: Sequence[Sent], orphaned: dict[int, list[tuple[float, float]]], during: tuple[float, float]
) -> dict[str, Any]:
    begun, over = during
    groups: dict[str, list[float]] = {"before": [], "others": [], "of_the_dead": []}
    for job in jobs:
        if job.answered < begun:
            groups["before"].append(job.answered - job.sent)
        elif job.sent <= over:
            dead = any(
                job.sent < until and job.answered > since for since, until in orphaned.get(job.partition, ())
            )
            groups["of_the_dead" if dead else "others"].append(job.answered - job.sent)
    return {name: _spread(waits) for name, waits in groups.items()} | {
        "orphaned_s": sorted(
            (round(until - since, 2) for spans in orphaned.values() for since, until in spans), reverse=True
        )
    }


def _spread(waits: Sequence[float]) -> dict[str, float]:
    if not waits:
        return {"jobs": 0}
    p50, p99 = np.percentile(waits, [50, 99])
    return {
        "jobs": len(waits),
        "p50_s": round(float(p50), 4),
        "p99_s": round(float(p99), 4),
        "max_s": round(max(waits), 4),
    }


def _codes(ends: Sequence[End]) -> list[int]:
    return [end.code for end in ends]


async def _watch(stack: DevStack, topics: Topics, owners: Owners) -> None:
    """Note whose partitions are whose, until cancelled."""
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        while True:
            found = await admin.list_consumer_group_offsets(f"{topics.prefix}.embedq")
            now = time.monotonic()
            for partition, stored in found.items():
                if partition.topic == topics.jobs:
                    custody = decode(stored.metadata)
                    owners.note(partition.partition, now, custody.owner, custody.replica)
            await asyncio.sleep(_LOOK_S)
    finally:
        await admin.close()


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run it until the block ends; what it raised comes out there."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def kept(figures: dict[str, Any]) -> bool:
    """Whether what is promised holds."""
    return (
        figures["others"]["p99_s"] < _MOST_P99_S
        and not figures["lost"]
        and not figures["errors_of_others"]
        and figures["dead_letters"] == ["guilty"]
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--word", choices=_WORDS, default=_WORDS[0], help="how the job kills")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rate", type=float, default=200.0, help="others' jobs a second")
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        kafka = stack.kafka_description
        figures = asyncio.run(poison(stack, options.word, options.replicas, options.rate, Path(directory)))
    found = {"kafka": kafka, **figures, "kept": kept(figures)}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    print(write("poison", found, "embedq", "torch", "aiokafka"))
    return 0 if found["kept"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
