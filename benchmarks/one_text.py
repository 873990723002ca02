"""One short text on an idle service: milliseconds from `embed()` to its vector, hop by hop, beside the bare forward.

Client, broker, Redis and one replica share the machine, and one text is under way at a time. Both processes note when a text
passes each hop, on the clock that all processes of a machine share; what is printed is the median time since the hop before.
The bare forward is the same encoder in a process of its own, and bare Kafka a record that goes there and back between two plain
clients of the same broker (`bare_kafka`); both run in turns with the service, with the same pauses, in which caches are lost and
cores fall asleep. What is above the two is ours. A text whose forward runs while the cache is asked passes hops beside it. Forwards in a row are shown, too: nobody who asks for one text now and then has them.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bare_kafka import round_trip
from benchmarks.machine import write
from benchmarks.pipeline import minilm, replica
from benchmarks.texts import distinct
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack

TRACE: Final = "ONE_TEXT_TRACE"
"""The environment variable that names the file of the replica's marks."""
Marks = list[tuple[float, str]]
_WARM: Final = 200
_WARM_RECORDS: Final = 2_000
"""Through the broker before anything is timed: a hop over one that has just started takes half as long again (1.3 ms for bare sockets,
0.86 then), since its code is compiled as it runs."""
_IDLE_S: Final = 0.01
"""Between two texts: then the commit is over, and all is idle again."""
_RECORD: Final = bytes(400)
"""Between a short job and its vector as base64."""

CLIENT_HOPS: Final = (
    ("embedq_sdk.transport.job_sender", "Sender", "_fill", "client: batch made"),
    ("embedq_sdk.transport.job_sender", "Sender", "_answered", None),
    ("embedq_sdk.transport.job_runner", "JobRunner", "deliver", "client: reply fetched"),
)
SERVICE_HOPS: Final = (
    ("embedq_consumer.intake.poll_loop", "Intake", "_begin", "polled"),
    ("embedq_consumer.pipeline", "Pipeline", "take", "started"),
    ("embedq_consumer.cache.vector_cache", "VectorCache", "get_many", "cache asked"),
    ("embedq_consumer.batching.text_queue", "TextQueue", "join", "cache answered"),
    ("embedq_consumer.batching.text_queue", "TextQueue", "answered", "cache answered"),
    ("embedq_consumer.batching.tokenizer_pool", "TokenizerPool", "_tokens_of", "tokenizer"),
    ("embedq_consumer.batching.batcher", "Batcher", "put", "tokenized"),
    ("embedq_consumer.batching.batch_runner", "BatchRunner", "run", "micro-batch taken"),
    ("embedq_consumer.lifecycle.device", "Device", "_submit", "compute thread"),
    ("embedq_consumer.lifecycle.device", "Device", "_tokenize_and_run", "compute thread"),
    ("embedq_consumer.lifecycle.device", "Device", "_result", "forward done"),
    ("embedq_consumer.pipeline", "Pipeline", "computed", "vector on the loop"),
    ("embedq_consumer.delivery.deliverer", "Deliverer", "deliver", "postprocessed"),
    ("embedq_consumer.delivery.deliverer", "Deliverer", "_send", "encoded"),
    ("embedq_consumer.delivery.kafka_producer", "KafkaProducer", "send", "given to the producer"),
)


def trace(hops: Sequence[tuple[str, str, str, str | None]]) -> Marks:
    """Note each call of these methods from now on: when, and which."""
    marks: Marks = []
    for module, owner, name, label in hops:
        if label is not None:
            __import__(module)
            kind = getattr(sys.modules[module], owner)
            raw = inspect.getattr_static(kind, name)
            method = raw.__func__ if isinstance(raw, staticmethod) else raw
            noted = _noted(method, label, marks)
            setattr(kind, name, staticmethod(noted) if isinstance(raw, staticmethod) else noted)
    return marks


def _noted(method: Callable[..., Any], label: str, marks: Marks) -> Callable[..., Any]:
    @wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        if label != "polled" or args[1]:  # a poll that brought nothing is no hop
            marks.append((time.monotonic(), label))
        return method(*args, **kwargs)

    return noted


def serve_traced(path: Path) -> None:
    """The service, whose marks are written to `path` when it ends."""
    marks = trace(SERVICE_HOPS)
    from embedq_consumer.process import main as serve

    code = serve()
    path.write_text(json.dumps(marks))
    os._exit(code)  # as the service leaves: no thread is waited for


