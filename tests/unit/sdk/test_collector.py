from __future__ import annotations

from typing import Any

import msgspec
import pytest

from embedq_sdk import ResultCollector
from embedq_sdk.embeddings import ReadDatum, ReadError, ReadFailure, ReadResult
from embedq_sdk.errors import UnreadableReply
from embedq_sdk.reply_checks import BadReply


def a_result(id: str = "a", part: int = 0, parts: int = 1, version: str = "v") -> ReadResult:
    data = [ReadDatum(index=part, embedding=bytes(128), tokens=1)]
    return ReadResult(
        id=id,
        model="m",
        model_version=version,
        dimensions=32,
        dtype="float32",
        data=data,
        part=part,
        parts=parts,
    )


def feed(collector: ResultCollector, partition: int, offset: int, reply: Any) -> Any:
    result = collector.add(partition, offset, reply)
    collector.taken(partition, offset)
    return result


def test_a_repeat_is_dropped_by_its_id() -> None:
    collector = ResultCollector()

    assert feed(collector, 0, 1, a_result()).id == "a"
    assert feed(collector, 0, 2, a_result()) is None
    assert feed(collector, 0, 3, ReadFailure(error=ReadError(code="internal"), id="a")) is None
    assert collector.repeats == 2
    assert collector.committable() == {0: 4}


def test_parts_come_out_whole_and_nothing_is_committed_past_an_open_one() -> None:
    collector = ResultCollector()

    assert feed(collector, 0, 5, a_result("a", 0, 2)) is None
    assert feed(collector, 0, 6, a_result("b")).id == "b"
    assert collector.committable() == {0: 5}
    whole = feed(collector, 1, 9, a_result("a", 1, 2))

    assert whole.embeddings.vectors.shape == (2, 32)
    assert collector.committable() == {0: 7, 1: 10}


def test_a_result_that_was_not_taken_is_not_committed() -> None:
    collector = ResultCollector()
    feed(collector, 0, 1, a_result("a"))

    collector.add(0, 2, a_result("b"))

    assert collector.committable() == {0: 2}


def test_a_whole_answer_ends_what_an_older_model_left_open() -> None:
    collector = ResultCollector()
    feed(collector, 0, 1, a_result("a", 0, 2, "old"))

    assert feed(collector, 0, 2, a_result("a", 0, 2, "new")) is None
    assert feed(collector, 0, 3, a_result("a", 1, 2, "new")).embeddings.model_version == "new"
    assert collector.committable() == {0: 4}


def test_a_failure_is_a_result_with_an_error_and_without_an_id_it_is_never_a_repeat() -> None:
    collector = ResultCollector()
    nameless = ReadFailure(error=ReadError(code="malformed", message="m"))

    assert feed(collector, 0, 1, nameless).error.code == "malformed"
    assert feed(collector, 0, 2, nameless).error.code == "malformed"


def test_a_partition_that_went_away_takes_its_open_jobs_along() -> None:
    collector = ResultCollector()
    feed(collector, 0, 1, a_result("a", 0, 2))
    feed(collector, 1, 1, a_result("b"))

    collector.forget([0])

    assert collector.committable() == {1: 2}


def test_a_part_whose_others_never_come_is_given_up_after_a_while_and_holds_nothing_back() -> None:
    collector = ResultCollector()
    feed(collector, 0, 5, a_result("forged", 0, 2))
    feed(collector, 0, 100_005, a_result("b"))
    assert collector.committable() == {0: 5}

    lost = feed(collector, 0, 100_006, a_result("c", 0, 2))

    assert (lost.id, type(lost.error)) == ("forged", UnreadableReply)
    assert collector.committable() == {0: 100_006}
    assert feed(collector, 0, 100_007, a_result("c", 1, 2)).id == "c"


def test_parts_of_jobs_that_are_not_complete_take_only_so_many_bytes() -> None:
    collector = ResultCollector(most_bytes=1000)
    lost = [collector.add(0, n, a_result(f"forged {n}", 0, 2), 100) for n in range(50)]
    assert [each.id for each in lost if each is not None] == [f"forged {n}" for n in range(40)]
    collector.forget([0])
    assert collector.add(0, 50, a_result("a", 0, 2), 1000) is None


def test_parts_that_make_no_result_are_an_error_and_forgotten() -> None:
    collector = ResultCollector()
    feed(collector, 0, 1, a_result("a", 0, 2))
    other = msgspec.structs.replace(a_result("a", 1, 2), dtype="binary")
    with pytest.raises(BadReply):
        collector.add(0, 2, other)
    collector.taken(0, 2)
    assert collector.committable() == {0: 3}
    feed(collector, 0, 3, a_result("a", 0, 2))
    assert feed(collector, 0, 4, a_result("a", 1, 2)).id == "a"


def test_only_so_many_ids_are_remembered() -> None:
    collector = ResultCollector(remember=2)
    for offset, id in enumerate("abc"):
        feed(collector, 0, offset, a_result(id))

    assert feed(collector, 0, 3, a_result("c")) is None
    assert feed(collector, 0, 4, a_result("a")).id == "a"
