"""Requests to write records, written at once. aiokafka goes field by field and puts each level together from the one below it, so that
every record is copied nine times on its way to the socket: of results of 2.5 KB that costs as much as making them, and most of all
where such large pieces of memory are mapped anew each time.

The bytes are aiokafka's own (`tests/unit/shared/test_produces.py`).
"""

from __future__ import annotations

import struct
from typing import Any, Final

from aiokafka.protocol.produce import ProduceRequest, ProduceRequest_v7

_ACKS: Final = struct.Struct(">hii")
"""How many copies are waited for, how long, number of topics."""
_SHORT: Final = struct.Struct(">h")
_COUNT: Final = struct.Struct(">i")
_PARTITION: Final = struct.Struct(">ii")
"""Number, and how many bytes of records follow."""


class Produce(ProduceRequest_v7):  # type: ignore[misc]  # aiokafka has no type information
    """The request of the newest version that aiokafka knows."""

    def encode(self) -> bytes:
        """Its bytes."""
        return b"".join(self.pieces())

    def pieces(self) -> list[Any]:
        """Its bytes in pieces, of which the records are those that the batches hold."""
        name = _named(self.transactional_id)
        pieces: list[Any] = [name, _ACKS.pack(self.required_acks, self.timeout, len(self.topics))]
        for topic, partitions in self.topics:
            pieces += (_named(topic), _COUNT.pack(len(partitions)))
            for number, records in partitions:
                pieces += (_PARTITION.pack(number, len(records)), records)
        return pieces


class QuickProduce(ProduceRequest):  # type: ignore[misc]
    """What a producer sends, as a `Produce` where the broker knows that version."""

    def build(self, version: type[Any]) -> Any:
        """The request of one version."""
        return super().build(Produce if version is ProduceRequest_v7 else version)


def framed(header: bytes, request: Produce) -> bytes:
    """What goes over the wire, in one piece: each record is copied once."""
    pieces = request.pieces()
    return b"".join((_COUNT.pack(len(header) + sum(map(len, pieces))), header, *pieces))


def _named(name: str | None) -> bytes:
    if name is None:
        return _SHORT.pack(-1)
    encoded = name.encode()
    return _SHORT.pack(len(encoded)) + encoded
