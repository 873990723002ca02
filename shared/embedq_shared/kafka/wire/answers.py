"""A broker's answers, taken as they come. aiokafka reads them in a task, through a stream: each is copied twice, and whoever waits for
it hears of it a round of the event loop later.
"""

from __future__ import annotations

import struct
import weakref
from typing import Any, Final

from aiokafka.conn import AIOKafkaProtocol

_SIZE: Final = struct.Struct(">i")


class Frames:
    """Cuts what comes into answers. Pure."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._have = 0
        self._need = _SIZE.size
        """Bytes with which the next answer is whole, as far as its size is known."""

    def feed(self, data: bytes) -> list[bytes]:
        """The answers that are whole with this.

        Raises:
            ValueError: an answer of less than no bytes.
        """
        self._parts.append(data)
        self._have += len(data)
        if self._have < self._need:
            return []
        whole = data if len(self._parts) == 1 else b"".join(self._parts)
        found: list[bytes] = []
        at, self._need = 0, _SIZE.size
        while len(whole) - at >= self._need:
            (size,) = _SIZE.unpack_from(whole, at)
            if size < 0:
                raise ValueError("an answer of less than no bytes")
            start, end = at + _SIZE.size, at + _SIZE.size + size
            if end > len(whole):
                self._need = _SIZE.size + size
                break
            found.append(whole[start:end])
            at = end
        self._parts = [whole[at:]] if at < len(whole) else []
        self._have = len(whole) - at
        return found


class Answers(AIOKafkaProtocol):  # type: ignore[misc]  # aiokafka has no type information
    """Hands each answer to its connection. That the connection is lost, or that an answer cannot be read, aiokafka's task hears as before,
    and ends the connection."""

    @classmethod
    def take(cls, connection: Any) -> None:
        """Whatever comes on this connection from now on, if nothing is under way there."""
        if connection._reader is None or connection._requests or connection._reader._buffer:
            return
        protocol = connection._protocol
        if type(protocol) is cls:
            return
        protocol.__class__ = cls
        protocol.frames = Frames()
        protocol.connection = weakref.ref(connection)
        # The transport of another event loop may have kept the method that was here before.
        connection._writer.transport.set_protocol(protocol)

    def data_received(self, data: bytes) -> None:
        """Bytes of answers."""
        connection = self.connection()
        try:
            for frame in self.frames.feed(data):
                if connection is None or connection._reader is None:
                    return  # it was closed
                connection._handle_frame(frame)
        except Exception as error:  # noqa: BLE001  whatever it is, nothing that comes after it can be read
            if connection is not None and connection._reader is not None:
                connection._reader.set_exception(error)
