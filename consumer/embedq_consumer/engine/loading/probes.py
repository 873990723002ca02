"""How long a model's texts may be and where their positions begin; the few tokens that it is proved on, and what they give alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.models.any_transformers import hidden_states
from embedq_consumer.engine.models.rotary import scaled_length, thresholds
from embedq_consumer.engine.models.traits import Limits, Probe

__all__ = ["limits_of", "probes_of", "reference"]

Ids = npt.NDArray[np.int32]

_LENGTHS: Final = (3, 1, 9, 3)
_TAIL: Final = 5
"""Tokens that stand for a long text, and for one that is just beyond a threshold: some on each side of it."""


def limits_of(directory: ModelDirectory, model: Any) -> Limits:
    """RoBERTa and its relatives count positions from one after the padding's, so that fewer are left for tokens.

    Raises:
        ModelError: nothing says how long a text may be.
    """
    padding = None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            padding = int(module.padding_idx)
    offset = 0 if padding is None else padding + 1
    positions = scaled_length(model.config) or getattr(model.config, "max_position_embeddings", None)
    limits = [directory.max_seq_length]
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - offset)
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ModelError(f"{directory.checkpoint / 'config.json'}: max_position_embeddings: missing")
    return Limits(max_tokens=min(known), position_offset=offset, padding=padding)


def probes_of(model: Any, limits: Limits) -> list[Probe]:
    """A few texts of random tokens, the shortest first.

    - Several short ones; and one of special tokens, padding too, which some models do not count or do not read.
    - Where attention has a window, one that is longer than the window, unless no text can be.
    - The ends of texts that are as long as may be, and just longer than where rotary frequencies change.
    """
    random = np.random.default_rng(0)
    special = [token for token in _special(model.config) if 0 <= token < model.config.vocab_size]
    usable = np.setdiff1d(np.arange(model.config.vocab_size, dtype=np.int32), np.array(special, np.int32))

    def some(length: int) -> Ids:
        return random.choice(usable, length)

    lengths = list(_LENGTHS)
    window = max((each for each in _windows(model.config) if each < limits.max_tokens), default=None)
    if window is not None:
        lengths.append(min(2 * window + 3, window + 300, limits.max_tokens))
    probes = [Probe(some(min(n, limits.max_tokens))) for n in lengths]
    if special:
        mixed = np.concatenate([[token, each] for token in special for each in some(1)])
        probes.append(
            Probe(np.concatenate([some(2), mixed, special, some(2)], dtype=np.int32)[: limits.max_tokens])
        )
    if "position_ids" in inspect.signature(model.forward).parameters:
        reaches = {limits.max_tokens, *(threshold + 2 for threshold in thresholds(model.config))}
        probes += [
            Probe(some(_TAIL), reach - _TAIL) for reach in reaches if _TAIL < reach <= limits.max_tokens
        ]
    # `dynamic` frequencies remember the longest text so far: transformers has to be asked for each in turn.
    return sorted(probes, key=lambda probe: probe.reach)


@torch.inference_mode()
def reference(model: Any, probes: Sequence[Probe], limits: Limits) -> Tensor:
    """Hidden states of each of `probes` alone, by transformers' own code, called as sentence-transformers does.

    Returns float32 (tokens, hidden).
    """
    hidden = []
    for probe in probes:
        ids = torch.from_numpy(probe.ids.astype(np.int64)).to(model.device).unsqueeze(0)
        positions = torch.arange(probe.start, probe.reach, device=model.device) + limits.position_offset
        hidden.append(hidden_states(model, ids, positions.unsqueeze(0) if probe.start else None)[0].float())
    return torch.cat(hidden)


def _windows(config: Any) -> list[int]:
    """How far attention may see, by whatever name: GPT-Neo, say, has a `window_size`."""
    named = [value for name, value in config.to_dict().items() if "window" in name]
    return [
        value
        for value in (*named, getattr(config, "sliding_window", None))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
    ]


def _special(config: Any) -> list[int]:
    """The tokens that the configuration names."""

    def of(value: object) -> Iterator[int]:
        if isinstance(value, int) and not isinstance(value, bool):
            yield value
        elif isinstance(value, list | tuple):
            for each in value:
                yield from of(each)

    fields: Mapping[str, object] = config.to_dict()
    return sorted(
        {token for name, value in fields.items() if name.endswith("_token_id") for token in of(value)}
    )