def measure_forward(model: Path, text: str) -> None:
    """Milliseconds of the forward of one text, a line for each line that is read."""
    from embedq_consumer.engine import Text, Tokens, load_encoder

    encoder = load_encoder(model, device="cpu")
    (found,) = encoder.tokenize([Text(text)])
    assert isinstance(found, Tokens)
    for _ in range(20):
        encoder.encode([found.ids])
    print(len(found.ids), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        encoder.encode([found.ids])
        print((time.perf_counter() - began) * 1000, flush=True)


class _Forward:
    """`measure_forward` in a process of its own."""

    def __init__(self, model: Path, text: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.one_text", "--forward", text, "--model", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tokens = int(self._read())

    def milliseconds(self) -> float:
        """One more forward."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def hops_of(spans: Sequence[tuple[float, float]], marks: Marks) -> dict[str, list[float]]:
    """Milliseconds before each hop since the one before, of each text: those that began and ended at `spans`."""
    found: dict[str, list[float]] = {}
    marks = sorted(marks)
    for began, ended in spans:
        last, seen = began, set()
        for at, label in (*((at, label) for at, label in marks if began <= at <= ended), (ended, "vector")):
            if label not in seen:  # the first time counts
                seen.add(label)
                found.setdefault(label, []).append((at - last) * 1000)
                last = at
    return found


async def run(model: Path, texts: int, rounds: int, event_loop: str) -> dict[str, Any]:
    """Everything, in one run."""
    spans: list[tuple[float, float]] = []
    bare: list[float] = []
    in_a_row: list[float] = []
    kafka: list[float] = []
    client_marks = trace(CLIENT_HOPS)
    with DevStack() as stack, tempfile.TemporaryDirectory() as scratch:
        await create_topics(stack.kafka_servers, partitions=4, reply_partitions=4)
        marks_file = Path(scratch) / "marks"
        alone = await asyncio.to_thread(_Forward, model, distinct(1, "warm")[0])
        os.environ[TRACE] = str(marks_file)
        log = Path(scratch) / "log"
        module = "benchmarks.one_text"
        async with (
            round_trip(stack.kafka_servers) as record,
            replica(stack, model, log, module=module, event_loop=event_loop, device="cpu"),
            EmbedClient(stack.kafka_servers) as client,
        ):
            for _ in range(_WARM_RECORDS):
                await record.milliseconds(_RECORD)
            for text in distinct(_WARM, "first"):
                await client.embed(text)
            for number in range(rounds):
                in_a_row += [alone.milliseconds() for _ in range(texts)]
                for _ in range(texts):
                    bare.append(alone.milliseconds())
                    await asyncio.sleep(_IDLE_S)
                for _ in range(texts):
                    kafka.append(await record.milliseconds(_RECORD))
                    await asyncio.sleep(_IDLE_S)
                for text in distinct(texts, f"r{number}."):
                    began = time.monotonic()
                    await client.embed(text)
                    spans.append((began, time.monotonic()))
                    await asyncio.sleep(_IDLE_S)
        alone.close()
        marks = [(at, label) for at, label in json.loads(marks_file.read_text())]
    totals = [(ended - began) * 1000 for began, ended in spans]
    whole, forward, there_and_back = (_percentiles(values) for values in (totals, bare, kafka))
    return {
        "model": model.parent.name,
        "tokens": alone.tokens,
        "texts": len(spans),
        "event_loop": event_loop,
        "whole_ms": whole,
        "forward_ms": forward,
        "forwards_in_a_row_ms": _percentiles(in_a_row),
        "bare_kafka_ms": there_and_back,
        "above_the_forward_p50_ms": round(whole["p50"] - forward["p50"], 2),
        "above_both_p50_ms": round(whole["p50"] - forward["p50"] - there_and_back["p50"], 2),
        "hops_p50_ms": {
            label: round(statistics.median(values), 2)
            for label, values in hops_of(spans, [*client_marks, *marks]).items()
        },
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": round(float(np.percentile(values, share)), 2) for share in (50, 90, 99)}


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"one text of {results['tokens']} tokens, {results['texts']} times, medians")
    table.add_column("until")
    table.add_column("ms", justify="right")
    for label, value in results["hops_p50_ms"].items():
        table.add_row(label, f"{value:.2f}")
    Console().print(table)
    print(f"from embed() to the vector: {results['whole_ms']} ms")
    print(f"the forward alone: {results['forward_ms']} ms; in a row {results['forwards_in_a_row_ms']}")
    print(f"a bare record there and back: {results['bare_kafka_ms']} ms")
    print(f"above the forward (p50): {results['above_the_forward_p50_ms']} ms")
    print(f"above both (p50): {results['above_both_p50_ms']} ms")


def main() -> None:
    """The command."""
    if path := os.environ.pop(TRACE, None):
        serve_traced(Path(path))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument("--texts", type=int, default=50, help="texts a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--event-loop", choices=["asyncio", "uvloop"], default="asyncio", help="the service's"
    )
    parser.add_argument("--forward", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = arguments.model or minilm()
    if arguments.forward is not None:
        measure_forward(model, arguments.forward)
        return
    results = asyncio.run(run(model, arguments.texts, arguments.rounds, arguments.event_loop))
    show(results)
    print(f"written to {write('one_text', results, 'embedq', 'torch', 'aiokafka', 'redis', 'uvloop')}")


if __name__ == "__main__":
    main()
