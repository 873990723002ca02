"""Redis's answers from bytes, within bounds. Pure: whoever reads the socket feeds it.

redis-py's own parser follows any length and any nesting that the other side claims. A cache asks for little: a word, or
one list of values. Whatever else comes is not an answer to what was asked.
"""

from __future__ import annotations

from typing import Any, Final

MAX_REPLY_BYTES: Final = 4 << 20
"""Of one answer. The cache asks for a quarter of it at a time; a value that somebody else has put under a key may be of
another length, and is then read and refused."""
_LINE_BYTES: Final = 4096
"""Of a line: a number, or what Redis says in words."""

_LEAST_ITEM_BYTES: Final = 4
"""Of a list's item: its kind, a digit, and the end of the line."""


class BadReply(Exception):
    """What came is not an answer of a Redis to what was asked."""


class ErrorReply:
    """Redis refuses a command; `text` is what it says."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Incomplete:
    """More bytes must come first."""


INCOMPLETE: Final = Incomplete()


class ReplyReader:
    """Cuts what was fed into answers: bytes, int, None, ErrorReply, or one list of bytes and None.

    Never holds more than `limit` bytes of an answer, and nothing that was only claimed.
    """

    def __init__(self, limit: int = MAX_REPLY_BYTES) -> None:
        self._limit = limit
        self._fed = b""
        self._at = 0
        self._list: list[bytes | None] | None = None
        self._missing = 0
        self._head = b""
        """What the last value began with: those of a list are mostly of one length, which need not be read each time."""
        self._length = 0
        self._size = 0
        """Bytes of the list so far."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left over after the last answer."""
        return self._at == len(self._fed) and self._list is None

    def feed(self, data: bytes) -> None:
        """Take what came from the socket."""
        self._fed = self._fed[self._at :] + data
        self._at = 0

    def next(self) -> Any:
        """The next answer, or INCOMPLETE.

        Raises:
            BadReply: this is not one. Nothing that comes after it can be read.
        """
        if self._list is None:
            first = self._item()
            if not isinstance(first, _ListOf):
                return first
            self._list, self._missing, self._size = [], first.length, 0
        while self._missing:
            before = self._at
            item = self._like_the_last()
            if item is None:
                item = self._item()
                if item is INCOMPLETE:
                    return INCOMPLETE
                if item is not None and not isinstance(item, bytes):
                    raise BadReply("a list of something else than values")
            self._list.append(item)
            self._missing -= 1
            self._size += self._at - before
            if self._size > self._limit:
                raise BadReply("a list that is too long")
        found, self._list = self._list, None
        return found

    def _like_the_last(self) -> bytes | None:
        """The next item, if it is all there, and a value as long as the last one."""
        if not self._head or not self._fed.startswith(self._head, self._at):
            return None
        start = self._at + len(self._head)
        end = start + self._length
        if self._fed[end : end + 2] != b"\r\n":
            return None
        self._at = end + 2
        return self._fed[start:end]

    def _item(self) -> Any:
        end = self._fed.find(b"\r\n", self._at, self._at + _LINE_BYTES)
        if end < 0:
            if len(self._fed) - self._at >= _LINE_BYTES:
                raise BadReply("a line that is too long")
            return INCOMPLETE
        kind, line, start = self._fed[self._at : self._at + 1], self._fed[self._at + 1 : end], end + 2
        match kind:
            case b"$":
                length = _length(line)
                if length is not None:
                    return self._value(start, length)
                found: Any = None
            case b"*":
                length = _length(line)
                found = None if length is None else self._list_of(length)
            case b"+":
                found = line
            case b":":
                found = _number(line)
            case b"-":
                found = ErrorReply(line.decode("utf-8", "replace"))
            case _:
                raise BadReply("not the protocol of Redis")
        self._at = start
        return found

    def _value(self, start: int, length: int) -> Any:
        if length > self._limit:
            raise BadReply("a value that is too long")
        end = start + length
        if len(self._fed) < end + 2:
            return INCOMPLETE
        if self._fed[end : end + 2] != b"\r\n":
            raise BadReply("a value without its end")
        self._head, self._length = self._fed[self._at : start], length
        self._at = end + 2
        return self._fed[start:end]

    def _list_of(self, length: int) -> _ListOf:
        if self._list is not None:
            raise BadReply("a list in a list")
        if length > self._limit // _LEAST_ITEM_BYTES:
            raise BadReply("a list that is too long")
        return _ListOf(length)


class _ListOf:
    """The head of a list."""

    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        self.length = length


def _length(line: bytes) -> int | None:
    """A length, None for what Redis has not."""
    found = _number(line)
    if found < -1:
        raise BadReply("a length below zero")
    return None if found == -1 else found


def _number(line: bytes) -> int:
    if not line.removeprefix(b"-").isdigit() or len(line) > 20:
        raise BadReply("not a number")
    return int(line)
