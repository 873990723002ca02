"""Records of `__consumer_offsets` as Kafka's message definitions describe them."""

from __future__ import annotations

import struct

import pytest

from tests.faults.group_log import Stored, stored_by


def key(version: int, group: str = "g", topic: str = "t.jobs", partition: int = 3) -> bytes:
    encoded = [text.encode() for text in (group, topic)]
    texts = b"".join(struct.pack(">h", len(text)) + text for text in encoded)
    return struct.pack(">h", version) + texts + struct.pack(">i", partition)


def value(version: int, offset: int) -> bytes:
    rest = b"\x00\x00\x00\x01" if version == 3 else b""  # the leader's epoch
    return struct.pack(">hq", version, offset) + rest + b"\x00\x00" + bytes(8)


@pytest.mark.parametrize("of_key", [0, 1])
@pytest.mark.parametrize("of_value", [0, 1, 2, 3, 4])
def test_the_offset_is_read_whatever_version_the_broker_writes(of_key: int, of_value: int) -> None:
    assert stored_by(key(of_key), value(of_value, 2**40)) == Stored("g", "t.jobs/3", 2**40)


def test_a_tombstone_says_that_an_offset_is_forgotten() -> None:
    assert stored_by(key(1, "größe"), None) == Stored("größe", "t.jobs/3", None)


@pytest.mark.parametrize("version", [2, 3, 5, 16])
def test_what_is_about_groups_and_members_is_about_no_offset(version: int) -> None:
    assert stored_by(struct.pack(">h", version) + b"\x00\x01g", b"whatever") is None
    assert stored_by(None, b"") is None


def test_a_record_that_is_cut_is_no_offset_of_zero() -> None:
    with pytest.raises(struct.error):
        stored_by(key(1), value(1, 7)[:6])
    with pytest.raises(struct.error):
        stored_by(key(1)[:-1], value(1, 7))
