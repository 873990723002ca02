"""Each of aiokafka's errors has its meaning, the page says the same, and each group is treated as the page says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiokafka import errors
from aiokafka.errors import (
    BrokerResponseError,
    KafkaError,
    NotEnoughReplicasError,
    ProducerFenced,
    for_code,
)

from embedq_consumer.delivery.broker_errors import MEANINGS, meaning_of, name_of, page
from embedq_shared.kafka import Evicted, InvalidRecordError, error_kinds

NOT_AIOKAFKAS = {"BatchFull", "Evicted", "OSError", "TimeoutError"}


def test_every_error_that_aiokafka_has_stands_in_the_table_and_no_other() -> None:
    names = {kind.__name__ for kind in error_kinds()}
    assert names == MEANINGS.keys() - NOT_AIOKAFKAS
    assert len(names) > 90  # it did find them


def test_every_error_with_a_number_of_the_protocol_is_found() -> None:
    assert {kind.__name__ for kind in errors.kafka_errors.values()} <= MEANINGS.keys()


def test_the_page_is_what_the_table_says() -> None:
    written = Path(__file__).parents[3] / "docs" / "broker-errors.md"
    assert written.read_text(encoding="utf-8") == page(), "`make docs` writes it"


@pytest.mark.parametrize("kind", [kind for kind in error_kinds() if issubclass(kind, BrokerResponseError)])
def test_what_aiokafka_may_try_again_is_never_refused_for_good(kind: type[BrokerResponseError]) -> None:
    if kind.retriable:
        assert meaning_of(kind()).action != "refuse"


def test_errors_that_aiokafka_does_not_know_are_told_apart() -> None:
    assert for_code(87) is InvalidRecordError
    assert meaning_of(for_code(87)()).scope == "record"
    assert for_code(76).__name__ == "UnsupportedCompressionTypeError"
    assert meaning_of(for_code(9999)()).scope == "partition"


def test_an_error_of_a_class_that_is_made_later_means_what_the_one_above_means() -> None:
    class Later(NotEnoughReplicasError):  # type: ignore[misc]  # aiokafka has no type information
        pass

    assert meaning_of(Later()) == meaning_of(NotEnoughReplicasError())
    assert meaning_of(ConnectionRefusedError()).scope == "cluster"
    assert meaning_of(Evicted()).scope == "partition"


@pytest.mark.parametrize("error", [AssertionError("ours"), asyncio.InvalidStateError()])
def test_a_bug_of_ours_is_not_taken_for_an_answer(error: Exception) -> None:
    with pytest.raises(type(error)):
        meaning_of(error)


def test_errors_go_by_the_name_that_the_protocol_gives_them() -> None:
    assert name_of(NotEnoughReplicasError()) == "NOT_ENOUGH_REPLICAS"
    assert name_of(ProducerFenced()) == "ProducerFenced"
    assert name_of(KafkaError("text")) == "KafkaError"
    assert name_of(TimeoutError()) == "TimeoutError"
