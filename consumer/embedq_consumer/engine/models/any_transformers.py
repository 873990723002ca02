"""Every other architecture, through transformers' own layers: over a packed row if their attention can be replaced, else
texts of one length at a time."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from embedq_consumer.engine.kernels.attention import PACKED, Packing, register
from embedq_consumer.engine.models.rotary import by_text
from embedq_consumer.engine.row import HiddenForward

__all__ = ["by_length_forward", "hidden_states", "obstacle", "own_attention", "packed_forward", "unsteady"]

_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})


class _NoPooler(nn.Module):
    """In the place of a pooler, whose output no embedding needs: some models use theirs without a look whether there is one."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def unsteady(config: Any) -> str | None:
    """Why a text's hidden states depend on more than the text, where no short text shows it; None if nothing is known."""
    match config.model_type:
        case "big_bird" if config.attention_type != "original_full":
            return "attention_type: expected original_full: any other one turns into it for good at the first short text"
        case "reformer" if "lsh" in config.attn_layers:
            return "attn_layers: expected local alone: lsh hashes the tokens of a long text at random"
    return None


def obstacle(model: Any) -> str | None:
    """Why texts of `model` cannot share a row, where that shows in long texts alone; None if nothing is known."""
    foreign = sorted(set(getattr(model.config, "layer_types", None) or ()) - _PACKED_LAYERS)
    if foreign:
        return f"layer_types: {', '.join(foreign)}"
    if getattr(model.config, "attn_temperature_tuning", False):
        return "attn_temperature_tuning: by a token's place in the row, not in its text"  # Llama 4
    return None


def packed_forward(model: Any, longest: int) -> HiddenForward:
    """The forward of transformers' `model`, which loses its pooler and its attention to it, for texts of up to `longest` tokens.

    What the layers do beside attention has to work token by token; `PackedEncoder.prove` finds out whether it does.

    Raises:
        NotImplementedError: its rotary positions depend on what runs together in a way that is not known here.
    """
    register()
    if getattr(model, "pooler", None) is not None:
        model.pooler = _NoPooler()
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


def own_attention(model: Any) -> str:
    """The name of the attention that transformers chose for `model`."""
    return str(model.config._attn_implementation)  # noqa: SLF001  # it has no public name


def by_length_forward(model: Any, attention: str, longest: int) -> HiddenForward:
    """The same with all that is transformers' own, and its `attention`: one call for the texts of each length, none padded.

    Positions are the model's own affair. A row of many lengths takes many calls, so this is for what cannot be packed.
    """
    model.set_attn_implementation(attention)
    with suppress(NotImplementedError):  # then its frequencies follow the call, which has texts of one length
        by_text(model, longest)

    def forward(ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        rectangles = (ids[run.begin : run.end].view(run.count, run.length) for run in packing.runs)
        return torch.cat([hidden_states(model, rows).flatten(0, 1) for rows in rectangles])

    return forward


def hidden_states(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Last hidden states (texts, tokens, hidden) of int64 `ids` (texts, tokens), called as sentence-transformers calls `model`.

    `positions` of the same shape, if given, instead of the model's own.
    """
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(ids)
    if positions is not None:
        inputs["position_ids"] = positions
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden
