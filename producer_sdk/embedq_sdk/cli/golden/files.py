"""Golden files: made of vectors, read, and compared with vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from embedq_sdk.cli.golden.sources import Asked, Vectors
from embedq_sdk.cli.text_sources import BadSource
from embedq_shared.golden import (
    MOST_BYTES,
    Golden,
    GoldenText,
    cosine_of,
    decode_golden,
    encode_golden,
)
from embedq_shared.messages import SAME_SPACE_COSINE
from embedq_shared.vectors import cut_and_normalize

__all__ = ["Report", "compared", "read", "written"]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How close each vector is to the stored one, which of them are too far off, and from where on."""

    cosines: list[float]
    missed: list[int]
    least: float


def written(
    file: Path,
    asked: Sequence[Asked],
    vectors: Vectors,
    model_version: str,
    *,
    dimensions: int | None,
    min_cosine: float | None,
) -> int:
    """Write the file, whole or not at all; how many numbers each vector has.

    Raises:
        BadSource: a vector cannot be kept, or the file would be too large to be read.
    """
    length = len(vectors[0]) if dimensions is None else dimensions
    if length > len(vectors[0]):
        raise BadSource(f"--dimensions: expected at most {len(vectors[0])}, the model's own, got {length}")
    texts = []
    for (text, input_type), vector in zip(asked, vectors, strict=True):
        unit = cut_and_normalize(vector, length)
        if not np.isfinite(unit).all() or not unit.any():
            raise BadSource(f"the model's vector of {text[:40]!r} is not finite, or zero")
        texts.append(GoldenText(text=text, input_type=input_type, embedding=unit.tolist()))
    least = SAME_SPACE_COSINE if min_cosine is None else min_cosine
    try:
        content = encode_golden(Golden(texts=texts, min_cosine=least, model_version=model_version))
    except ValueError as error:
        raise BadSource(f"{file}: {error}") from None
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)
    return length


def read(file: Path) -> Golden:
    """
    Raises:
        BadSource: it is no such file.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise BadSource(f"{file}: expected at most {MOST_BYTES:,} bytes")
        return decode_golden(content)
    except msgspec.ValidationError as error:
        raise BadSource(f"{file}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadSource(f"{file}: not valid JSON") from None


def compared(stored: Golden, vectors: Vectors, min_cosine: float | None) -> Report:
    """
    Raises:
        BadSource: the model's vectors are shorter.
    """
    least = stored.min_cosine if min_cosine is None else min_cosine
    try:
        cosines = [cosine_of(wanted, vector) for wanted, vector in zip(stored.texts, vectors, strict=True)]
    except ValueError as error:
        raise BadSource(str(error)) from None
    return Report(
        cosines=cosines,
        missed=[number for number, cosine in enumerate(cosines) if not cosine >= least],
        least=least,
    )
