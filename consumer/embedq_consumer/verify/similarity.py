"""How similar two models' vectors of the same texts are: cosines where their lengths are equal, neighbors always. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Cosines", "Neighbors", "agreements", "cosines", "nearest", "percentile", "summary", "unit"]

Vectors = npt.NDArray[np.float32]
"""(texts, components), each of length 1."""

_ROWS = 512
"""Texts whose similarities to all others are in memory at once."""


class Cosines(msgspec.Struct, frozen=True):
    """Each text's vector from one model against the other's. `p5`: 5 % of the texts have at most this cosine."""

    min: float
    mean: float
    p1: float
    p5: float
    p50: float
    threshold: float
    below_threshold: float
    """Share of the texts."""
    largest_difference: float
    """Between two components of a text's unit vectors."""


class Neighbors(msgspec.Struct, frozen=True):
    """How many of each text's `k` nearest texts are the same for both models, as a share of `k`."""

    k: int
    mean: float
    min: float
    unchanged: float
    """Share of the texts with exactly the same neighbors, in any order."""


def unit(vectors: npt.NDArray[np.float32], dimensions: int | None = None) -> Vectors:
    """The first `dimensions` components, scaled to length 1. No vector may be zero or not finite."""
    # Squares of float32 leave its range early, those of float64 do not.
    cut = vectors[:, :dimensions].astype(np.float64)
    scaled: Vectors = (cut / np.linalg.norm(cut, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def cosines(one: Vectors, other: Vectors) -> npt.NDArray[np.float64]:
    """The cosine of each text, (texts,)."""
    found: npt.NDArray[np.float64] = np.einsum("ij,ij->i", one, other, dtype=np.float64)
    return np.clip(found, -1.0, 1.0)


def summary(one: Vectors, other: Vectors, threshold: float) -> Cosines:
    """Takes at least one text, and vectors of equal length."""
    found = cosines(one, other)
    ordered = np.sort(found).tolist()
    return Cosines(
        min=ordered[0],
        mean=float(found.mean()),
        p1=percentile(ordered, 1),
        p5=percentile(ordered, 5),
        p50=percentile(ordered, 50),
        threshold=threshold,
        below_threshold=float((found < threshold).mean()),
        largest_difference=float(np.abs(one - other).max()),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least of the ascending values that at least `percent` % of them do not exceed: always one of them."""
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def nearest(vectors: Vectors, k: int) -> npt.NDArray[np.intp]:
    """The `k` nearest others of each text, (texts, k); of equally near ones, the first. `k` < texts."""
    texts = len(vectors)
    found = np.empty((texts, k), dtype=np.intp)
    for begin in range(0, texts, _ROWS):
        rows = np.arange(begin, min(begin + _ROWS, texts))
        distances = -(vectors[rows] @ vectors.T)
        distances[np.arange(len(rows)), rows] = np.inf
        found[rows] = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return found


def agreements(
    one: npt.NDArray[np.intp], other: npt.NDArray[np.intp]
) -> tuple[Neighbors, npt.NDArray[np.float64]]:
    """Of two models' `nearest`: the summary, and each text's share of equal neighbors, (texts,)."""
    k = one.shape[1]
    shares = np.array(
        [len(set(a) & set(b)) / k for a, b in zip(one.tolist(), other.tolist(), strict=True)],
        dtype=np.float64,
    )
    together = Neighbors(
        k=k, mean=float(shares.mean()), min=float(shares.min()), unchanged=float((shares == 1).mean())
    )
    return together, shares
