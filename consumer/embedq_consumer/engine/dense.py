"""Dense modules: the linear layers that some models have after the pooling, in float32 like everything after pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from embedq_consumer.engine.model_directory import Activation, Dense
from embedq_consumer.engine.safety.headers import TensorSlice

__all__ = ["DenseLayers"]

_Layer = tuple[Tensor, Tensor | None, Activation]


class DenseLayers:
    """The layers that a pooled vector goes through, in order; most models have none."""

    def __init__(self, layers: Sequence[Dense], device: torch.device) -> None:
        self._layers: list[_Layer] = [
            (
                _read(layer.weight, device),
                None if layer.bias is None else _read(layer.bias, device),
                layer.activation,
            )
            for layer in layers
        ]

    def __bool__(self) -> bool:
        return bool(self._layers)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Float32 (…, width in) to float32 (…, width out)."""
        for weight, bias, activation in self._layers:
            vectors = F.linear(vectors, weight, bias)
            if activation == "tanh":
                vectors = vectors.tanh()
        return vectors


def _read(tensor: TensorSlice, device: torch.device) -> Tensor:
    with safe_open(tensor.file, framework="pt") as file:
        values: Tensor = file.get_tensor(tensor.name)
    # Always a copy: the file's own pages may change or go.
    return values.to(device=device, dtype=torch.float32, copy=True)
