"""JSON logs on stdout: one line for each event, ours and every library's. Never texts or vectors."""

from __future__ import annotations

import logging
import sys
from pathlib import PurePath
from typing import Any, Final, TextIO
from uuid import UUID

import structlog
from structlog.typing import EventDict, Processor

_CHATTY: Final = (
    "aiokafka",  # each fetch error of a broker that restarts, each rebalance step
    "asyncio",
    "filelock",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "transformers",
    "urllib3",
)
"""Libraries that are logged from warnings on, whatever our own level is."""


def configure(level: str = "info", *, replica: str | None = None, stream: TextIO | None = None) -> None:
    """Send every event of this process to `stream` (default: stdout) as JSON, from `level` upwards.

    An event has `timestamp` (ISO 8601, UTC), `level`, `event`, `logger`, the fields that it was given, and those bound
    with `structlog.contextvars`. stdlib loggers go the same way, with their message as the event. With `replica`, each
    event names it: several replicas of one command share its stdout. A second call replaces the first.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]

    def whose(logger: Any, method: str, event: EventDict) -> EventDict:
        if replica is not None:
            event.setdefault("replica", replica)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        whose,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _event_first,
                structlog.processors.JSONRenderer(default=_plain),
            ],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(threshold)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(True)


def _event_first(logger: Any, method: str, event: EventDict) -> EventDict:
    """People read these lines too: first when, how bad and what, then the rest."""
    first = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    return {**first, **event}


def _plain(value: object) -> str:
    """What JSON has no form for. Only the type of most: an array or bytes that slip into a log must not be quoted."""
    return str(value) if isinstance(value, BaseException | PurePath | UUID) else f"<{type(value).__name__}>"
