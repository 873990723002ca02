"""The blocking client on a real Kafka: its verbs, and programs that fork, are interrupted, serve requests, or just end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedq_sdk.blocking import EmbedClient
from tests.helpers.fake_service import expected, rows
from tests.helpers.fresh import ROOT, command, environment
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

Responders = Callable[..., Responder]

BEGINNING = """
import os, sys, threading, time
import numpy as np
from embedq_sdk.blocking import EmbedClient
from tests.helpers.fake_service import expected

SERVERS, PREFIX, TIMEOUT = sys.argv[1], sys.argv[2], float(sys.argv[3])
client = EmbedClient(SERVERS, topic_prefix=PREFIX, connect_timeout=TIMEOUT)

def check(text="x"):
    assert np.array_equal(client.embed(text, timeout=TIMEOUT), expected(text))
"""


class Running:
    """A program in a strict interpreter, beside the test's event loop in which the responder answers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        return await asyncio.to_thread(self.process.stdout.readline)

    async def printed(self) -> str:
        """What it prints when it ends well, and says nothing else."""
        out, err = await asyncio.to_thread(self.process.communicate, timeout=patient(60))
        assert (self.process.returncode, err) == (0, ""), f"{self.process.returncode}\n{out}\n{err}"
        return out


def program(servers: str, prefix: str, source: str) -> Running:
    return Running(
        subprocess.Popen(
            command(BEGINNING + source, servers, prefix, str(patient(60))),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


async def test_every_verb_from_threads_of_a_pool(servers: str, prefix: str, responder: Responders) -> None:
    texts = [f"text {n}" for n in range(50)]

    def verbs() -> None:
        with EmbedClient(servers, topic_prefix=prefix, connect_timeout=patient(10)) as client:
            found = client.results(from_beginning=False, timeout=patient(20))
            assert np.array_equal(client.embed(texts), rows(texts))
            assert client.embed_detailed(["one two"]).total_tokens == 2
            assert np.array_equal(client.embed_many(iter(texts), batch_size=8), rows(texts))
            items = list(client.stream(iter(texts), batch_size=8, in_flight=16))
            assert np.array_equal(
                np.stack([item.vector for item in items if item.vector is not None]), rows(texts)
            )
            with ThreadPoolExecutor(8) as threads:
                assert np.array_equal(np.stack(list(threads.map(client.embed, texts))), rows(texts))
            found.close()
            id = client.submit("later", id="blocking-1")
            for result in client.results(from_beginning=True, timeout=patient(20)):
                if result.id == id:
                    assert np.array_equal(np.asarray(result)[0], expected("later"))
                    break
            else:
                raise AssertionError("no result")
            assert client.in_flight == 0

    async with responder():
        await asyncio.to_thread(verbs)


async def test_a_group_reads_each_result_once(servers: str, prefix: str, responder: Responders) -> None:
    """What a reader left unread is read by the next one: an iterator that is closed commits."""

    def both() -> list[str]:
        with EmbedClient(servers, topic_prefix=prefix, connect_timeout=patient(10)) as client:
            for n in range(4):
                client.submit("x", id=f"group-{n}")
            found: list[str] = []
            results = client.results(group=f"{prefix}.readers", timeout=patient(20), from_beginning=True)
            while len(found) < 2:
                if (id := next(results).id) and id.startswith("group-"):
                    found.append(id)
            results.close()
            rest = []
            for result in client.results(group=f"{prefix}.readers", timeout=patient(20), from_beginning=True):
                if (id := result.id) and id.startswith("group-"):
                    rest.append(id)
                if len(set(found + rest)) == 4:
                    break
            assert found[0] not in rest  # it was read: the next one was asked for
            return sorted({*found, *rest})

    async with responder():
        assert await asyncio.to_thread(both) == [f"group-{n}" for n in range(4)]


async def test_a_forked_child_and_its_parent_go_on_beside_each_other(
    servers: str, prefix: str, responder: Responders
) -> None:
    """A child that closed its copy of the parent's sockets, or of its poll, would end the parent's replies."""
    source = """
import gc
check()
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        gc.collect()
        check("of the child")
        sys.exit()
    check("of the parent")
    assert os.waitpid(pid, 0)[1] == 0
    for n in range(20):
        check(str(n))
"""
    async with responder():
        await program(servers, prefix, source).printed()


async def test_workers_of_multiprocessing_fork_or_unpickle_it(
    servers: str, prefix: str, responder: Responders
) -> None:
    source = """
import multiprocessing
check()
for method in ("fork", "spawn"):
    with multiprocessing.get_context(method).Pool(2) as pool:
        vectors = pool.map(client.embed, ["a", "b", "c", "d"])
        pool.close()
        pool.join()
    assert np.array_equal(np.stack(vectors), np.stack([expected(text) for text in "abcd"]))
check()
"""
    async with responder():
        await program(servers, prefix, source).printed()


async def test_a_program_that_closes_nothing_ends_quietly(
    servers: str, prefix: str, responder: Responders
) -> None:
    source = "check()\nitems = client.stream(iter('abc' * 50), batch_size=1)\nnext(items)\nprint('end')"
    async with responder():
        assert await program(servers, prefix, source).printed() == "end\n"


async def test_flask_serves_with_one_client_in_many_threads(
    servers: str, prefix: str, responder: Responders
) -> None:
    source = """
import json, urllib.request
from concurrent.futures import ThreadPoolExecutor
from flask import Flask, request
from werkzeug.serving import make_server

app = Flask("app")

@app.post("/search")
def search():
    return {"vector": client.embed(request.get_json()["query"], timeout=TIMEOUT).tolist()}

server = make_server("127.0.0.1", 0, app, threaded=True)
import logging
logging.getLogger("werkzeug").setLevel(logging.ERROR)
threading.Thread(target=server.serve_forever, daemon=True).start()

def ask(query):
    body = json.dumps({"query": query}).encode()
    headers = {"content-type": "application/json"}
    address = f"http://127.0.0.1:{server.server_port}/search"
    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=TIMEOUT) as answer:
        return json.load(answer)["vector"]

queries = [f"query {n}" for n in range(40)]
with ThreadPoolExecutor(8) as threads:
    assert list(threads.map(ask, queries)) == [expected(query).tolist() for query in queries]
server.shutdown()
server.server_close()
"""
    async with responder():
        await program(servers, prefix, source).printed()


async def test_a_cell_of_a_notebook_blocks_its_loop_and_is_answered(
    servers: str, prefix: str, responder: Responders
) -> None:
    source = """
import asyncio
async def cell():
    check()
    assert len(list(client.stream(["a", "b"]))) == 2
    client.close()
asyncio.run(cell())
"""
    async with responder():
        await program(servers, prefix, source).printed()


async def test_ctrl_c_leaves_a_call_and_the_program_in_time(
    servers: str, prefix: str, responder: Responders
) -> None:
    source = """
try:
    with client:
        print("waiting", flush=True)
        client.embed("never answered", timeout=3600)
except KeyboardInterrupt:
    print("left")
"""
    async with responder() as service:
        service.behave = lambda job: None
        running = program(servers, prefix, source)
        assert await running.line() == "waiting\n"
        await wait_until(lambda: len(service.received) == 1, what="the job at the service")
        running.process.send_signal(signal.SIGINT)
        assert await running.printed() == "left\n"
