"""Names of files and batches. They begin with the time, so that the order of names is the order of creation."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Final, Literal
from urllib.parse import quote

Kind = Literal["file", "batch"]

_TIME_DIGITS: Final = 12
"""Hexadecimal digits of the milliseconds since 1970: enough until the year 10889."""
_REST_BYTES: Final = 10
_PREFIX: Final = {"file": "file-", "batch": "batch_"}
_SHAPE: Final = {kind: re.compile(rf"{prefix}[0-9a-f]{{32}}") for kind, prefix in _PREFIX.items()}


def new_id(kind: Kind, now: float) -> str:
    """A name that nobody can guess; `now` is seconds since 1970."""
    return f"{_PREFIX[kind]}{int(now * 1000):0{_TIME_DIGITS}x}{os.urandom(_REST_BYTES).hex()}"


def is_id(kind: Kind, name: str) -> bool:
    """Whether we may have made this name, which then is safe as part of a key."""
    return _SHAPE[kind].fullmatch(name) is not None


def result_file_id(batch: str, which: str) -> str:
    """The name of a batch's output or error file: the same for whoever ends the batch, so that it is made once."""
    digits = batch.removeprefix(_PREFIX["batch"])
    rest = hashlib.blake2b(f"{batch}/{which}".encode(), digest_size=_REST_BYTES).hexdigest()
    return f"{_PREFIX['file']}{digits[:_TIME_DIGITS]}{rest}"


def request_id(batch: str, number: int) -> str:
    """The name of a batch's line, as OpenAI's `batch_req_…`: the same however often the line runs."""
    return f"batch_req_{hashlib.blake2b(f'{batch}/{number}'.encode(), digest_size=_REST_BYTES).hexdigest()}"


def owner_folder(owner: str) -> str:
    """A caller's folder: its name as part of a key, whatever characters it has. Two names never share a folder."""
    quoted = quote(owner, safe="").replace(".", "%2E").replace("~", "%7E")
    if len(quoted) > _LONGEST_FOLDER:
        quoted = f"~{hashlib.blake2b(owner.encode(), digest_size=32).hexdigest()}"
    return f"owners/{quoted or '~'}"


_LONGEST_FOLDER: Final = 200
"""File systems take names of 255 bytes."""
