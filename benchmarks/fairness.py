"""How long one client's short jobs wait beside another's flood: alone, beside each kind of flood, and beside a bulk backlog.

One machine, one replica, and its own broker: this client, the broker and the replica share its cores. Each flood lies in
Kafka before the first of the other client's jobs is sent, so those stand behind it in their partitions. Waits are
client to client, in seconds, and in micro-batches that ended meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
import urllib.request
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from aiokafka import AIOKafkaProducer
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import write
from benchmarks.pipeline import minilm, replica
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics

_ENDED, _TOKENS = "embedq_compute_seconds_count", "embedq_tokens_total"
FLOODS = ("equal", "single", "books", "bulk")
_BATCH_BYTES = 900_000
_BATCH_RECORDS = {"interactive": 1, "bulk": 1000}
"""So that a flood lies in all partitions, be it of few jobs; one of a million is written in some 10 s."""
ALLOWANCES = {"equal": (1, 0.05), "single": (2, 0.0), "books": (2, 0.0), "bulk": (1, 0.05)}
"""What a flood may add to the p99 of an interactive job, in micro-batches and in seconds. Micro-batches are whole ones, as the flood alone
has them, but for equal inputs, which fill none: there it is the mean. Of a bulk backlog 50 ms are for what the event loop does meanwhile,
and of equal inputs for their large results."""
_WARM_S, _ALONE_S = 3.0, 5.0
"""A flood's first seconds, in which the service finds out how much to start, and those in which it is measured alone."""
_WORDS = ("the tide turns twice a day and nobody asks why it does so while the harbor waits for boats",)


def equal_inputs(jobs: int) -> Iterable[bytes]:
    """Jobs of 8 KB, each of 2,048 equal texts."""
    for number in range(jobs):
        text = f"{number % 10}"
        yield json.dumps({"input": [text] * 2048, "id": f"equal-{number}"}, separators=(",", ":")).encode()


def single_texts(jobs: int) -> Iterable[bytes]:
    """Jobs of one text of some 25 tokens, no two alike."""
    for number in range(jobs):
        yield json.dumps({"input": f"{number} {_WORDS[0]}", "id": f"single-{number}"}).encode()


def small_texts(jobs: int) -> Iterable[bytes]:
    """Jobs of one text of some 5 tokens, no two alike."""
    for number in range(jobs):
        yield b'{"input":"note %d","id":"bulk-%d"}' % (number, number)


def books(jobs: int) -> Iterable[bytes]:
    """Jobs of one text of 20,000 words, in windows."""
    for number in range(jobs):
        text = " ".join(f"{number}.{at} {_WORDS[0]}." for at in range(1000))
        yield json.dumps({"input": text, "chunk": {"mode": "mean"}, "id": f"book-{number}"}).encode()


async def preload(
    stack: DevStack, topic: str, values: Iterable[bytes], client: bytes, batch_records: int
) -> int:
    """Put one client's jobs into a topic, whole batches over its partitions in turn; how many."""
    producer = AIOKafkaProducer(bootstrap_servers=stack.kafka_servers, max_batch_size=_BATCH_BYTES)
    await producer.start()
    count = sent = 0
    batch = producer.create_batch()

    async def send() -> None:
        nonlocal batch, sent
        batch.close()
        await producer.send_batch(batch, topic, partition=sent % 4)
        batch, sent = producer.create_batch(), sent + 1

    for value in values:
        if batch.record_count() == batch_records:
            await send()
        record = {"key": None, "value": value, "timestamp": None, "headers": [("client-id", client)]}
        if batch.append(**record) is None:
            await send()
            batch.append(**record)
        count += 1
    if batch.record_count():
        await send()
    await producer.flush()
    await producer.stop()
    return count


class Wait(NamedTuple):
    """Of one call, in seconds."""

    seconds: float
    micro_batches: float
    """That ended meanwhile, its own among them."""
    formed_s: float
    """From the poll until its micro-batch was formed."""
    computed_s: float
    """In its own micro-batch."""

    @property
    def else_s(self) -> float:
        """Through Kafka, there and back, and behind micro-batches that were formed before its own."""
        return self.seconds - self.formed_s - self.computed_s


async def waits(client: EmbedClient, address: str, count: int, name: str) -> list[Wait]:
    """One text at a time. The first one comes when nobody has asked for long."""
    found = []
    for number in range(count + 1):
        before = await asyncio.to_thread(metrics, address)
        started = time.perf_counter()
        [timings] = (await client.embed_detailed(f"{name} {number}", timeout=300)).timings
        seconds = time.perf_counter() - started
        after = await asyncio.to_thread(metrics, address)
        ended = after[_ENDED] - before[_ENDED]
        found.append(Wait(seconds, ended, timings.queue or 0.0, timings.compute or 0.0))
    return found


def metrics(address: str) -> dict[str, float]:
    """The replica's samples."""
    with urllib.request.urlopen(f"{address}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}


class Flooded(NamedTuple):
    """How the service works while nobody asks."""

    answered_per_s: float
    micro_batch_s: float
    device_busy: float
    """The share of the time in which a micro-batch ran."""
    processor_ms_a_token: float


async def flooded(address: str) -> Flooded:
    """Wait until a flood is under way, and measure it alone."""
    before = await asyncio.to_thread(metrics, address)
    while before[_ENDED] < 1:
        await asyncio.sleep(0.05)
        before = await asyncio.to_thread(metrics, address)
    await asyncio.sleep(_WARM_S)
    before, began = await asyncio.to_thread(metrics, address), time.perf_counter()
    await asyncio.sleep(_ALONE_S)
    after, took = await asyncio.to_thread(metrics, address), time.perf_counter() - began

    def grew(start: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(start))

    batches, computed_s, tokens = (grew(key) for key in (_ENDED, "embedq_compute_seconds_sum", _TOKENS))
    return Flooded(
        grew("embedq_jobs_total") / took,
        computed_s / batches if batches else 0.0,
        computed_s / took,
        1000 * grew("process_cpu_seconds_total") / tokens if tokens else 0.0,
    )


async def beside(
    stack: DevStack,
    model: Path,
    name: str,
    flood: tuple[str, Iterable[bytes]],
    count: int,
    module: str,
    *,
    fills: bool = False,
) -> dict[str, Any]:
    """The waits of a client that comes to a flood; the replica starts when the flood lies in Kafka. A flood that `fills`
    micro-batches is measured alone before."""
    prefix = f"f{abs(hash(name)):x}"  # topics of its own: what is left of one flood does not delay the next
    await create_topics(stack.kafka_servers, prefix=prefix, partitions=4, reply_partitions=4)
    lane, values = flood
    topic = Topics(prefix).bulk if lane == "bulk" else Topics(prefix).jobs
    with tempfile.TemporaryDirectory() as scratch:
        async with EmbedClient(stack.kafka_servers, topic_prefix=prefix) as client:
            jobs = await preload(stack, topic, values, b"flood", _BATCH_RECORDS[lane])
            async with replica(stack, model, Path(scratch) / "log", prefix, module=module) as address:
                unasked = await flooded(address) if fills else None
                before = await asyncio.to_thread(metrics, address)
                began = time.perf_counter()
                found = await waits(client, address, count, name)
                after = await asyncio.to_thread(metrics, address)
                took = time.perf_counter() - began

    first, *found = found

    def grew(sample: str) -> float:
        return after.get(sample, 0.0) - before.get(sample, 0.0)

    def mean_s(name: str) -> float:
        """Of the interactive lane's jobs, the flood's among them if it is one of that lane."""
        sample = f'embedq_{name}_seconds_%s{{lane="interactive"}}'
        return round(grew(sample % "sum") / max(1.0, grew(sample % "count")), 4)

    batches = grew(_ENDED)
    mean = grew("embedq_compute_seconds_sum") / batches if batches else 0.0
    answered = sum(grew(key) for key in after if key.startswith("embedq_jobs_total"))
    left = (
        jobs + count + 1 - sum(value for key, value in after.items() if key.startswith("embedq_jobs_total"))
    )
    p50, p99 = np.percentile([wait.seconds for wait in found], [50, 99])

    def median(values: Iterable[float]) -> float:
        return round(float(np.median([*values])), 4)

    return {
        "flood_jobs": jobs,
        "unanswered_at_the_end": round(left),
        "answered_per_s": round(answered / took, 1),
        "answered_per_s_before": unasked and round(unasked.answered_per_s, 1),
        "whole_micro_batch_s": round(unasked.micro_batch_s, 4) if unasked else None,
        "device_busy_before": round(unasked.device_busy, 4) if unasked else None,
        "processor_ms_a_token_before": round(unasked.processor_ms_a_token, 4) if unasked else None,
        "first_s": round(first.seconds, 4),
        "p50_s": round(float(p50), 4),
        "p99_s": round(float(p99), 4),
        "max_s": round(max(wait.seconds for wait in found), 4),
        "until_formed_p50_s": median(wait.formed_s for wait in found),
        "computed_p50_s": median(wait.computed_s for wait in found),
        "else_p50_s": median(wait.else_s for wait in found),
        "polled_to_micro_batch_mean_s": mean_s("queue"),
        "polled_to_answered_mean_s": mean_s("job"),
        "micro_batch_s": round(mean, 4),
        "micro_batches_p50": median(wait.micro_batches for wait in found),
        "micro_batches_max": max(wait.micro_batches for wait in found),
        "resident_mb": round(after.get("process_resident_memory_bytes", 0.0) / 1e6),
    }


async def run(model: Path, count: int, bulk_jobs: int, only: Collection[str], module: str) -> dict[str, Any]:
    """Each kind of flood, one after the other, in one run; first none."""
    floods: dict[str, tuple[str, str, Iterable[bytes]]] = {
        "equal": ("60 jobs of 2,048 equal inputs", "interactive", equal_inputs(60)),
        "single": ("8,000 jobs of one text", "interactive", single_texts(8000)),
        "books": ("5 books of 20,000 words", "interactive", books(5)),
        "bulk": (f"{bulk_jobs:,} bulk jobs", "bulk", small_texts(bulk_jobs)),
    }
    results: dict[str, Any] = {
        "model": model.parent.name,
        "service": module,
        "calls": count,
        "load_average": os.getloadavg(),
        "allowances": {key: {"micro_batches": batches, "s": s} for key, (batches, s) in ALLOWANCES.items()},
    }
    with DevStack() as stack:
        results["kafka"] = stack.kafka_description
        alone = results["alone"] = await beside(stack, model, "alone", ("interactive", ()), count, module)
        for key in only:
            name, lane, values = floods[key]
            found = await beside(stack, model, name, (lane, values), count, module, fills=key != "equal")
            more = found["p99_s"] - alone["p99_s"]
            batch_s = found["whole_micro_batch_s"] or found["micro_batch_s"]
            batches, seconds = ALLOWANCES[key]
            found["p99_over_alone_s"] = round(more, 4)
            found["p99_over_alone_micro_batches"] = round(more / batch_s, 2)
            found["within_the_allowance"] = more <= batches * batch_s + seconds
            results[name] = found
            print(name, found, flush=True)
    return results


def show(results: dict[str, Any]) -> None:
    """Print the table: a row for each figure, since there are more of them than floods."""
    table = Table(
        Column("beside", no_wrap=True),
        title="one client's short jobs beside another's flood, client to client",
    )
    figures = (
        "flood_jobs",
        "unanswered_at_the_end",
        "first_s",
        "p50_s",
        "p99_s",
        "max_s",
        "until_formed_p50_s",
        "computed_p50_s",
        "else_p50_s",
        "p99_over_alone_s",
        "p99_over_alone_micro_batches",
        "micro_batch_s",
        "whole_micro_batch_s",
        "answered_per_s_before",
        "device_busy_before",
        "processor_ms_a_token_before",
        "answered_per_s",
        "micro_batches_p50",
        "micro_batches_max",
        "resident_mb",
    )
    floods = {name: its for name, its in results.items() if isinstance(its, dict) and "p99_s" in its}
    for name in floods:
        table.add_column(name, justify="right")
    for figure in figures:
        found = [its.get(figure) for its in floods.values()]
        table.add_row(figure, *("" if value is None else str(value) for value in found))
    Console().print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument("--calls", type=int, default=60, help="short jobs beside each flood")
    parser.add_argument("--bulk", type=int, default=20_000, help="jobs of the bulk backlog, such as 1000000")
    parser.add_argument(
        "--only", nargs="+", choices=FLOODS, default=FLOODS, help="these floods; default: all"
    )
    parser.add_argument(
        "--module",
        default="embedq_consumer",
        help="the service: benchmarks.fixed_device is the same on a device that is only pretended",
    )
    parser.add_argument("--name", default="fairness", help="of the JSON file")
    arguments = parser.parse_args()
    model = arguments.model or minilm()
    results = asyncio.run(run(model, arguments.calls, arguments.bulk, arguments.only, arguments.module))
    show(results)
    print(write(arguments.name, results, "embedq", "torch", "transformers", "aiokafka"))


if __name__ == "__main__":
    main()
