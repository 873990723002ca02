"""Answers as transactions publish them, and what takes the place of one that the brokers refuse. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from embedq_consumer.delivery.deliverer import undeliverable
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import Reply, ResultEncoder
from embedq_consumer.exactly_once.held_results import Concluded, Held
from embedq_shared.kafka import KafkaError

log = structlog.get_logger()

_LETTER_FORMS: Final = 3
"""As it came; without its timestamp, which may be older than the topic takes; its position and what was wrong alone."""


class Answers:
    """Makes them. `partitions` is how many a topic has, None for one that is not known."""

    def __init__(self, encoder: ResultEncoder, partitions: Callable[[str], int | None]) -> None:
        self._encoder = encoder
        self._partitions = partitions

    def of(self, reply: Reply, concluded: Concluded) -> Held:
        """Everything that is published for one record."""
        return self._held(reply, concluded, letter_form=0)

    def mend(self, held: Held, reasons: Sequence[KafkaError | None]) -> Held:
        """The same without the records that are given up for these reasons; what cannot be delivered may be run again."""
        if held.reply.retry is not None:
            log.warning("retry_refused", tier=held.reply.retry.tier)
            return self._held(held.reply.retry.otherwise, held.concluded, letter_form=0)
        result = next((reason for reason in reasons[: held.results] if reason is not None), None)
        letter = next((reason for reason in reasons[held.results :] if reason is not None), None)
        reply, form = held.reply, held.letter_form
        if result is not None:
            refused_before = reply.dead_letter is not None and reply.headers.reply_topic is None
            error = self._encoder.of_undeliverable(reply, undeliverable(result, reply.headers))
            reply = (
                msgspec.structs.replace(error, outgoing=[])
                if refused_before
                else self._encoder.or_retry(error)
            )
        if letter is not None:
            form += 1
            if form == _LETTER_FORMS:
                log.error("dead_letter_refused", record=reply.record.name, reason=type(letter).__name__)
        return self._held(reply, held.concluded, letter_form=form, alone=held.alone)

    def apart(self, held: Held) -> Held:
        """The same, which shares no batch with others."""
        return msgspec.structs.replace(held, alone=True)

    def _held(self, reply: Reply, concluded: Concluded, *, letter_form: int, alone: bool = False) -> Held:
        return Held(
            reply=reply,
            records=[*reply.outgoing, *self._letter(reply, letter_form)],
            results=len(reply.outgoing),
            concluded=concluded,
            letter_form=letter_form,
            alone=alone,
        )

    def _letter(self, reply: Reply, form: int) -> list[Outgoing]:
        if reply.dead_letter is None or form >= _LETTER_FORMS:
            return []
        origin = reply.record.ticket.partition.partition
        partition = origin if origin < (self._partitions(self._encoder.dead_letters) or 0) else None
        letter = (
            self._encoder.dead_letter(reply, partition)
            if form < _LETTER_FORMS - 1
            else self._encoder.bare_dead_letter(reply, partition)
        )
        return [letter if form == 0 else msgspec.structs.replace(letter, timestamp_ms=None)]
