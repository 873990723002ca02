"""What a fetch brought, batch by batch, within bounds; a record that cannot be read comes as one that says so.

aiokafka's own reader inflates a whole batch however large it becomes, and raises at a record that it cannot decode, again at
each poll, after it has emptied its buffers of other partitions. `BoundedRecords` stands in for it (`consumer.py`): it never
raises for what a producer may have written, so that positions move on by themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.util import calc_crc32c, decode_varint

from embedq_shared.kafka.reading.inflation import InflatesTooMuch, Undecodable, codec_name, inflate

_LENGTH: Final = struct.Struct(">qi")
"""What all formats begin with: the offset, and how many bytes follow."""
_MAGIC_AT: Final = 16
_HEADER: Final = struct.Struct(">qiibIhiqqqhii")
"""A batch of format 2: base offset, length, leader epoch, magic, checksum, attributes, last offset delta, first and largest
timestamp, producer's id and epoch, first sequence, number of records."""
_ATTRIBUTES_AT: Final = 21
_COUNT_AT: Final = 57
_ONE: Final = b"\x00\x00\x00\x01"
_CODEC: Final = 0x07
_TRANSACTIONAL: Final = 0x10
_CONTROL: Final = 0x20
_LEGACY_ATTRIBUTES_AT: Final = 17
_LEGACY_KEY_AT: Final = (18, 26)
"""Formats 0 and 1: the second has a timestamp before the key."""
_LEGACY_LEAST: Final = 14
"""Bytes that follow the length of a message without key and value."""


class Unreadable(bytes):
    """The value of a record that stands for what cannot be read: a record, or all of a batch. No producer can write one.

    The record's own offset is the last one of the range, so that whoever finishes it is past all of it.
    """

    first_offset: int
    reason: str
    """A sentence without its end, which quotes nothing of the record."""

    def __new__(cls, first_offset: int, reason: str) -> Self:
        """An empty value."""
        made = super().__new__(cls)
        made.first_offset = first_offset
        made.reason = reason
        return made


class _Stand(NamedTuple):
    """A record of aiokafka's, as far as its fetcher looks."""

    offset: int
    timestamp: int
    value: Unreadable
    key: bytes | None = None
    timestamp_type: int = 0
    headers: tuple[tuple[str, bytes], ...] = ()
    checksum: int | None = None


class BoundedRecords:
    """The record batches of one partition in the answer to a fetch, each inflated to `limit` bytes at most.

    Has the methods of aiokafka's `MemoryRecords`.
    """

    def __init__(self, data: bytes | None, limit: int) -> None:
        self._data = memoryview(data or b"")
        self._limit = limit
        self._at = 0

    def size_in_bytes(self) -> int:
        """Of the whole answer."""
        return len(self._data)

    def has_next(self) -> bool:
        """Whether there is another whole batch: the last one of an answer may be cut."""
        return self._end() is not None

    def next_batch(self) -> Any:
        """The next batch: aiokafka's own, or one that has its methods.

        Raises:
            CorruptRecordException: the batches do not fit together, which is the broker's fault.
        """
        end = self._end()
        if end is None:
            return None
        raw = self._data[self._at : end]
        if len(raw) < _LENGTH.size + _LEGACY_LEAST:
            raise CorruptRecordException(f"a batch of {len(raw)} bytes")
        self._at = end
        magic = raw[_MAGIC_AT]
        if magic < 2:
            return _LegacyBatch(raw, magic, self._limit)
        if len(raw) < _HEADER.size:
            raise CorruptRecordException(f"a batch of {len(raw)} bytes")
        batch = _Batch(raw, self._limit, self._following())
        return DefaultRecordBatch(raw) if batch.is_control_batch else batch

    def _end(self) -> int | None:
        if len(self._data) - self._at < _LENGTH.size:
            return None
        # A negative length would take the position back, and a slice's end would count from the answer's end.
        end = self._at + _LENGTH.size + max(0, int(_LENGTH.unpack_from(self._data, self._at)[1]))
        return end if end <= len(self._data) else None

    def _following(self) -> int | None:
        """The first offset of the batch after this one, if the answer shows it."""
        shown = len(self._data) - self._at >= _LENGTH.size
        return int(_LENGTH.unpack_from(self._data, self._at)[0]) if shown else None


