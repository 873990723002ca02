"""What `embedq dev` does: it runs the stack, creates its topics, runs a gateway, and a replica if asked to, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Final

from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev.errors import DevStackError
from embedq_sdk.dev.ports import HOST, USUAL_GATEWAY, free_ports, is_free
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.stack import DevStack
from embedq_sdk.errors import EmbedError

_CONSUMER: Final = "consumer"
_GATEWAY: Final = "gateway"
_NAMES: Final = {_CONSUMER: "replica", _GATEWAY: "gateway"}
"""What users call them."""
_CHECK_EVERY_S: Final = 0.2
_DRAIN_GRACE_S: Final = 60.0
"""For the replica to finish what it accepted: twice its default drain timeout."""
_GATEWAY_GRACE_S: Final = 10.0
"""For the gateway to answer what it accepted; before the replica stops, which answers it."""
_LOST_GRACE_S: Final = 2.0
"""Without Kafka there is nothing that it could finish."""
DEFAULT_HTTP_PORT: Final = 9464
"""The service's own default."""


def run(
    model: str | None = None,
    topics: bool = True,
    *,
    brokers: int = 1,
    consumer_log: Path | None = None,
    http_port: int = DEFAULT_HTTP_PORT,
    echo: Callable[[str], None] | None = None,
) -> int:
    """Run Kafka, Redis and a gateway until Ctrl-C or SIGTERM. Must be called from the main thread, since it handles signals.

    Args:
        model: a model directory; one replica of the service serves it.
        topics: whether to create embedq's topics. Without them there is no gateway either.
        brokers: nodes of the Kafka cluster.
        consumer_log: the file that the replica's log is appended to; None: standard output.
        http_port: where the replica serves `/livez`, `/readyz` and `/metrics`; 0: any free port.
        echo: called with each line for the user; None: standard output.

    Returns:
        The exit code: 0 after a signal; 1 if something could not start, or ended by itself, which `echo` explains.
    """
    say = echo or _to_screen
    if model is not None and not Path(model).is_dir():
        say(f"{model} is not a directory")
        return 1
    if model is not None and http_port and not is_free(http_port, os.environ.get("EMBEDQ_HTTP_HOST", HOST)):
        say(f"port {http_port} is in use: choose another one with --http-port, or 0 for any free one")
        return 1
    try:
        with (
            _on_signals(signal.default_int_handler),  # so that SIGTERM interrupts the start as Ctrl-C does
            DevStack(brokers=brokers, report=say, usual_ports=True) as stack,
            Processes() as consumers,
        ):
            _introduce(stack, say)
            if topics:
                _create_topics(stack.kafka_servers)
                say("embedq's topics exist.")
            if model is not None:
                _start_consumer(consumers, stack, Path(model), http_port)
                say(f"A replica is loading {model}.")
            started = [_CONSUMER] if model is not None else []
            if topics:
                started += _start_gateway(consumers, stack, say)
            say("Press Ctrl-C to stop.")
            with _following(consumers.log(_CONSUMER), consumer_log) as copy_log:
                longest_s = _DRAIN_GRACE_S
                try:
                    _watch(stack, consumers, started, copy_log)
                except DevStackError as error:
                    say(str(error))  # now, since ending takes a while
                    longest_s = _LOST_GRACE_S
                    return 1
                finally:  # while Kafka still runs, to take the replica's last results
                    consumers.stop(_GATEWAY, grace_s=min(longest_s, _GATEWAY_GRACE_S))
                    consumers.stop(_CONSUMER, grace_s=longest_s)
    except KeyboardInterrupt:
        pass
    except (DevStackError, EmbedError) as error:
        say(str(error))
        return 1
    say("Stopped.")
    return 0


def _introduce(stack: DevStack, say: Callable[[str], None]) -> None:
    say(stack.kafka_description)
    say(stack.redis_description)
    say("In another terminal:")
    say(f"  export EMBEDQ_KAFKA_SERVERS={stack.kafka_servers}")
    say(f"  export EMBEDQ_REDIS_URL={stack.redis_url}")


def _create_topics(servers: str) -> None:
    asyncio.run(create_topics(servers))


def _start_consumer(consumers: Processes, stack: DevStack, model: Path, http_port: int) -> None:
    consumers.start(
        _CONSUMER,
        [sys.executable, "-m", "embedq_consumer"],
        {
            "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
            "EMBEDQ_REDIS_URL": stack.redis_url,
            "EMBEDQ_MODEL": str(model.absolute()),
            "EMBEDQ_HTTP_PORT": str(http_port),
            # It runs in another directory, and must find a checkout that is not installed there too.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )


def _start_gateway(processes: Processes, stack: DevStack, say: Callable[[str], None]) -> list[str]:
    """Start a gateway, if its packages are there; what was started. Its settings are the environment's, as everywhere."""
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("embedq_gateway") is None:
        say("No HTTP gateway: pip install 'embedq[gateway]' for one.")
        return []
    host = os.environ.get("EMBEDQ_GATEWAY_HOST", HOST)
    port = os.environ.get("EMBEDQ_GATEWAY_PORT") or str(free_ports(1, USUAL_GATEWAY)[0])
    mine = {
        "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
        "EMBEDQ_GATEWAY_PORT": port,
        # Files and batches are gone with the stack, as all else is.
        "EMBEDQ_GATEWAY_FILES": os.environ.get("EMBEDQ_GATEWAY_FILES", str(processes.directory / "files")),
        "EMBEDQ_GATEWAY_DRAIN_DELAY_S": os.environ.get("EMBEDQ_GATEWAY_DRAIN_DELAY_S", "0"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    processes.start(_GATEWAY, [sys.executable, "-m", "embedq_gateway"], mine)
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if os.environ.get("EMBEDQ_GATEWAY_TLS_CERTFILE") else "http"
    say(f"A gateway answers at {scheme}://{shown}:{port}; for OpenAI's clients:")
    say(f"  export OPENAI_BASE_URL={scheme}://{shown}:{port}/v1")
    return [_GATEWAY]


def _watch(
    stack: DevStack, processes: Processes, started: Sequence[str], copy_log: Callable[[], None]
) -> None:
    """Wait for a signal.

    Raises:
        DevStackError: a process ended by itself.
    """
    signaled = threading.Event()
    with _on_signals(lambda *_: signaled.set()):
        while not signaled.wait(_CHECK_EVERY_S):
            copy_log()
            stack.check()
            for name in started:
                if (code := processes.exit_code(name)) is not None:
                    tail = "" if name == _CONSUMER else f":\n{processes.log_tail(name)}"
                    raise DevStackError(f"the {_NAMES[name]} ended with exit code {code}{tail}")


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `handler` inside the block."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def _following(log: Path, target: Path | None) -> Iterator[Callable[[], None]]:
    """A function that copies what was added to `log` since its last call to `target`, or else to standard output."""
    with contextlib.ExitStack() as files:
        output: BinaryIO = sys.stdout.buffer if target is None else files.enter_context(open(target, "ab"))
        log.touch()
        source = files.enter_context(open(log, "rb"))

        def copy() -> None:
            output.write(source.read())
            output.flush()

        try:
            yield copy
        finally:
            copy()


def _to_screen(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
