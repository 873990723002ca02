"""What a written-out forward asks of a model, and how it will be used."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from embedq_consumer.engine.pooling import Pooling

__all__ = ["ForwardOptions", "Limits", "Probe", "architecture_of", "last_norm_eps_of"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long a model's inputs may be, and where their positions begin."""

    max_tokens: int
    """The longest input, special tokens included."""
    position_offset: int
    """The model's position of a text's first token."""
    padding: int | None = None
    """The token that stands at `position_offset - 1`, wherever it is, and does not count for those after it; None where every
    token counts. RoBERTa and its relatives number their tokens so, and a text may spell that token."""

    @property
    def row_offset(self) -> int:
        """The model's position of what `row.positions_of` numbers 0."""
        return self.position_offset - (self.padding is not None)


class Probe(msgspec.Struct, frozen=True):
    """Random tokens that a load is proved on: the last ones of a text, the first at position `start`, counted from 0 on.

    So a few tokens stand for a long text, of which the tokens before them are never run.
    """

    ids: npt.NDArray[np.int32]
    start: int = 0

    @property
    def reach(self) -> int:
        """How many tokens the text has."""
        return self.start + len(self.ids)


class ForwardOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a forward will be used."""

    pooling: Pooling
    limits: Limits
    """A `Row` counts positions as `row.positions_of` does, whatever the offset."""
    last_norm: Tensor | None = None
    """Weight of the model's last norm, where the pooled vectors alone get it; the model itself has none then."""
    quantized: bool = False
    """Weights and activations in FP8, but for the layers whose numbers are in `keep_bf16`."""
    keep_bf16: frozenset[int] = frozenset()
    bf16: bool = False
    """Products in bf16 on a CPU, of a model that comes in float32."""
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
