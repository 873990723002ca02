"""What a model's output must satisfy before the model may serve. Pure: vectors in, an exception out."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

CHECK_TEXTS: Final = (
    "",
    "embedq",
    "The harbour pilot boards the ship two miles before the breakwater.",
    "Wie lange muss der Teig ruhen, bevor er in den Ofen kommt?",
    "光合成は、光のエネルギーを使って二酸化炭素と水から糖を作る反応である。",
    "¿Dónde puedo renovar el pasaporte si vivo en el extranjero? 🛂",
    "SELECT name, count(*) FROM jobs WHERE state = 'waiting' GROUP BY name ORDER BY 2 DESC;",
    "A reload is safe when every job accepted before it is answered, and every vector says which model made it. "
    * 8,
)
"""What a new model is checked with: short, long, in several scripts, and nothing at all."""

_NORM_TOLERANCE: Final = 1e-3
"""Far above what float32 loses on a vector of some thousand components, far below any real fault."""


class ModelRejected(Exception):
    """A model may not serve; the message says why."""


def check_finite(vectors: Vectors) -> None:
    """The check texts' vectors, float32 (texts, hidden_size), are finite and of length 1.

    Raises:
        ModelRejected: they are not.
    """
    norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(vectors).all() or not np.allclose(norms, 1.0, atol=_NORM_TOLERANCE):
        raise ModelRejected("check: expected finite vectors of length 1 for every check text")


def check_version(expected: str | None, model_version: str) -> None:
    """The model is the one that the command names by its digest, if it names one.

    Raises:
        ModelRejected: it is another one.
    """
    if expected is not None and expected != model_version:
        raise ModelRejected(f"digest: expected {expected}, the directory has {model_version}")


def check_similarity(min_cosine: float, old: Vectors, new: Vectors) -> None:
    """Each check text's new unit vector has at least this cosine to the old one; both float32 (texts, hidden_size).

    Raises:
        ModelRejected: one has less, or the models' dimensions differ.
    """
    if old.shape != new.shape:
        raise ModelRejected(
            f"min_cosine: expected vectors of {old.shape[1]} dimensions, as the old model has, got {new.shape[1]}"
        )
    least = float((old * new).sum(axis=1).min())
    if least < min_cosine:
        raise ModelRejected(f"min_cosine: expected at least {min_cosine:g} to the old model, got {least:.4f}")
