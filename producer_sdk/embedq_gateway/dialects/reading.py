"""Reads a request's body into a struct. What is wrong is named, and no value of the body is repeated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

from embedq_gateway.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
# At the end, since the text before may quote the value.
_AT: Final = re.compile(r" - at `\$\.(\w+)((?:\[\d+\])?)[^`]*`\Z")
_LONGEST_NAME: Final = 64
"""Characters of an unknown field's name in a message."""


def read(body: bytes, kind: type[T], expected: Mapping[str, str]) -> T:
    """A body as this struct; `expected` says what each field must be.

    Raises:
        ApiError: `malformed`, `unknown_field` or `invalid_value`, with the field in `param`.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), expected) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("malformed", "expected one valid JSON object in UTF-8") from None


def invalid(field: str, expected: Mapping[str, str], suffix: str = "") -> ApiError:
    """That a field is not what it must be; `suffix` is the place in it, such as `[3]`."""
    words = "a string" if suffix else expected[field]
    return ApiError("invalid_value", f"`{field}{suffix}`: expected {words}", f"{field}{suffix}")


def named(error: ApiError, names: Mapping[str, str]) -> str:
    """An error's message with its field in front, for interfaces that have no place for it; `names` are theirs."""
    if error.param is None:
        return error.message
    name, bracket, rest = error.param.partition("[")
    field = f"`{names.get(name, name)}{bracket}{rest}`"
    message = error.message.removeprefix(f"`{error.param}`: ")
    return message if field in message else f"{field}: {message}"


def _explained(message: str, expected: Mapping[str, str]) -> ApiError:
    if (at := _AT.search(message)) and at[1] in expected:
        return invalid(at[1], expected, at[2])
    if unknown := _UNKNOWN.match(message):
        name = unknown[1][:_LONGEST_NAME]
        return ApiError(
            "unknown_field", f"unknown field `{name}`; a request has: {', '.join(expected)}", name
        )
    if (missing := _MISSING.match(message)) and missing[1] in expected:
        return invalid(missing[1], expected)
    return ApiError("malformed", "expected one valid JSON object in UTF-8")
