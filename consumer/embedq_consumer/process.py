"""One replica as a process, or one for each device: from environment variables, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from embedq_consumer.engine import DeviceLost, ModelError
from embedq_consumer.engine.loading import compile_cache
from embedq_consumer.lifecycle import ModelRejected, NoModel
from embedq_consumer.service import MissingTopics, Stalled, serve
from embedq_consumer.setting_words import described, help_text
from embedq_consumer.settings import PREFIX, Settings, SettingsError
from embedq_consumer.supervisor import supervise
from embedq_consumer.telemetry import logs
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


def explain_usage(arguments: Sequence[str]) -> int:
    """Print the settings if asked to, and else that there are no arguments; the exit code."""
    if set(arguments) <= {"-h", "--help"}:
        print(help_text(described(Settings, PREFIX)))  # noqa: T201
        return 0
    print("embedq: expected no arguments; --help shows the settings", file=sys.stderr)  # noqa: T201
    return 2


def main(leave_within: Callable[[float], object] = lambda _: None) -> int:
    """The exit code: 0 after a clean stop, 1 after a failure, 2 for a wrong setting or a Kafka that refuses us.

    `leave_within` is told, in seconds, by when the process is to have ended; it may be told again.
    """
    try:
        settings = _keep_compiled(Settings.from_env(os.environ).named())
    except SettingsError as error:
        print(f"embedq: {error}", file=sys.stderr)  # noqa: T201  # the logs are not set up yet
        return 2
    logs.configure(settings.log_level, replica=settings.replica)
    failures: list[BaseException] = []
    try:
        if settings.devices:
            return supervise(settings, os.environ)
        asyncio.run(_run(settings, leave_within))
    except* _EXPECTED as group:
        failures = _leaves(group)
    for failure in failures:
        detail = explain(failure) if isinstance(failure, KafkaError) else str(failure)
        structlog.get_logger().error("failed", reason=type(failure).__name__, detail=detail)
    if any(isinstance(failure, SettingsError) or is_permanent(failure) for failure in failures):
        return 2
    return 1 if failures else 0


def _keep_compiled(settings: Settings) -> Settings:
    """`settings` with the full path of the compile cache, or with none. Must run before anything imports PyTorch.

    A directory that was asked for must be usable; the default one may be missing.

    Raises:
        SettingsError: the directory that was asked for cannot be made.
    """
    chosen = settings.compile_cache
    try:
        place = Path(chosen) if chosen else compile_cache.default_directory(os.environ)
        compile_cache.enable(place, os.environ)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        if chosen:
            raise SettingsError(
                f"EMBEDQ_COMPILE_CACHE: cannot make {chosen} ({type(error).__name__})"
            ) from error
        return settings
    return msgspec.structs.replace(settings, compile_cache=str(place))


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
