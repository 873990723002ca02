"""Texts and the vectors that a model must give for them, stored in a file: proof that weights, tokenizer and pooling belong together.

The file is JSON: `{"texts": [{"text": …, "input_type": "query" or "document", "embedding": [numbers]}, …], "min_cosine": 0.995}`.
`embedding` may have fewer numbers than the model gives: then the vector is cut to them. All but `texts`, `text` and `embedding` may be
left out.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from embedq_shared.messages import SAME_SPACE_COSINE, InputType
from embedq_shared.vectors import cut_and_normalize

__all__ = ["MOST_BYTES", "MOST_TEXTS", "Golden", "GoldenText", "cosine_of", "decode_golden", "encode_golden"]

MOST_BYTES: Final = 4 * 1024 * 1024
"""What any JSON file in a model directory may have: fifty vectors of 4,096 numbers with all their digits."""
MOST_TEXTS: Final = 256
"""Each costs a reload the time of a text alone."""
_DIGITS: Final = 7
"""Of a component of a unit vector: what float32 has."""


class GoldenText(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A text, and the vector that it must get, of any length but 0."""

    text: str
    embedding: Annotated[list[float], Meta(min_length=1)]
    input_type: InputType | None = None


class Golden(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of a file."""

    texts: Annotated[list[GoldenText], Meta(min_length=1, max_length=MOST_TEXTS)]
    min_cosine: Annotated[float, Meta(ge=-1, le=1)] = SAME_SPACE_COSINE
    model_version: str | None = None
    """Of the model that gave these vectors, for people: others may pass."""


def decode_golden(content: bytes) -> Golden:
    """
    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is no such JSON.
    """
    return msgspec.json.decode(content, type=Golden)


def encode_golden(golden: Golden) -> bytes:
    """The file's content, a text on each line.

    Raises:
        ValueError: it is larger than what is read.
    """
    lines = [msgspec.json.encode(_rounded(each)) for each in golden.texts]
    rest = msgspec.json.encode(msgspec.structs.replace(golden, texts=[]))
    head = rest.replace(b'"texts":[]', b'"texts":[\n' + b",\n".join(lines) + b"\n]", 1)
    if len(head) >= MOST_BYTES:
        raise ValueError(
            f"expected at most {MOST_BYTES:,} bytes, got {len(head):,}; fewer texts or dimensions take less"
        )
    return head + b"\n"


def cosine_of(wanted: GoldenText, vector: npt.NDArray[np.float32]) -> float:
    """The cosine of a model's vector to the stored one.

    Raises:
        ValueError: it is shorter.
    """
    length = len(wanted.embedding)
    if length > len(vector):
        raise ValueError(f"expected vectors of {length} dimensions, the model gives {len(vector)}")
    expected = cut_and_normalize(np.array(wanted.embedding, dtype=np.float32), length)
    return float(expected @ cut_and_normalize(vector, length))


def _rounded(text: GoldenText) -> GoldenText:
    return msgspec.structs.replace(text, embedding=[round(number, _DIGITS) for number in text.embedding])
