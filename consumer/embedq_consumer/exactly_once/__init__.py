"""Results of the bulk lane, each published exactly once: in transactions, together with the offsets that they answer."""

from collections.abc import Callable
from typing import Final

import msgspec

from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.exactly_once.answers import Answers
from embedq_consumer.exactly_once.held_results import HeldResults, Positions
from embedq_consumer.exactly_once.kafka_transactions import transactional_producers
from embedq_consumer.exactly_once.refusals import Refusals
from embedq_consumer.exactly_once.release_loop import Committing, Kafka, ReleaseLoop
from embedq_consumer.exactly_once.transactions import TransactionalProducer, Transactions

__all__ = ["ExactlyOnceOptions", "ReleaseLoop", "make_release_loop", "transactional_producers"]

_ATTEMPT_S: Final = 5.0
"""Of one step of a transaction. A broker that is slower holds back the whole lane, and readers of what is open."""


class ExactlyOnceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the room. `interval_s` is the time between two transactions, `reply_timeout_s` how long a caller's address
    may take nothing."""

    group: str
    interval_s: float
    reply_timeout_s: float


# More than six parameters: each is another room's, and `service.py` hands them over once.
def make_release_loop(
    options: ExactlyOnceOptions,
    make_producer: Callable[[], TransactionalProducer],
    *,
    positions: Positions,
    committing: Committing,
    encoder: ResultEncoder,
    kafka: Kafka,
    hinder: Callable[[str | None], None],
) -> ReleaseLoop:
    """The loop with all of its parts."""
    return ReleaseLoop(
        HeldResults(positions),
        Transactions(make_producer, attempt_s=_ATTEMPT_S),
        committing,
        Answers(encoder, kafka.topics.partitions),
        Refusals(timeout_s=options.reply_timeout_s),
        kafka,
        group=options.group,
        interval_s=options.interval_s,
        hinder=hinder,
    )
