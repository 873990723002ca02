"""JSON logs on stdout: one line for each event. Never texts, vectors or keys."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Final, TextIO

import msgspec

_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What a log record has of itself; the rest are the fields that an event was given."""
_CHATTY: Final = ("aiokafka", "asyncio", "uvicorn", "uvicorn.error")


def configure(level: str = "info", *, stream: TextIO | None = None) -> None:
    """Send every event of this process to `stream` (default: stdout) as JSON, from `level` upwards."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_Json())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(threshold)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(True)


class _Json(logging.Formatter):
    """A record as one line of JSON: first when, how bad and what, then the rest."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.gmtime(record.created)
        event: dict[str, Any] = {
            "timestamp": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        event |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(event, enc_hook=_plain).decode()


def _plain(value: object) -> str:
    """What JSON has no form for: an array or bytes that slip into a log must not be quoted."""
    return str(value) if isinstance(value, BaseException) else f"<{type(value).__name__}>"
