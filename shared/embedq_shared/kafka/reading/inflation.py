"""Compressed record batches are inflated up to a ceiling: a broker counts compressed bytes, of which 38 KB may hold a gigabyte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import cramjam
from cramjam import DecompressionError

_FIRST_GUESS: Final = 16
"""Times the compressed size: nearly all batches fit into a buffer of that many bytes, which is made and cleared each time."""
_LEAST_BUFFER: Final = 64 * 1024
_OVERFLOW: Final = "failed to write whole buffer"
"""How cramjam says that its output buffer is full."""

_XERIAL: Final = b"\x82SNAPPY\x00"
_XERIAL_HEADER: Final = 16
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_LZ4: Final = b"\x04\x22\x4d\x18"
_LZ4_HAS_SIZE: Final = 0x08


class InflatesTooMuch(Exception):
    """The data would be larger than the ceiling; the message is the end of a sentence that begins with "it"."""


class Undecodable(Exception):
    """The data is no valid stream of its codec, or the codec is none of Kafka's."""


class _Codec(NamedTuple):
    """One of Kafka's codecs: its name, what a stream says of its own size (None: nothing), and the decoder, which writes
    into a buffer, returns how much, and raises `DecompressionError` where it does not fit.
    """

    name: str
    claim: Callable[[memoryview], int | None]
    decode_into: Callable[[memoryview, bytearray], int]


def codec_name(number: int) -> str:
    """The name of a codec by its number in a batch's attributes."""
    codec = _CODECS.get(number)
    return codec.name if codec is not None else f"codec {number}"


def inflate(number: int, data: memoryview, limit: int) -> bytes:
    """The inflated data. Takes `limit` bytes at most, and what the decoder's window takes, whatever the data claims.

    Raises:
        InflatesTooMuch: it would be more than `limit` bytes, as the data itself says, or as it turned out.
        Undecodable: it is damaged, or of an unknown codec.
    """
    codec = _CODECS.get(number)
    if codec is None:
        raise Undecodable(f"unknown codec {number}")
    try:
        claimed = codec.claim(data)
        if claimed is not None and claimed > limit:
            raise InflatesTooMuch(f"says that it inflates to {claimed:,} bytes, more than {limit:,}")
        guess = max(_LEAST_BUFFER, _FIRST_GUESS * len(data)) if claimed is None else claimed
        for size in (min(limit, guess), limit):
            buffer = bytearray(size)
            try:
                return bytes(memoryview(buffer)[: codec.decode_into(data, buffer)])
            except DecompressionError as error:
                if _OVERFLOW not in str(error):
                    raise
    except (DecompressionError, struct.error, IndexError, ValueError) as error:
        raise Undecodable(f"damaged {codec.name} data") from error
    raise InflatesTooMuch(f"inflates to more than {limit:,} bytes")


def _no_claim(_data: memoryview) -> None:
    """Gzip's trailer holds the size modulo 2^32, of its last member alone."""
    return


def _zstd_claim(data: memoryview) -> int | None:
    """The content size of the first frame (RFC 8878, 3.1.1.1)."""
    if bytes(data[:4]) != _ZSTD:
        return None
    descriptor = data[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    at = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if width == 0:
        return None
    size = int.from_bytes(data[at : at + width], "little")
    return size + 256 if width == 2 else size  # two bytes count from 256


def _lz4_claim(data: memoryview) -> int | None:
    if bytes(data[:4]) != _LZ4 or not data[4] & _LZ4_HAS_SIZE:
        return None
    return int.from_bytes(data[6:14], "little")


def _snappy_blocks(data: memoryview) -> list[memoryview]:
    """The raw blocks: of Kafka's own framing, xerial's, or the whole data as one."""
    if bytes(data[: len(_XERIAL)]) != _XERIAL:
        return [data]
    blocks = []
    at = _XERIAL_HEADER
    while at < len(data):
        (size,) = struct.unpack_from(">i", data, at)
        if size <= 0 or at + 4 + size > len(data):
            raise ValueError("a block that ends behind the data")
        blocks.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return blocks


def _snappy_claim(data: memoryview) -> int:
    return sum(cramjam.snappy.decompress_raw_len(bytes(block)) for block in _snappy_blocks(data))


def _snappy_into(data: memoryview, buffer: bytearray) -> int:
    """The claims of the blocks, which their decoder holds them to, fit into the buffer."""
    at = 0
    for block in _snappy_blocks(data):
        plain = bytes(cramjam.snappy.decompress_raw(bytes(block)))
        buffer[at : at + len(plain)] = plain
        at += len(plain)
    return at


_CODECS: Final[Mapping[int, _Codec]] = {
    1: _Codec("gzip", _no_claim, cramjam.gzip.decompress_into),
    2: _Codec("snappy", _snappy_claim, _snappy_into),
    3: _Codec("lz4", _lz4_claim, cramjam.lz4.decompress_into),
    4: _Codec("zstd", _zstd_claim, cramjam.zstd.decompress_into),
}
