"""Inputs that look almost right: valid examples, changed where their structure is, then maybe where their bytes are. Pure.

An input depends on the seed and its number alone, so that one finding can be told again without the million before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Final

import msgspec

Tree = Any
"""What JSON or MessagePack can hold."""

_NUMBERS: Final = (
    *(
        0,
        -1,
        1,
        7,
        31,
        32,
        255,
        256,
        2048,
        65535,
        2**31 - 1,
        2**31,
        -(2**31) - 1,
        2**53,
        2**63 - 1,
        2**63,
        -(2**63),
    ),
    *(0.5, -0.0, 1e-320, 1e38, 3.5e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)
_STRINGS: Final = (
    "",
    " ",
    "\x00",
    "\ud800",
    "\uffff",
    "🚀" * 3,
    "a" * 300,
    "$.input[0]",
    " - at `$.chunk`",
    "Object contains unknown field `x`",
    "../../etc/passwd",
    "/dev/zero",
    "null",
    "NaN",
    "AAAA",
    "AAA=",
    "=",
    "float32",
    "late",
    "query",
    "list",
    "error",
    "sha256:" + "a" * 64,
)
_BYTES: Final = (b"", b"\x00", b"\xff" * 8, b"\x00" * 128, bytes(range(256)))
_TOKENS: Final = (
    *(
        b"null",
        b"true",
        b"1e999",
        b"-",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\u0000",
        b"\\ud800",
        b"\xef\xbb\xbf",
        b"\x00",
    ),
    *(
        b"\xc0",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xd4\x01\x00",
        b"[" * 600,
    ),
)
"""Pieces that parsers trip over: JSON first, MessagePack's claims of four billion items after it."""
_DEEPEST: Final = 700
"""Levels of a nest: over the contract's 64 and over what parsers allow by recursion."""


class Mutator:
    """Draws inputs from trees. `raw` serializes may be asked for JSON or MessagePack."""

    def __init__(self, seed: int, examples: Sequence[Tree], formats: Sequence[str] = ("json",)) -> None:
        self._seed = seed
        self._examples = examples
        self._formats = formats

    def input(self, number: int) -> tuple[bytes, str]:
        """The bytes of one input, and the format that it began as."""
        draw = random.Random(self._seed * 1_000_003 + number)
        format = draw.choice(self._formats)
        if draw.random() < 0.03:
            return draw.randbytes(draw.randrange(200)), format
        tree = copied(draw.choice(self._examples))
        for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 6))):
            tree = changed(tree, draw)
        data = serialized(tree, format, draw)
        if draw.random() < 0.35:
            data = damaged(data, draw)
        return data, format


def serialized(tree: Tree, format: str, draw: random.Random) -> bytes:
    """The tree's bytes; what the format cannot hold is written in a way that it does not allow."""
    try:
        if format == "msgpack":
            return msgspec.msgpack.encode(tree)
        # Python's own writer, since it writes NaN, Infinity and lone surrogates, which JSON does not have.
        text = json.dumps(tree, ensure_ascii=draw.random() < 0.5, default=_as_text)
        return text.encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, OverflowError, RecursionError, UnicodeEncodeError):
        return repr(tree)[:5000].encode("utf-8", "surrogatepass")


def _as_text(value: object) -> object:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def changed(tree: Tree, draw: random.Random) -> Tree:
    """The tree with one place changed: another value, a key or item more or less, renamed, repeated or moved."""
    places = list(_places(tree))
    if not places or draw.random() < 0.03:
        return hostile(draw)
    holder, key = draw.choice(places)
    match draw.randrange(8):
        case 0 | 1 | 2:
            holder[key] = hostile(draw)
        case 3:
            del holder[key]
        case 4 if isinstance(holder, dict):
            holder[draw.choice((draw.choice(_STRINGS), f"{key}x", str(key).upper()))] = holder.pop(key)
        case 5:
            _, other = draw.choice(places)
            if isinstance(holder, list):
                holder.insert(draw.randrange(len(holder) + 1), copied(holder[key]))
            else:
                holder[str(other)] = copied(holder[key])
        case 6:
            other_holder, other_key = draw.choice(places)
            holder[key] = copied(other_holder[other_key])
        case _:
            holder[key] = _nudged(holder[key], draw)
    return tree


def copied(tree: Tree) -> Tree:
    """Its own lists and objects; what lies deeper than any example does is shared, since nothing changes it."""
    return _copied(tree, 16)


def _copied(tree: Tree, depth: int) -> Tree:
    if depth and isinstance(tree, dict):
        return {key: _copied(value, depth - 1) for key, value in tree.items()}
    if depth and isinstance(tree, list):
        return [_copied(value, depth - 1) for value in tree]
    return tree


def _places(tree: Tree, depth: int = 0) -> Any:
    if depth > 12:
        return
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value, depth + 1)
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:20]):
            yield tree, index
            yield from _places(value, depth + 1)


def _nudged(value: Tree, draw: random.Random) -> Tree:
    """Nearly the same value."""
    match value:
        case bool():
            return not value
        case int():
            return value + draw.choice((-1, 1, 256, -value, 2**32))
        case float():
            return value * draw.choice((-1.0, 1e30, 0.0, float("inf")))
        case str() if value:
            cut = draw.randrange(len(value))
            return value[:cut] + draw.choice(_STRINGS) + value[cut + draw.randrange(2) :]
        case bytes() if value:
            return damaged(value, draw)
        case list():
            return value * draw.choice((0, 2, 3))
        case _:
            return hostile(draw)


def hostile(draw: random.Random) -> Tree:
    """A value that hardly any field expects."""
    match draw.randrange(9):
        case 0:
            return None
        case 1:
            return draw.random() < 0.5
        case 2 | 3:
            return draw.choice(_NUMBERS)
        case 4 | 5:
            return draw.choice(_STRINGS)
        case 6:
            return draw.choice(_BYTES)
        case 7:
            return draw.choice(([], {}, [[]], [None], {"": {}}, [1, "a", None], ["a"] * 50, {"index": 0}))
        case _:
            return nested(draw.choice((3, 63, 64, 65, _DEEPEST)), draw)


def nested(depth: int, draw: random.Random) -> Tree:
    """A nest of lists or objects."""
    value: Tree = 0
    for _ in range(depth):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few places broken."""
    broken = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not broken:
            return bytes(broken)
        at = draw.randrange(len(broken))
        match draw.randrange(7):
            case 0:
                broken[at] ^= 1 << draw.randrange(8)
            case 1:
                broken[at] = draw.choice((0, 0x22, 0x5C, 0x7B, 0x80, 0xC1, 0xFF, draw.randrange(256)))
            case 2:
                del broken[at:]
            case 3:
                del broken[at : at + draw.randrange(1, 9)]
            case 4:
                broken[at:at] = draw.choice(_TOKENS)
            case 5:
                broken[at:at] = broken[at : at + draw.randrange(1, 40)] * draw.choice((1, 2, 10))
            case _:
                broken[at : at + 4] = draw.randbytes(4)
    return bytes(broken)
