"""Fetches, written and read at once. aiokafka goes field by field, at some 10 µs for each partition that is asked for, whether it has
records or not; and a replica asks for all of its partitions each time: jobs of two lanes, retry topics, those of mappings.

The bytes and the values are aiokafka's own (`tests/unit/shared/test_fetches.py`).
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any, Final, Self

from aiokafka.protocol.fetch import FetchRequest, FetchRequest_v11, FetchResponse_v11

_REQUEST: Final = struct.Struct(">iiiibiii")
"""Replica, longest wait, least and most bytes, isolation level, session, its epoch, number of topics."""
_ASKED: Final = struct.Struct(">iiqqi")
"""A partition: number, leader's epoch, offset, start of the log, most bytes."""
_RESPONSE: Final = struct.Struct(">ihii")
"""Milliseconds of throttling, error, session, number of topics."""
_PARTITION: Final = struct.Struct(">ihqqqi")
"""Number, error, end, last stable offset, start of the log, number of aborted transactions."""
_ABORTED: Final = struct.Struct(">qq")
_RECORDS: Final = struct.Struct(">ii")
"""The replica to read from, and how many bytes of records follow."""
_SHORT: Final = struct.Struct(">h")
_COUNT: Final = struct.Struct(">i")


class Fetched(FetchResponse_v11):  # type: ignore[misc]  # aiokafka has no type information
    """The answer to a `Fetch`."""

    @classmethod
    def decode(cls, data: BytesIO) -> Self:
        """From the bytes that are left of it.

        Raises:
            ValueError: they are too few.
        """
        raw = data.getvalue()  # not copied
        try:
            return cls(*_decoded(raw, data.tell()))
        except struct.error as error:
            raise ValueError("an answer to a fetch that ends too early") from error


def _decoded(raw: bytes, at: int) -> tuple[int, int, int, list[tuple[str, list[tuple[Any, ...]]]]]:
    throttled, error, session, count = _RESPONSE.unpack_from(raw, at)
    at += _RESPONSE.size
    topics = []
    for _ in range(count):
        (length,) = _SHORT.unpack_from(raw, at)
        at += _SHORT.size
        name = raw[at : at + length].decode()
        at += length
        (among,) = _COUNT.unpack_from(raw, at)
        at += _COUNT.size
        partitions = []
        for _ in range(among):
            *partition, aborts = _PARTITION.unpack_from(raw, at)
            at += _PARTITION.size
            aborted = [_ABORTED.unpack_from(raw, at + number * _ABORTED.size) for number in range(aborts)]
            at += len(aborted) * _ABORTED.size
            replica, size = _RECORDS.unpack_from(raw, at)
            at += _RECORDS.size
            records = None if size < 0 else raw[at : at + size]
            if records is not None and len(records) < size:
                raise struct.error
            at += max(0, size)
            partitions.append((*partition, None if aborts < 0 else aborted, replica, records))
        topics.append((name, partitions))
    return throttled, error, session, topics


class Fetch(FetchRequest_v11):  # type: ignore[misc]
    """The request of the newest version that aiokafka knows."""

    RESPONSE_TYPE = Fetched

    def encode(self) -> bytes:
        """Its bytes."""
        parts = [
            _REQUEST.pack(
                self.replica_id,
                self.max_wait_time,
                self.min_bytes,
                self.max_bytes,
                self.isolation_level,
                self.session_id,
                self.session_epoch,
                len(self.topics),
            )
        ]
        for topic, partitions in self.topics:
            name = topic.encode()
            parts += (_SHORT.pack(len(name)), name, _COUNT.pack(len(partitions)))
            parts += [_ASKED.pack(*partition) for partition in partitions]
        rack = self.rack_id.encode()
        parts += (_COUNT.pack(0), _SHORT.pack(len(rack)), rack)  # no topics that a session should forget
        return b"".join(parts)


class QuickFetch(FetchRequest):  # type: ignore[misc]
    """What a consumer asks for, as a `Fetch` where the broker knows that version."""

    def build(self, version: type[Any]) -> Any:
        """The request of one version."""
        return super().build(Fetch if version is FetchRequest_v11 else version)
