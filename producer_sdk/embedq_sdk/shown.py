"""How results look in a notebook or a log: short, whatever they hold. numpy's way for arrays, a count for long lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from reprlib import Repr
from typing import Any, Final

import msgspec
import numpy as np

_SHORT: Final = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 3
_SHORT.maxlevel = 2
_MOST_NUMBERS: Final = 16
"""Of an array that is shown whole."""


class Shown(msgspec.Struct, frozen=True):
    """A struct whose `repr` is short. Fields that are None or have their default are left out."""

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={_short(value)}" for name, value in self._facts())
        return f"{type(self).__name__}({facts})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """What rich prints, instead of every field that msgspec would give it."""
        return [(name, _Plain(_short(value))) for name, value in self._facts()]

    def _facts(self) -> Iterator[tuple[str, Any]]:
        """The fields to show, by name."""
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            if value is not None and (field.required or value is not field.default):
                yield field.name, value


class _Plain(str):
    """Text that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _short(value: object) -> str:
    if isinstance(value, Shown):
        return repr(value)
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, (list, tuple, Mapping)) and len(value) > _SHORT.maxlist:
        return f"<{len(value):,} of {_kind(value)}>"
    return _SHORT.repr(value)


def _kind(values: list[Any] | tuple[Any, ...] | Mapping[Any, Any]) -> str:
    some = next(iter(values.values() if isinstance(values, Mapping) else values))
    return type(some).__name__


def _array(array: np.ndarray[Any, Any]) -> str:
    numbers = np.array2string(
        array, threshold=_MOST_NUMBERS, edgeitems=2, precision=4, separator=", ", prefix="array("
    )
    return f"array({numbers}, shape={array.shape}, dtype={array.dtype})"
