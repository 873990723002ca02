"""What `embedq dev` does: the stack, its topics, perhaps a consumer, until Ctrl-C."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev.errors import DevStackError
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.stack import DevStack
from embedq_sdk.errors import EmbedError

_CONSUMER = "consumer"
_LOOK_EVERY_S = 0.2
_DRAIN_GRACE_S = 60.0


def run(
    model: str | None = None,
    topics: bool = True,
    *,
    brokers: int = 1,
    consumer_log: Path | None = None,
    echo: Callable[[str], None] | None = None,
) -> int:
    """Run Kafka and Redis until Ctrl-C or SIGTERM, and return the exit code.

    `model`: a model directory; one consumer serves it, its log lines on the screen or appended to
    `consumer_log`. `topics`: create embedq's topics. `echo` receives each line for the user.

    Call it from the main thread: it listens to signals. 0 is a wanted end; 1 says that something could not
    start or ended by itself, which was told through `echo`.
    """
    say = echo or _to_screen
    if model is not None and not Path(model).is_dir():
        say(f"{model} is not a directory")
        return 1
    try:
        with (
            _on_signals(signal.default_int_handler),  # SIGTERM too interrupts the start
            DevStack(brokers=brokers, report=say) as stack,
            Processes() as beside,
        ):
            _introduce(stack, say)
            if topics:
                _create_topics(stack.kafka_servers)
                say("embedq's topics are there.")
            if model is not None:
                _start_consumer(beside, stack, Path(model))
                say(f"A consumer loads {model}.")
            say("Press Ctrl-C to stop.")
            with _following(beside.log(_CONSUMER), consumer_log) as copy_log:
                try:
                    _watch(stack, beside if model is not None else None, copy_log)
                finally:  # while Kafka is still there to take the consumer's last results
                    beside.stop(_CONSUMER, grace_s=_DRAIN_GRACE_S)
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


def _start_consumer(beside: Processes, stack: DevStack, model: Path) -> None:
    beside.start(
        _CONSUMER,
        [sys.executable, "-m", "embedq_consumer"],
        {
            "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
            "EMBEDQ_REDIS_URL": stack.redis_url,
            "EMBEDQ_MODEL": str(model.absolute()),
            # Its directory is not this one; a checkout that is not installed is found all the same.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )


def _watch(stack: DevStack, beside: Processes | None, copy_log: Callable[[], None]) -> None:
    """Return when told to by a signal. Raises DevStackError when a process ends by itself."""
    told = threading.Event()
    with _on_signals(lambda *_: told.set()):
        while not told.wait(_LOOK_EVERY_S):
            copy_log()
            stack.check()
            if beside is not None and (code := beside.exit_code(_CONSUMER)) is not None:
                raise DevStackError(f"the consumer ended with exit code {code}")


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM by `handler` inside the block."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def _following(log: Path, target: Path | None) -> Iterator[Callable[[], None]]:
    """Give a function that copies what was added to `log` since its last call."""
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
