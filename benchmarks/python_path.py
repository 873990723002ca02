"""What a job costs in our Python: processor time from its poll to its commit, with Kafka, Redis and the model faked.

The parts are the service's own; what stands in for the rest answers some milliseconds later, many jobs at a time, and costs
next to nothing. Nothing of aiokafka, redis and torch is in the figures, and ratios of two versions are what they are for.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from aiokafka import ConsumerRecord, TopicPartition
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write
from embedq_consumer.batching import QueuedText, SingleFlight, TextQueue, TokenBudget
from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batch_runner import BatchRunner
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.cache import CachedVector
from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits
from embedq_consumer.delivery.destination import Parcel, Settled
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.engine import Encoder, Tokens
from embedq_consumer.intake import Intake
from embedq_consumer.intake.jobs_consumer import JobsClients, PolledRecords
from embedq_consumer.intake.records import Record
from embedq_consumer.pipeline import Pipeline
from embedq_consumer.quarantine import Quarantine, Suspects
from embedq_consumer.settings import Settings
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import Topics
from tests.helpers.fake_parts import Letters, Vectors
from tests.helpers.in_flight import rules
from tests.helpers.scripted_consumer import ScriptedConsumer, ScriptedMember

TOPICS: Final = Topics("t")
PARTITIONS: Final = tuple(TopicPartition(TOPICS.jobs, number) for number in range(4))
KINDS: Final[dict[str, tuple[bool, int]]] = {
    "cached, one client": (True, 1),
    "cached, 32 clients": (True, 32),
    "computed, one client": (False, 1),
    "computed, 32 clients": (False, 32),
}
_ANY_RATE_S: Final = 1e6
"""As much is started as the other limits allow: a run is too short for the service to find out how much that should be."""


class _Sink:
    """Brokers that take everything, 3 ms later."""

    def __init__(self) -> None:
        self._waiting: list[Settled] = []

    @property
    def topics(self) -> _Sink:
        return self

    def partitions(self, topic: str) -> int | None:
        return 4

    async def refresh_topics(self) -> None: ...

    def send(self, parcels: Sequence[Parcel]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_later(0.003, self._answer)
        self._waiting += [parcel.settled for parcel in parcels]

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        for settled in waiting:
            settled(None)


class _Cache:
    def __init__(self, entry: CachedVector | None) -> None:
        self._entry = entry

    async def get_many(self, keys: Sequence[bytes]) -> list[CachedVector | None]:
        await asyncio.sleep(0.002)
        return [self._entry] * len(keys)

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> None: ...


class _Device:
    def note_failed(self, encoder: Encoder) -> None:
        """No text fails here."""

    def note_out_of_memory(self, encoder: Encoder) -> None:
        """Nor is memory short."""

    async def encode(self, encoder: Encoder, batch: Sequence[Tokens]) -> tuple[Vectors, float]:
        await asyncio.sleep(0.001)
        return np.ones((len(batch), encoder.hidden_size), dtype=np.float32), 0.001


class _Consumer(ScriptedConsumer):
    """Polls are slices of lists."""

    def __init__(self, logs: Mapping[TopicPartition, list[ConsumerRecord]]) -> None:
        super().__init__()
        self._logs = logs
        self.ends = {partition: len(log) for partition, log in logs.items()}

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> PolledRecords:
        found: dict[TopicPartition, list[ConsumerRecord]] = {}
        for partition in partitions:
            at = self.positions[partition]
            if max_records and (taken := self._logs[partition][at : at + max_records]):
                found[partition] = taken
                self.positions[partition] = at + len(taken)
                max_records -= len(taken)
        if not found:
            await asyncio.sleep(0.001)
        return found


def logs(jobs: int, clients: int) -> dict[TopicPartition, list[ConsumerRecord]]:
    """Jobs of one text each, as the SDK sends them."""
    found: dict[TopicPartition, list[ConsumerRecord]] = {partition: [] for partition in PARTITIONS}
    for number in range(jobs):
        partition = PARTITIONS[number % len(PARTITIONS)]
        job = {"input": f"{number} some text of a few words", "dimensions": 256, "encoding_format": "base64"}
        value = json.dumps(job).encode()
        found[partition].append(
            ConsumerRecord(
                topic=partition.topic,
                partition=partition.partition,
                offset=len(found[partition]),
                timestamp=1,
                timestamp_type=0,
                key=None,
                value=value,
                checksum=None,
                serialized_key_size=-1,
                serialized_value_size=len(value),
                headers=(
                    ("correlation-id", b"x" * 16),
                    ("reply-topic", b"t.replies"),
                    ("reply-partition", b"\0\0\0\1"),
                    ("client-id", b"%d" % (number % clients)),
                ),
            )
        )
    return found


async def microseconds(jobs: int, *, cached: bool, clients: int) -> float:
    """Processor time of all threads for each job."""
    settings = Settings(kafka_servers="none:9092", model="none", topic_prefix="t").named()
    consumer, member, metrics = _Consumer(logs(jobs, clients)), ScriptedMember(), Metrics()
    suspects = Suspects(settings.claimant())
    intake = Intake(
        JobsClients(consumer, member),
        msgspec.structs.replace(settings.intake, read_ahead_s=_ANY_RATE_S),
        topics=TOPICS,
        metrics=metrics,
        beat=lambda: None,
        custodian=suspects,
    )
    quarantine = Quarantine(suspects, intake.commits, intake, metrics)
    left, done = jobs, asyncio.Event()

    def finish(*records: Record) -> None:
        nonlocal left
        quarantine.finish(*records)
        left -= len(records)
        if not left:
            done.set()

    flights = SingleFlight()
    batcher = Batcher[QueuedText](
        BatchPolicy(max_tokens=2048, max_items=1024, max_wait=0.002, bulk_max_wait=5.0)
    )
    budget = TokenBudget(batcher, metrics, lambda problem: None)
    queue = TextQueue(flights, batcher, budget, metrics)
    model = Letters()
    vector = np.ones(256, np.float32).tobytes()
    entry = CachedVector(tokens=3, truncated="", scale=None, vector=vector) if cached else None
    deliverer = Deliverer(
        ResultEncoder(TOPICS, "g", 900_000), _Sink(), finish, metrics, DeliveryLimits(reply_timeout_s=15.0)
    )
    async with asyncio.TaskGroup() as tasks:
        models, queues = {"default": model}, {"default": queue}
        pipeline = Pipeline(rules(), lambda: models, _Cache(entry), queues, deliverer, tasks, intake.weigh)
        quarantine.hand_to(pipeline)
        runner = BatchRunner(flights, _Device(), budget, pipeline, metrics)
        await intake.open()
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)  # as the service has it
        started = time.process_time()
        loops = [
            tasks.create_task(loop)
            for loop in (
                BatchLoop(batcher, runner.run, metrics, tasks).run(),
                intake.run(quarantine.start, quarantine.take_unreadable, quarantine),
                quarantine.run(),
                intake.commit_forever(),
            )
        ]
        await asyncio.sleep(0)
        member.assign(*PARTITIONS)
        await done.wait()
        took = time.process_time() - started
        for loop in loops:
            loop.cancel()
        await asyncio.to_thread(queue.close)
        await asyncio.to_thread(deliverer.close)
    gc.unfreeze()
    return took / jobs * 1e6


def run(jobs: int, rounds: int, kinds: Collection[str]) -> dict[str, Any]:
    """Every kind, in turns."""
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, its in found.items():
            cached, clients = KINDS[kind]
            took = asyncio.run(microseconds(jobs if number else 1000, cached=cached, clients=clients))
            if number:  # the first round warms up
                its.append(round(took, 1))
    return {kind: {"median": statistics.median(its), "min": min(its)} for kind, its in found.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    results = run(arguments.jobs, arguments.rounds, arguments.kinds)
    table = Table(title="µs of processor time a job")
    for column in ("what", "median", "min"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for kind, value in results.items():
        table.add_row(kind, f"{value['median']:.1f}", f"{value['min']:.1f}")
    Console().print(table)
    results["load_average"] = os.getloadavg()
    print(write("python_path", results, "embedq", "aiokafka", "msgspec"))


if __name__ == "__main__":
    main()
