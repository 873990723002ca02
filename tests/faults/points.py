"""Named points of a job's path, at which a worker kills or stops itself when the harness says so.

Production code knows nothing of this: `worker.py` wraps the rooms' methods before the service starts. A point whose method
is gone fails at the worker's start, so that a change of a room cannot quietly take a fault away.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

When = Literal["before", "during", "after"]


class Point(msgspec.Struct, frozen=True):
    """A method, and whether the worker ends before it is called, while it waits, or after it returned.

    Of `methods` (`module:Class.method`) the first one counts that there is.
    """

    methods: tuple[str, ...]
    when: When


_COMMIT: Final = ("embedq_shared.kafka.group_member:GroupMember.commit", "aiokafka:AIOKafkaConsumer.commit")
_PUBLISHER: Final = "embedq_consumer.delivery.publisher:Publisher"
_HAND_OVER: Final = "embedq_consumer.group.hand_over:HandOver"
_INTAKE: Final = "embedq_consumer.intake.poll_loop:Intake"
_PIPELINE: Final = "embedq_consumer.pipeline:Pipeline"
_PRODUCER: Final = "aiokafka:AIOKafkaProducer"
_SLOT: Final = "embedq_consumer.lifecycle.model_slot:ModelSlot"

POINTS: Final[dict[str, Point]] = {
    "after_poll": Point((f"{_PIPELINE}.take",), "before"),
    "before_compute": Point(("embedq_consumer.batching.batch_runner:BatchRunner.run",), "before"),
    "after_compute": Point((f"{_PIPELINE}.computed",), "before"),
    "before_cache_write": Point(("embedq_consumer.cache:VectorCache.put_many",), "before"),
    "before_publish": Point((f"{_PUBLISHER}.send", f"{_PUBLISHER}.publish"), "before"),
    "during_publish": Point((f"{_PUBLISHER}.send", f"{_PUBLISHER}.publish"), "during"),
    "after_publish": Point((f"{_INTAKE}.finish",), "before"),
    "before_commit": Point(_COMMIT, "before"),
    "during_commit": Point(_COMMIT, "during"),
    "after_commit": Point(_COMMIT, "after"),
    "in_revocation": Point((f"{_HAND_OVER}.claim", f"{_INTAKE}.on_partitions_revoked"), "before"),
    "after_revocation": Point((f"{_HAND_OVER}.assigned", f"{_INTAKE}.on_partitions_revoked"), "after"),
    "in_assignment": Point((f"{_HAND_OVER}.assigned", f"{_INTAKE}.on_partitions_assigned"), "before"),
}
"""Points that jobs pass again and again."""

RARE_POINTS: Final = frozenset({"in_revocation", "after_revocation", "in_assignment"})
"""Those of them that only a rebalance passes."""

RELOAD_POINTS: Final[dict[str, Point]] = {
    "reload_load": Point((f"{_SLOT}.load",), "during"),
    "reload_before_swap": Point((f"{_SLOT}.install",), "before"),
    "reload_after_swap": Point((f"{_SLOT}.install",), "after"),
}
"""Points that only a reload passes."""

TRANSACTION_POINTS: Final[dict[str, Point]] = {
    "after_begin": Point((f"{_PRODUCER}.begin_transaction",), "after"),
    "before_offsets": Point((f"{_PRODUCER}.send_offsets_to_transaction",), "before"),
    "after_offsets": Point((f"{_PRODUCER}.send_offsets_to_transaction",), "after"),
    "before_end": Point((f"{_PRODUCER}.commit_transaction",), "before"),
    "during_end": Point((f"{_PRODUCER}.commit_transaction",), "during"),
    "after_end": Point((f"{_PRODUCER}.commit_transaction",), "after"),
}
"""Points of exactly-once delivery."""

ALL: Final = POINTS | RELOAD_POINTS | TRANSACTION_POINTS
_DURING_S: Final = 0.002
"""Long enough for a request to leave, and too short for its answer to have been acted on, most of the time."""


class Order(msgspec.Struct, frozen=True):
    """What the harness wants: at the `passes`-th pass of `point` the worker sends itself `signal`."""

    point: str
    passes: int
    signal: Literal["SIGKILL", "SIGSTOP"]


class Trap:
    """The order that is in force, if any. `act` is for tests; it sends this process a signal."""

    def __init__(self, act: Callable[[int], None] | None = None) -> None:
        self._act = act or (lambda number: os.kill(os.getpid(), number))
        self._order: Order | None = None
        self._left = 0

    def arm(self, order: Order) -> None:
        """From now on this order, in place of the one before."""
        self._order, self._left = order, order.passes

    def watches(self, name: str) -> bool:
        """Whether the order is about this point."""
        return self._order is not None and self._order.point == name

    def passed(self, name: str) -> None:
        """This point is passed now: the last pass of the order ends or stops the process."""
        if self._order is None or self._order.point != name:
            return
        self._left -= 1
        if self._left <= 0:
            order, self._order = self._order, None
            self._act(getattr(signal, order.signal))

    def install(self, points: dict[str, Point]) -> None:
        """Wrap the methods of these points.

        Raises:
            LookupError: none of a point's methods is there; the point must follow them.
        """
        for name, point in points.items():
            holder, method = _found(name, point)
            setattr(holder, method, self._wrapped(name, point.when, getattr(holder, method)))

    def listen(self, orders: Path) -> None:
        """Arm with what this file says each time SIGUSR1 comes, and say so beside it. Needs the main thread."""
        signal.signal(
            signal.SIGUSR1, lambda *_: self.arm(msgspec.json.decode(orders.read_bytes(), type=Order))
        )
        _listening(orders).write_text(str(os.getpid()))

    def _wrapped(self, name: str, when: When, method: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def asynchronous(*args: Any, **kwargs: Any) -> Any:
                if not self.watches(name):
                    return await method(*args, **kwargs)
                if when == "before":
                    self.passed(name)
                if when == "during":
                    running = asyncio.ensure_future(method(*args, **kwargs))
                    await asyncio.wait({running}, timeout=_DURING_S)
                    self.passed(name)
                    return await running
                result = await method(*args, **kwargs)
                if when == "after":
                    self.passed(name)
                return result

            return asynchronous

        @functools.wraps(method)
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                self.passed(name)
            result = method(*args, **kwargs)
            if when != "before":
                self.passed(name)
            return result

        return synchronous


def _found(name: str, point: Point) -> tuple[Any, str]:
    for path in point.methods:
        module, _, attributes = path.partition(":")
        owner, _, method = attributes.partition(".")
        try:
            holder = getattr(importlib.import_module(module), owner)
        except (ImportError, AttributeError):
            continue
        if hasattr(holder, method):
            return holder, method
    raise LookupError(f"point {name}: none of {', '.join(point.methods)} is there")


def give(order: Order, orders: Path, pid: int) -> bool:
    """Hand an order to the worker with this process id. False if it does not listen yet: the signal would end it."""
    try:
        if _listening(orders).read_text() != str(pid):
            return False
        orders.write_bytes(msgspec.json.encode(order))
        os.kill(pid, signal.SIGUSR1)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def _listening(orders: Path) -> Path:
    return orders.with_suffix(".pid")
