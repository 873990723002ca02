"""Record batches made by hand, as no producer of good will makes them: compressed ones that inflate without end, and worse."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import cramjam
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from aiokafka.errors import for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c, encode_varint

from tests.helpers.support import wait_until

NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
CODECS: Final[Mapping[str, int]] = {"gzip": GZIP, "snappy": SNAPPY, "lz4": LZ4, "zstd": ZSTD}
COMPRESS: Final[Mapping[int, Callable[[bytes], bytes]]] = {
    NONE: bytes,
    GZIP: gzip_encode,
    SNAPPY: snappy_encode,
    LZ4: lz4_encode,
    ZSTD: zstd_encode,
}
_CHUNK: Final = bytes(1 << 20)


class One(NamedTuple):
    """A record to write. Header names are bytes, so that they need not be UTF-8."""

    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[bytes, bytes]] = ()
    offset: int | None = None
    """Its offset from the batch's; None: its place."""


def payload(records: Iterable[One]) -> bytes:
    """The records of a batch of format 2, not compressed."""
    out = bytearray()
    for number, record in enumerate(records):
        body = bytearray(b"\0")
        _varint(body, 0)
        _varint(body, number if record.offset is None else record.offset)
        for part in (record.key, record.value):
            _bytes(body, part)
        _varint(body, len(record.headers))
        for name, value in record.headers:
            _bytes(body, name)
            _bytes(body, value)
        _varint(out, len(body))
        out += body
    return bytes(out)


def batch(
    packed: bytes,
    *,
    codec: int = NONE,
    count: int = 1,
    base: int = 0,
    last: int | None = None,
    flags: int = 0,
) -> bytes:
    """A batch of format 2 around records that are compressed already; its checksum is right."""
    now = int(time.time() * 1000)
    delta = (count - 1) if last is None else last - base
    tail = struct.pack(">hiqqqhii", codec | flags, delta, now, now, -1, -1, -1, count) + packed
    return struct.pack(">qiibI", base, len(tail) + 9, -1, 2, calc_crc32c(tail)) + tail


def bomb(codec: int, size: int, *, count: int = 1, base: int = 0) -> bytes:
    """A batch of one record whose value is `size` zeros. Streamed, since `size` may be more than there is memory.

    With `count` it is the last of so many records; the others are empty.
    """
    return batch(b"".join(_pack(codec, size, count)), codec=codec, count=count, base=base)


def _pack(codec: int, size: int, count: int) -> Iterator[bytes]:
    small = payload(One(b"") for _ in range(count - 1))
    fields = bytearray(b"\0")
    _varint(fields, 0)
    _varint(fields, count - 1)
    _varint(fields, -1)
    _varint(fields, size)
    head = bytearray(small)
    _varint(head, len(fields) + size + 1)
    head += fields
    chunks = [bytes(head), *[_CHUNK] * (size // len(_CHUNK)), bytes(size % len(_CHUNK)), b"\0"]
    if codec == GZIP:
        gzip = zlib.compressobj(level=9, wbits=31)
        yield from (gzip.compress(chunk) for chunk in chunks)
        yield gzip.flush()
    elif codec == SNAPPY:
        yield snappy_encode(b"".join(chunks))
    else:
        packer = (
            cramjam.zstd.Compressor(level=3)
            if codec == ZSTD
            else cramjam.lz4.Compressor(level=9, content_checksum=False, block_linked=False)
        )
        for chunk in chunks:
            packer.compress(chunk)
        yield bytes(packer.finish())


def legacy(value: bytes | None, *, magic: int = 1, codec: int = NONE, offset: int = 0) -> bytes:
    """A message of format 0 or 1; with a codec `value` is a compressed set of messages."""
    timestamp = struct.pack(">q", 1_700_000_000_000) if magic else b""
    data = struct.pack(">bb", magic, codec) + timestamp + struct.pack(">i", -1)
    data += struct.pack(">i", -1 if value is None else len(value)) + (value or b"")
    body = struct.pack(">I", zlib.crc32(data)) + data
    return struct.pack(">qi", offset, len(body)) + body


async def send_batch(client: AIOKafkaProducer, topic: str, partition: int, data: bytes) -> int:
    """Write a batch as it is; the offset that the broker gives to its first record."""
    request = ProduceRequest(
        transactional_id=None, required_acks=-1, timeout=30_000, topics=[(topic, [(partition, data)])]
    )
    offset = -1

    async def written() -> bool:
        """A topic that was made just now has no leader yet, or another than the client knows."""
        nonlocal offset
        await client.client.force_metadata_update()
        await client.partitions_for(topic)
        leader = client.client.cluster.leader_for_partition(TopicPartition(topic, partition))
        response = await client.client.send(leader, request)
        [(_, [(_, code, offset, *_)])] = response.topics
        if code and not for_code(code).retriable:
            raise for_code(code)(topic)
        return bool(code == 0)

    await wait_until(written, what="the batch is written")
    return offset


def _varint(out: bytearray, value: int) -> None:
    encode_varint(value, out.append)


def _bytes(out: bytearray, value: bytes | None) -> None:
    if value is None:
        _varint(out, -1)
    else:
        _varint(out, len(value))
        out += value
