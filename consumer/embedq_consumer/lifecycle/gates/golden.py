"""Texts and the vectors that a model must give for them, stored in a file: proof that weights, tokenizer and pooling belong together.

The file is JSON: `{"texts": [{"text": …, "input_type": "query" or "document", "embedding": [numbers]}, …], "min_cosine": 0.995}`.
`embedding` may have fewer numbers than the model gives: then the vector is cut to them. `input_type` and `min_cosine` may be left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from embedq_consumer.engine import ModelError
from embedq_consumer.engine.safety.files import read_bounded
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_shared.messages import SAME_SPACE_COSINE, InputType
from embedq_shared.vectors import cut_and_normalize

__all__ = ["Golden", "GoldenText", "check_golden", "read_golden"]

_MOST_BYTES: Final = 4 * 1024 * 1024
"""What any JSON file in a model directory may have: fifty vectors of 4,096 numbers with all their digits."""
_MOST_TEXTS: Final = 256
"""Each costs a reload the time of a text alone."""


class GoldenText(msgspec.Struct, frozen=True, kw_only=True):
    """A text, and the vector that it must get, of any length but 0."""

    text: str
    embedding: Annotated[list[float], Meta(min_length=1)]
    input_type: InputType | None = None


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a file."""

    texts: Annotated[list[GoldenText], Meta(min_length=1, max_length=_MOST_TEXTS)]
    min_cosine: Annotated[float, Meta(ge=-1, le=1)] = SAME_SPACE_COSINE


def read_golden(file: Path) -> Golden:
    """The texts of a file. Blocks on the file system.

    Raises:
        ModelRejected: it is missing, no regular file, or no such JSON.
    """
    try:
        return msgspec.json.decode(read_bounded(file, _MOST_BYTES), type=Golden)
    except ModelError as error:
        raise ModelRejected(f"golden: {error}") from error
    except msgspec.ValidationError as error:
        raise ModelRejected(f"golden: {file}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelRejected(f"golden: {file}: not valid JSON") from error


def check_golden(golden: Golden, vectors: npt.NDArray[np.float32], min_cosine: float | None) -> None:
    """The model's vectors of the texts, float32 (texts, hidden_size), are those expected; `min_cosine` of the command wins.

    Raises:
        ModelRejected: one is not. The message says which, and how far off it is.
    """
    least = golden.min_cosine if min_cosine is None else min_cosine
    for number, (wanted, vector) in enumerate(zip(golden.texts, vectors, strict=True)):
        length = len(wanted.embedding)
        if length > len(vector):
            raise ModelRejected(
                f"golden: expected vectors of {length} dimensions, the model gives {len(vector)}"
            )
        expected = cut_and_normalize(np.array(wanted.embedding, dtype=np.float32), length)
        cosine = float(expected @ cut_and_normalize(vector, length))
        if not cosine >= least:
            raise ModelRejected(
                f"golden: texts[{number}]: expected a cosine of at least {least:g} to the stored vector, got {cosine:.4f}"
            )
