"""The header of a safetensors file, checked before any library maps the file: where each tensor's bytes lie."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.safety.bounds import HEADER_BYTES
from embedq_consumer.engine.safety.files import open_regular

__all__ = ["TensorSlice", "read_header"]

_BITS: Final = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Of one number in each of the format's types."""

_Size = Annotated[int, Meta(ge=0, le=1 << 48)]


class TensorSlice(msgspec.Struct, frozen=True, kw_only=True):
    """Where one tensor's bytes lie: `[begin, end)` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=8)]
    data_offsets: tuple[_Size, _Size]


def read_header(file: Path) -> list[TensorSlice]:
    """The tensors of one safetensors file: they fill it without gaps, and each has as many bytes as its shape needs.

    Raises:
        ModelError: it is another kind of file, cut short, or says of itself what is not so.
    """
    with open_regular(file) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{file}: not a safetensors file, or cut short")
        if length > HEADER_BYTES:
            raise ModelError(
                f"{file}: expected a header of at most {HEADER_BYTES:,} bytes, it has {length:,}"
            )
        header = _pread(descriptor, length, 8)
    tensors = [_slice(file, name, entry, 8 + length) for name, entry in _entries(file, header)]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    end = max((tensor.end for tensor in tensors), default=8 + length)
    if end != size:
        raise ModelError(
            f"{file}: cut short: it has {size} bytes, which is not the size that its header says"
        )
    begins = [8 + length, *(tensor.end for tensor in tensors)]
    for begin, tensor in zip(begins, tensors, strict=False):
        if tensor.begin != begin:
            raise ModelError(
                f"{file}: tensor {tensor.name[:100]}: expected its bytes right after the one before"
            )
    return tensors


def _entries(file: Path, header: bytes) -> list[tuple[str, _Entry]]:
    try:
        listed = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        listed.pop("__metadata__", None)
        return [(name, msgspec.json.decode(entry, type=_Entry)) for name, entry in listed.items()]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not a safetensors header") from error


def _slice(file: Path, name: str, entry: _Entry, data: int) -> TensorSlice:
    begin, end = entry.data_offsets
    if entry.dtype not in _BITS:
        raise ModelError(f"{file}: tensor {name[:100]}: dtype {entry.dtype[:20]!r} is unknown")
    if 8 * (end - begin) != _BITS[entry.dtype] * math.prod(entry.shape):
        raise ModelError(f"{file}: tensor {name[:100]}: its bytes are not as many as its shape needs")
    return TensorSlice(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        file=file,
        begin=data + begin,
        end=data + end,
    )


def _pread(descriptor: int, length: int, at: int) -> bytes:
    parts: list[bytes] = []
    while length and (part := os.pread(descriptor, length, at)):
        parts.append(part)
        length -= len(part)
        at += len(part)
    return b"".join(parts)
