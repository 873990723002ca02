"""Two requests to a broker, written by hand so that they need no event loop: the caller may or may not be in one."""

from __future__ import annotations

import socket
import struct
from typing import Final

_METADATA: Final = (3, 2)
"""Key and version of the request."""
_FIND_COORDINATOR: Final = (10, 0)
_CLIENT: Final = "embedq-dev"
_TIMEOUT_S: Final = 2


def cluster_nodes(host: str, port: int) -> tuple[str, set[int]]:
    """The cluster's id, and the ids of the brokers that this one knows.

    Raises:
        OSError, EOFError: the broker does not answer.
    """
    answer = _ask(host, port, _METADATA, struct.pack(">i", 0))  # of no topic
    nodes = set()
    for _ in range(answer.int32()):
        nodes.add(answer.int32())
        answer.string()  # host
        answer.int32()  # port
        answer.string()  # rack
    return answer.string(), nodes


def group_coordinator(host: str, port: int) -> int:
    """The id of the broker that coordinates consumer groups; -1 while there is none.

    Asking makes the broker create the topic for the groups' offsets.

    Raises:
        OSError, EOFError: the broker does not answer.
    """
    answer = _ask(host, port, _FIND_COORDINATOR, _string(_CLIENT))
    answer.int16()  # the error, which comes with the id -1
    return answer.int32()


def _ask(host: str, port: int, request: tuple[int, int], body: bytes) -> _Reader:
    message = struct.pack(">hhi", *request, 0) + _string(_CLIENT) + body
    with (
        socket.create_connection((host, port), _TIMEOUT_S) as connection,
        connection.makefile("rwb") as stream,
    ):
        stream.write(struct.pack(">i", len(message)) + message)
        stream.flush()
        size = _Reader(_exactly(stream.read(4), 4)).int32()
        answer = _Reader(_exactly(stream.read(size), size))
    answer.int32()  # correlation id
    return answer


def _string(text: str) -> bytes:
    return struct.pack(">h", len(text)) + text.encode()


def _exactly(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise EOFError("the broker closed the connection")
    return data


class _Reader:
    """Reads Kafka's big-endian fields, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def int16(self) -> int:
        return self._integer(">h", 2)

    def int32(self) -> int:
        return self._integer(">i", 4)

    def string(self) -> str:
        size = self.int16()  # -1 stands for null
        start, self._at = self._at, self._at + max(0, size)
        return self._data[start : self._at].decode()

    def _integer(self, layout: str, size: int) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += size
        return int(value)
