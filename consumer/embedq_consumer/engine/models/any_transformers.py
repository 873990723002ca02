"""Every other architecture: transformers' own layers over a packed row, with only their attention replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from embedq_consumer.engine.kernels.attention import PACKED, Packing, register
from embedq_consumer.engine.models.rotary import by_text
from embedq_consumer.engine.row import HiddenForward

__all__ = ["packed_forward"]


def packed_forward(model: Any, longest: int) -> HiddenForward:
    """The forward of transformers' `model`, which loses its pooler and its attention to it, for texts of up to `longest` tokens.

    Raises:
        NotImplementedError: its rotary positions depend on what runs together in a way that is not known here.
    """
    register()
    model.pooler = None
    model.set_attn_implementation(PACKED)
    tell = by_text(model, longest)

    def forward(ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        tell(packing)
        try:
            output = model(input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), packing=packing)
        finally:
            tell(None)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    return forward
