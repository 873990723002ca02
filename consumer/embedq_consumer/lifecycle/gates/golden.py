"""The golden texts of a model: read from their file, and compared."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_consumer.engine import ModelError
from embedq_consumer.engine.safety.files import read_bounded
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_shared.golden import MOST_BYTES, Golden, cosine_of, decode_golden

__all__ = ["check_golden", "read_golden"]


def read_golden(file: Path) -> Golden:
    """The texts of a file. Blocks on the file system.

    Raises:
        ModelRejected: it is missing, no regular file, or no such JSON.
    """
    try:
        return decode_golden(read_bounded(file, MOST_BYTES))
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
        try:
            cosine = cosine_of(wanted, vector)
        except ValueError as error:
            raise ModelRejected(f"golden: {error}") from error
        if not cosine >= least:
            raise ModelRejected(
                f"golden: texts[{number}]: expected a cosine of at least {least:g} to the stored vector, got {cosine:.4f}"
            )
