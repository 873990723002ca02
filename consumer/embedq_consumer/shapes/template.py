"""The text of a row: one of its fields, or a template of several. Pure."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from embedq_consumer.shapes.rows import MISSING, BadRow, Row, named

_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Slot(msgspec.Struct, frozen=True):
    """A field's place in a template. One that is `optional` may be null or missing, and is nothing then."""

    path: str
    optional: bool = False


class NullText(Exception):
    """A field that the text needs is null. `args[0]` is its path."""


class Template(msgspec.Struct, frozen=True):
    """Literal text and slots, in order."""

    parts: tuple[str | Slot, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """A template such as `{title}, by {author.name?}`; `{{` and `}}` are braces. Without braces, a field's name.

        Raises:
            ValueError: it names no field, or a brace is left over.
        """
        if "{" not in source and "}" not in source:
            return cls((_slot(source, may_be_optional=False),))
        parts: list[str | Slot] = []
        literal = ""
        end = 0
        for found in _TOKEN.finditer(source):
            literal += source[end : found.start()]
            end = found.end()
            if found[0] in ("{{", "}}"):
                literal += found[0][0]
            elif found[1] is None:
                raise ValueError(f"expected {{field}}, got a single brace at character {found.start()}")
            else:
                parts += [literal] if literal else []
                literal = ""
                parts.append(_slot(found[1], may_be_optional=True))
        literal += source[end:]
        parts += [literal] if literal else []
        if not any(isinstance(part, Slot) for part in parts):
            raise ValueError("expected at least one {field}")
        return cls(tuple(parts))

    def render(self, row: Row) -> str:
        """The row's text.

        Raises:
            BadRow: a field is missing, or is no text, number or boolean.
            NullText: a field that is not optional is null.
        """
        return "".join(part if isinstance(part, str) else _filled(part, row) for part in self.parts)


def _slot(source: str, *, may_be_optional: bool) -> Slot:
    optional = may_be_optional and source.endswith("?")
    path = source[:-1] if optional else source
    if not path or path != path.strip():
        raise ValueError("expected the name of a field")
    return Slot(path, optional)


def _filled(slot: Slot, row: Row) -> str:
    found: Any = row.get(slot.path)
    if slot.optional and (found is None or found is MISSING):
        return ""
    name = named(slot.path)
    if found is MISSING:
        raise BadRow(
            "invalid_value", f"`{name}`: expected a field of this name, which the mapping's text needs", name
        )
    if found is None:
        raise NullText(name)
    if isinstance(found, str):
        return found
    if isinstance(found, bool | int | float):
        return msgspec.json.encode(found).decode()
    raise BadRow("invalid_value", f"`{name}`: expected a string, a number or a boolean", name)
