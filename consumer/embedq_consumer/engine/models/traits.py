"""What a written-out forward asks of a model, and how it will be used."""

from __future__ import annotations

from typing import Any

import msgspec
from torch import Tensor

from embedq_consumer.engine.pooling import Pooling

__all__ = ["ForwardOptions", "Limits", "architecture_of", "last_norm_eps_of"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long a model's inputs may be, and where their positions begin."""

    max_tokens: int
    """The longest input, special tokens included."""
    position_offset: int
    """The model's position of a text's first token."""


class ForwardOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a forward will be used."""

    pooling: Pooling
    limits: Limits
    """A `Row` counts positions from 0, whatever the offset."""
    last_norm: Tensor | None = None
    """Weight of the model's last norm, where the pooled vectors alone get it; the model itself has none then."""
    quantized: bool = False
    """Weights and activations in FP8, but for the layers whose numbers are in `keep_bf16`."""
    keep_bf16: frozenset[int] = frozenset()
    deterministic: bool = False
    """Where a text lies in its row must not change a bit of its vector."""


def architecture_of(model: Any) -> str:
    """The name of transformers' class, for one of its own models or for `CheckpointWeights`."""
    return str(getattr(model, "architecture", None) or type(model).__name__)


def last_norm_eps_of(model: Any) -> float | None:
    """The epsilon of an RMS norm after the model's last layer; None if there is none."""
    norm: Any = getattr(model, "norm", None)
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        return None
    return float(norm.variance_epsilon)