class _Batch:
    """A batch of format 2, which all brokers from 3.0 on keep."""

    def __init__(self, raw: memoryview, limit: int, following: int | None) -> None:
        header = _HEADER.unpack_from(raw)
        self._raw = raw
        self._limit = limit
        self._attributes: int = header[5]
        self._timestamp: int = header[8]
        self._count: int = header[12]
        self._intact = True
        self.base_offset: int = header[0]
        self.producer_id: int = header[9]
        # A damaged header must not take the position past what is there.
        last: int = self.base_offset + max(0, header[6])
        self._last: int = last if following is None else min(last, max(self.base_offset, following - 1))

    @property
    def is_control_batch(self) -> bool:
        """Whether a broker wrote it, to end a transaction."""
        return bool(self._attributes & _CONTROL)

    @property
    def is_transactional(self) -> bool:
        """Whether it counts only once its transaction is committed."""
        return bool(self._attributes & _TRANSACTIONAL)

    @property
    def next_offset(self) -> int:
        """The offset after the batch's last record, even if compaction removed that one."""
        return self._last + 1

    def validate_crc(self) -> bool:
        """Always true, since a caller would raise: a batch with a wrong checksum is one that cannot be read."""
        (checksum,) = struct.unpack_from(">I", self._raw, _ATTRIBUTES_AT - 4)
        self._intact = calc_crc32c(self._raw[_ATTRIBUTES_AT:]) == checksum
        return True

    def __iter__(self) -> Iterator[Any]:
        """The records; what cannot be read comes as a record whose value is an `Unreadable`."""
        if not self._intact:
            yield self._whole("has a wrong checksum")
            return
        try:
            plain = self._plain()
        except (InflatesTooMuch, Undecodable) as error:
            yield self._whole(str(error))
            return
        good = 0
        try:
            for record in DefaultRecordBatch(plain):
                yield record
                good += 1
        except Exception:  # noqa: BLE001  # whatever a decoder says of foreign bytes
            yield from self._one_by_one(plain, good)

    def _plain(self) -> memoryview | bytes:
        """The batch without compression."""
        codec = self._attributes & _CODEC
        if not codec:
            return self._raw
        header = bytearray(self._raw[: _HEADER.size])
        struct.pack_into(">h", header, _ATTRIBUTES_AT, self._attributes & ~_CODEC)
        return bytes(header) + inflate(codec, self._raw[_HEADER.size :], self._limit)

    def _one_by_one(self, plain: memoryview | bytes, good: int) -> Iterator[Any]:
        """The records after the first `good` ones, each decoded alone, so that a bad one costs no other."""
        header = bytes(plain[:_COUNT_AT]) + _ONE
        at = _HEADER.size
        reached = self.base_offset
        try:
            for number in range(self._count):
                length, start = decode_varint(plain, at)
                # The attributes are one byte; the timestamp and the offset count from the batch's.
                _, after_timestamp = decode_varint(plain, start + 1)
                delta, _ = decode_varint(plain, after_timestamp)
                if (
                    length <= 0
                    or start + length > len(plain)
                    or not 0 <= delta <= self._last - self.base_offset
                ):
                    raise ValueError("a record that ends behind its batch")
                if number >= good:
                    yield self._one(header + plain[at : start + length], self.base_offset + delta)
                at = start + length
                reached = self.base_offset + delta + 1
        except (IndexError, ValueError):
            if reached <= self._last:
                yield self._stand(reached, self._last, f"its {self._described()} is damaged")

    def _one(self, alone: bytes, offset: int) -> Any:
        try:
            return next(iter(DefaultRecordBatch(alone)))
        except UnicodeDecodeError:
            return self._stand(offset, offset, "the name of a header is not UTF-8 (UnicodeDecodeError)")
        except Exception as error:  # noqa: BLE001  # whatever a decoder says of foreign bytes
            return self._stand(offset, offset, f"the record is damaged ({type(error).__name__})")

    def _whole(self, why: str) -> _Stand:
        return self._stand(self.base_offset, self._last, f"its {self._described()} {why}")

    def _stand(self, first: int, last: int, reason: str) -> _Stand:
        return _Stand(offset=last, timestamp=self._timestamp, value=Unreadable(first, reason))

    def _described(self) -> str:
        codec = self._attributes & _CODEC
        packed = f"{codec_name(codec)}, " if codec else ""
        where = f"{self._count} records at offsets {self.base_offset} to {self._last}"
        return f"batch ({packed}{len(self._raw):,} bytes, {where})"


class _LegacyBatch:
    """A message of format 0 or 1, as brokers before 3.0 kept them: one record, or a compressed set of them."""

    is_control_batch = False
    is_transactional = False
    producer_id = None

    def __init__(self, raw: memoryview, magic: int, limit: int) -> None:
        self._raw = raw
        self._magic = magic
        self._limit = limit
        self._intact = True
        self._offset: int = _LENGTH.unpack_from(raw)[0]

    @property
    def next_offset(self) -> int:
        """A set carries the offset of its last record."""
        return self._offset + 1

    def validate_crc(self) -> bool:
        """Always true, as of `_Batch`."""
        (checksum,) = struct.unpack_from(">I", self._raw, _LENGTH.size)
        self._intact = crc32(self._raw[_MAGIC_AT:]) == checksum
        return True

    def __iter__(self) -> Iterator[Any]:
        """The records, or one whose value is an `Unreadable`."""
        why = self._problem()
        if why is None:
            try:
                yield from LegacyRecordBatch(self._raw, self._magic)
            except Exception as error:  # noqa: BLE001  # whatever a decoder says of foreign bytes
                why = f"is damaged ({type(error).__name__})"
        if why is not None:
            described = f"batch (format {self._magic}, {len(self._raw):,} bytes, up to offset {self._offset})"
            yield _Stand(
                offset=self._offset,
                timestamp=-1,
                value=Unreadable(self._offset, f"its {described} {why}"),
            )

    def _problem(self) -> str | None:
        """Why it must not be given to aiokafka, which trusts the lengths inside, and inflates without end."""
        if not self._intact:
            return "has a wrong checksum"
        codec = self._raw[_LEGACY_ATTRIBUTES_AT] & _CODEC
        if not codec:
            return None
        try:
            inner = memoryview(inflate(codec, self._value(), self._limit))
            at = 0
            while at < len(inner):
                length = _LENGTH.unpack_from(inner, at)[1]
                if length < _LEGACY_LEAST or at + _LENGTH.size + length > len(inner):
                    raise Undecodable("holds a message that ends behind it")
                if inner[at + _LEGACY_ATTRIBUTES_AT] & _CODEC:
                    raise Undecodable("holds another compressed set")
                at += _LENGTH.size + length
        except (InflatesTooMuch, Undecodable) as error:
            return str(error)
        except (struct.error, IndexError):
            return "is damaged"
        return None

    def _value(self) -> memoryview:
        at = _LEGACY_KEY_AT[self._magic]
        (key,) = struct.unpack_from(">i", self._raw, at)
        at += 4 + max(0, key)
        (size,) = struct.unpack_from(">i", self._raw, at)
        if size < 0 or at + 4 + size > len(self._raw):
            raise Undecodable("holds nothing")
        return self._raw[at + 4 : at + 4 + size]
