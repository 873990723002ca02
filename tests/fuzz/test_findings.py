"""What the fuzzers found once, each as a test of its own: the slice that CI runs need not find it again."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from aiokafka.errors import CorruptRecordException

from embedq_consumer.engine import ModelError
from embedq_consumer.engine.model_directory import read_directory
from embedq_sdk.reply_checks import BadReply, read_checked
from embedq_shared.kafka.reading.record_batches import BoundedRecords
from tests.helpers.tiny_models import make_tiny_gemma3


def test_an_int8_vector_whose_scale_makes_it_infinite_is_no_reply() -> None:
    datum = {"index": 0, "embedding": [127] * 32, "tokens": 1, "scale": 1e300}
    reply = {
        "object": "list",
        "id": "j",
        "model": "m",
        "model_version": "v",
        "dimensions": 32,
        "dtype": "int8",
    }
    with pytest.raises(BadReply, match="scale"):
        read_checked(json.dumps(reply | {"data": [datum]}).encode(), None)


@pytest.mark.parametrize("length", [-1, -11, -73, -(2**31)])
def test_a_batch_of_negative_length_is_the_brokers_fault(length: int) -> None:
    """The position went back, and then before the answer's beginning."""
    batch = struct.pack(">qi", 0, length) + bytes(100)
    found = BoundedRecords(batch, 1000)
    assert found.has_next()
    with pytest.raises(CorruptRecordException):
        found.next_batch()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_gemma3(tmp_path / "model", dense=((128, "Tanh", True),))


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_activation_that_is_an_object_is_refused(model: Path) -> None:
    """It cannot be looked up in a dict: TypeError."""
    change(model / "2_Dense" / "config.json", activation_function={"a": []})
    with pytest.raises(ModelError, match="activation_function: expected Identity or Tanh, got an object"):
        read_directory(model)


def test_a_name_of_the_default_prompt_that_is_a_list_is_refused(model: Path) -> None:
    """As above."""
    change(model / "config_sentence_transformers.json", default_prompt_name=[["query"]])
    with pytest.raises(ModelError, match="default_prompt_name: a list is not among prompts"):
        read_directory(model)


@pytest.mark.parametrize("value", ["x" * 100_000, [["x" * 100_000]]])
def test_what_a_file_holds_is_not_repeated_at_length(model: Path, value: object) -> None:
    """Errors go to logs and to the status topic."""
    entries = json.loads((model / "modules.json").read_text())
    entries[0]["type"] = value
    (model / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError) as refused:
        read_directory(model)
    assert len(str(refused.value)) < 1000
