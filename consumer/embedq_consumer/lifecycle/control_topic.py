"""The control topic: the desired model of this replica's alias, read to its end before the replica joins the group."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, Final

import msgspec
import structlog

from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import read_command
from embedq_shared.fleet import Routes
from embedq_shared.kafka import (
    BoundedConsumer,
    MakeConsumer,
    Polled,
    TopicPartition,
    UnreadableRecord,
    WholePartition,
)
from embedq_shared.messages import Control
from embedq_shared.topics import Topics

log = structlog.get_logger()

_POLL_MS: Final = 1000
_UNDECODABLE: Final = (UnicodeDecodeError, msgspec.DecodeError, RecursionError)


class ControlTopic:
    """Reads the control records of one alias. No group: every replica sees every record.

    Invariants:
        - Records come in the topic's order, each once.
        - A record that cannot be read, or that is no command, is counted and logged, and passed.
    """

    def __init__(
        self,
        options: dict[str, Any],
        topics: Topics,
        alias: str,
        metrics: Metrics,
        make_consumer: MakeConsumer = BoundedConsumer,
        routes: Routes | None = None,
    ) -> None:
        """`routes` learns from the records of all aliases."""
        self._routes = routes
        self._alias = alias
        self._metrics = metrics
        self._topic = WholePartition(
            TopicPartition(topics.control, 0), options, poll_ms=_POLL_MS, make_consumer=make_consumer
        )

    async def open(self) -> Control | None:
        """Connect and read to the end as it is now; the newest command for the alias. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
            TimeoutError: reading the topic took more than 60 s.
        """
        return _newest(self._commands(await self._topic.open()))

    async def next(self) -> list[Control]:
        """The alias's commands since the last call, in order; waits for one."""
        while True:
            if found := self._commands(await self._topic.next()):
                return found

    async def close(self) -> None:
        """Disconnect."""
        if problem := await self._topic.close():
            log.warning("control_left_open", reason=problem)

    def _commands(self, records: Iterable[Polled]) -> list[Control]:
        return [command for record in records if (command := self._command(record)) is not None]

    def _command(self, record: Polled) -> Control | None:
        """The command in a record; None if it is for another alias, or is no command."""
        if isinstance(record, UnreadableRecord):
            self._ignore(record.offset, record.reason)
            return None
        if self._routes is not None:
            self._routes.see(record.key, record.value)
        try:
            return read_command(record.key, record.value, self._alias)
        except _UNDECODABLE as error:
            self._ignore(record.offset, type(error).__name__)
            return None

    def _ignore(self, offset: int, reason: str) -> None:
        self._metrics.reloads.labels("ignored").inc()
        log.warning("control_record_ignored", offset=offset, reason=reason)


def _newest(commands: Iterable[Control]) -> Control | None:
    """The command with the highest version; of two equal versions the first, which replicas that read live applied."""
    return max(commands, key=attrgetter("version"), default=None)
