"""Settings from the environment: a frozen struct for each program, in which a name that is mistyped is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar, get_type_hints

import msgspec

from embedq_shared.secret import Secret, read_secret
from embedq_shared.settings.words import plain, wrong

S = TypeVar("S", bound=msgspec.Struct)


class SettingsError(Exception):
    """A setting is missing, mistyped or out of range; the message names the variable."""


def read_settings(
    kind: type[S], prefix: str, environ: Mapping[str, str], *, ours: Callable[[str], bool] = lambda name: True
) -> S:
    """The settings that `kind` describes, each field from the variable `<PREFIX><FIELD>`.

    A field that is a `Secret` may also be in a file, which `<PREFIX><FIELD>_FILE` names. `ours` says which of the variables with
    this prefix are meant for this struct; those that are and that it does not have are mistyped.

    Raises:
        SettingsError: naming the variable and what was expected.
    """
    raw: dict[str, str] = {
        name.removeprefix(prefix).lower(): value
        for name, value in environ.items()
        if name.startswith(prefix) and ours(name)
    }
    hints = get_type_hints(kind, include_extras=True)
    for field in secret_fields(kind):
        _read_file(raw, field, prefix)
    meant = {name: plain(hints[name], value) if name in hints else value for name, value in raw.items()}
    try:
        return msgspec.convert(meant, kind, strict=False, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), kind, prefix, raw)) from None


def secret_fields(kind: type[msgspec.Struct]) -> list[str]:
    """The fields that hold secrets, each of which may be in a file of its own."""
    hints = get_type_hints(kind)
    return [name for name in kind.__struct_fields__ if hints[name] is Secret]


def _read_file(raw: dict[str, str], field: str, prefix: str) -> None:
    """Put what the file of `<PREFIX><FIELD>_FILE` holds where the variable itself would be."""
    path = raw.pop(f"{field}_file", None)
    if path is None:
        return
    name = f"{prefix}{field.upper()}"
    if field in raw:
        raise SettingsError(f"{name}: cannot be set together with {name}_FILE")
    try:
        raw[field] = read_secret(path)
    except ValueError as error:
        raise SettingsError(f"{name}_FILE: expected a file with one secret; {path} {error}") from None


def _explain(message: str, kind: type[msgspec.Struct], prefix: str, raw: Mapping[str, str]) -> str:
    """msgspec's sentence in plain words, after the variable's name."""
    if unknown := re.match(r"Object contains unknown field `(.*)`", message):
        import difflib  # for the mistaken alone

        close = difflib.get_close_matches(unknown[1], kind.__struct_fields__, n=1)
        hint = f"; did you mean {prefix}{close[0].upper()}?" if close else ""
        return f"unknown setting {prefix}{unknown[1].upper()}{hint}"
    if missing := re.match(r"Object missing required field `(\w+)`", message):
        return f"{prefix}{missing[1].upper()} must be set"
    if at := re.search(r" - at `\$\.(\w+)`$", message):
        return f"{prefix}{at[1].upper()}: {wrong(kind, at[1], raw)}"
    return message
