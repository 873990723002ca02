"""An adapter's matrices become part of the base model's weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from embedq_consumer.engine.adapters.reading import Adapter, LowRank
from embedq_consumer.engine.api import ModelError

__all__ = ["Merger"]

_UNUSED: Final = re.compile(r"(^|\.)(lm_head|cls|score|classifier|pooler)(\.|$)")
"""Of models that an adapter may have been trained on, and what no embedding needs."""


class Merger:
    """Adds what an adapter has for it to each weight. Its matrices are read once, whole.

    The sum is in float32 and rounded once, to the weight's own type: the same on a CPU and on a GPU, and whoever has loaded
    the weight.
    """

    def __init__(self, adapter: Adapter | None, parameters: Iterable[str]) -> None:
        """`parameters` are the names of all of the model's.

        Raises:
            ModelError: the adapter has a layer that the model lacks, or does not know apart.
        """
        self._layers: dict[str, LowRank] = {}
        self._files: dict[str, Any] = {}
        if adapter is None:
            return
        names = [name for name in parameters if name.endswith(".weight")]
        for layer in adapter.layers:
            mine = [name for name in names if layer.belongs_to(name)]
            if not mine and _UNUSED.search(layer.module):
                continue
            if len(mine) != 1:
                raise ModelError(
                    f"{layer.a.file}: {layer.module}: expected one weight of that name in the base model, found {len(mine)}"
                )
            self._layers[mine[0]] = layer

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A parameter with what the adapter adds to it, in its own type and on its own device.

        Raises:
            ModelError: their shapes differ.
        """
        layer = self._layers.get(name)
        if layer is None:
            return weight
        shape = (layer.b.shape[0], layer.a.shape[1])
        if tuple(weight.shape) != shape:
            raise ModelError(
                f"{layer.a.file}: {layer.module}: adds a matrix of {shape}, the base model's weight is {tuple(weight.shape)}"
            )
        if not weight.is_floating_point():
            raise ModelError(f"{layer.a.file}: {layer.module}: the base model's weight is quantized")
        a, b = (self._read(half.name, layer).to(weight.device, torch.float32) for half in (layer.a, layer.b))
        return (weight.float() + layer.scale * (b @ a)).to(weight.dtype)

    def merge_into(self, model: torch.nn.Module) -> None:
        """The same for a whole model, in place."""
        for name, parameter in model.named_parameters():
            if name in self._layers:
                parameter.data = self.merged(name, parameter.data)

    def _read(self, name: str, layer: LowRank) -> Tensor:
        file = str(layer.a.file)
        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor.clone()  # its pages are the file's, which may change
