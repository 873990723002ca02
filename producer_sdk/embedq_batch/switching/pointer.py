"""A pointer file: a small JSON file that says where readers find the vectors now. For targets that have no aliases of their own, and any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from embedq_batch.errors import BadTarget

SUFFIX: Final = ".json"


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """What a pointer file holds."""

    target: str
    """As it was typed after --to, but without a password."""
    model: str
    """The alias to embed questions with."""
    model_version: str | None
    before: str | None = None
    """The target that it meant before."""


def read(path: Path) -> Pointer | None:
    """What a pointer file says; None: there is none.

    Raises:
        BadTarget: it is another kind of file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Pointer)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        raise BadTarget(target=str(path), reason="is a file of its own, not a pointer") from None
    except OSError as error:
        raise BadTarget(target=str(path), reason=error.strerror or str(error)) from None


def write(path: Path, pointer: Pointer) -> None:
    """Replace a pointer file as a whole: a reader gets the old one or the new one, and no piece of either."""
    aside = path.with_name(f".{path.name}.embedq-new")
    try:
        with open(aside, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(pointer)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise BadTarget(target=str(path), reason=error.strerror or str(error)) from None
