"""What a setting takes, in plain words: for error messages, for `--help` and for the page of settings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from embedq_shared.secret import Secret

_YES_AND_NO: Final = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_UNBOUNDED: Final = 1e9
"""An upper bound that nobody meets is not worth a word."""
_LONGEST_SHOWN: Final = 80
"""Characters of a value in an error message."""
_WIDTH: Final = 100


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. `takes` completes the sentence "expected …"; `default` is "" for empty, None where it must be set."""

    name: str
    takes: str
    default: str | None
    meaning: str


def described(kind: type[msgspec.Struct], prefix: str) -> list[Described]:
    """Each field of a struct of settings, by its environment variable."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        Described(
            name=f"{prefix}{field.name.upper()}",
            takes=takes(hints[field.name]),
            default=None if field.required else shown(field.default),
            meaning=next((meta.description for meta in metas(hints[field.name]) if meta.description), ""),
        )
        for field in msgspec.structs.fields(kind)
    ]


def takes(hint: Any) -> str:
    """What a field of this type takes."""
    kind = getattr(hint, "__origin__", hint) if metas(hint) else hint
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        Secret: "text, or a file's path in `…_FILE`",
    }[kind]
    for meta in metas(hint):
        if meta.extra and "takes" in meta.extra:
            return str(meta.extra["takes"])
        if meta.ge is not None:
            words += f", at least {meta.ge:,}"
        if meta.gt is not None:
            words += f", above {meta.gt:,}"
        if meta.le is not None and meta.le < _UNBOUNDED:
            words += f", at most {meta.le:,}"
        if meta.min_length == 1:
            words += ", not empty"
        if meta.max_length is not None:
            words += f" of at most {meta.max_length:,} characters"
    return words


def metas(hint: Any) -> list[msgspec.Meta]:
    """What is said of a type besides the type, the last word first."""
    return [item for item in reversed(getattr(hint, "__metadata__", ())) if isinstance(item, msgspec.Meta)]


def plain(hint: Any, value: str) -> str:
    """A value as msgspec reads it: choices in any case of letters, and the usual words for true and false."""
    kind = getattr(hint, "__origin__", hint) if metas(hint) else hint
    if kind is bool:
        return _YES_AND_NO.get(value.lower(), value.lower())
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if choice.lower() == value.lower()), value)
    return value


def wrong(kind: type[msgspec.Struct], field: str, values: Mapping[str, str]) -> str:
    """The end of an error's sentence: what was expected of a field, and what came, unless that is a secret."""
    hint = get_type_hints(kind, include_extras=True)[field]
    expected = f"expected {takes(hint)}"
    if field not in values or Secret in (hint, getattr(hint, "__origin__", hint)):
        return expected
    value = values[field]
    shortened = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}…"
    return f"{expected}, got {shortened!r}" if value else f"{expected}, got nothing"


def shown(value: object) -> str:
    """A default as it would be set."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text(usage: str, about: str, settings: Iterable[Described]) -> str:
    """What `--help` prints: how the program is started, what it does, and its settings."""
    return "\n".join([f"usage: {usage}", "", *textwrap.wrap(about, _WIDTH), *settings_text(settings)])


def settings_text(settings: Iterable[Described]) -> list[str]:
    """Each setting in a few lines, after an empty one."""
    lines = []
    for one in settings:
        default = "required" if one.default is None else f"default: {one.default or 'empty'}"
        lines += ["", f"{one.name}  ({one.takes}; {default})"]
        lines += textwrap.wrap(
            one.meaning.replace("`", ""), _WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return lines
