"""One replica as a process, or one for each device: from environment variables, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import structlog

from embedq_consumer.engine import DeviceLost, ModelError
from embedq_consumer.lifecycle import ModelRejected, NoModel
from embedq_consumer.opening import MissingTopics
from embedq_consumer.service import Stalled, serve
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.supervisor import supervise
from embedq_consumer.telemetry import logs
from embedq_consumer.usage import settings_from
from embedq_shared.kafka import KafkaError, explain, is_permanent

_EXPECTED = (
    SettingsError,
    MissingTopics,
    ModelError,
    DeviceLost,
    Stalled,
    ModelRejected,
    NoModel,
    KafkaError,
    OSError,
    TimeoutError,
)
"""What an operator can fix: logged in one line, without a traceback."""


def main(leave_within: Callable[[float], object] = lambda _: None) -> int:
    """Read the settings and `run`; the exit code is 2 if one of them is wrong."""
    settings = settings_from(os.environ)
    return 2 if settings is None else run(settings, leave_within)


def run(settings: Settings, leave_within: Callable[[float], object] = lambda _: None) -> int:
    """The exit code: 0 after a clean stop, 1 after a failure, 2 for a wrong setting or a Kafka that refuses us.

    `leave_within` is told, in seconds, by when the process is to have ended; it may be told again.
    """
    logs.configure(settings.log_level, replica=settings.replica)
    failures: list[BaseException] = []
    try:
        if settings.devices:
            return supervise(settings, os.environ)
        with asyncio.Runner(loop_factory=_loop_factory(settings.event_loop)) as runner:
            runner.run(_run(settings, leave_within))
    except* _EXPECTED as group:
        failures = _leaves(group)
    for failure in failures:
        detail = explain(failure) if isinstance(failure, KafkaError) else str(failure)
        structlog.get_logger().error("failed", reason=type(failure).__name__, detail=detail)
    if any(isinstance(failure, SettingsError) or is_permanent(failure) for failure in failures):
        return 2
    return 1 if failures else 0


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop; None for Python's own.

    Raises:
        SettingsError: it is not installed.
    """
    if name == "asyncio":
        return None
    try:
        import uvloop
    except ModuleNotFoundError:
        raise SettingsError("EMBEDQ_EVENT_LOOP: uvloop is not installed: pip install uvloop") from None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _run(settings: Settings, leave_within: Callable[[float], object]) -> None:
    """One replica, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask_to_stop() -> None:
        stop.set()
        leave_within(settings.drain_timeout_s + settings.leave_timeout_s)
        # A second signal ends the process at once, without waiting for the drain.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    await serve(settings, stop, lambda: leave_within(settings.leave_timeout_s))


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions of a group and of the groups in it, flat."""
    found: list[BaseException] = []
    for failure in group.exceptions:
        found += _leaves(failure) if isinstance(failure, BaseExceptionGroup) else [failure]
    return found
