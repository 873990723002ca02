"""A model's weights under transformers' names, without transformers: the input of the written-out forwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from embedq_consumer.engine.adapters.merging import Merger
from embedq_consumer.engine.device import current
from embedq_consumer.engine.loading.load_cache import ModelSnapshot, Rotary
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.models.traits import Limits, Probe, architecture_of, last_norm_eps_of
from embedq_consumer.engine.safety.cancellation import Cancellation
from embedq_consumer.engine.text.effective import EffectiveTokenizer

__all__ = ["CheckpointWeights", "snapshot_of"]

_READERS = 8
"""Threads that copy weights to a GPU: a single one would wait for page faults and for copies in turn."""
_UNUSED = "pooler."
"""Parameters that no embedding needs, and that many checkpoints lack."""


class CheckpointWeights(torch.nn.Module):
    """The parameters of `snapshot` from the files of `directory`, on `device`: float32 on a CPU, bf16 on CUDA.

    Has transformers' tree of modules, its `config` and its rotary frequencies, but no forward.
    """

    def __init__(
        self,
        snapshot: ModelSnapshot,
        directory: ModelDirectory,
        device: torch.device,
        cancel: Cancellation | None = None,
    ) -> None:
        """
        Raises:
            Abandoned: `cancel` was set before the last tensor was read.
        """
        super().__init__()
        self.architecture = snapshot.architecture
        self.config = SimpleNamespace(**snapshot.config)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tensors = _read(snapshot.tensors, directory, device, self.dtype, cancel or Cancellation())
        self.device = next(iter(tensors.values())).device
        for name, module in _tree(tensors).named_children():
            self.add_module(name, module)
        if snapshot.last_norm_eps is not None:
            self.norm = _RMSNorm(tensors["norm.weight"], snapshot.last_norm_eps)
        if snapshot.rotary is not None:
            self.rotary_emb = _RotaryEmbedding(snapshot.rotary, self.device)


class _RMSNorm(torch.nn.Module):
    """With the attributes of transformers' own class."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps


class _RotaryEmbedding(torch.nn.Module):
    """With the attributes of transformers' own class."""

    def __init__(self, rotary: Rotary, device: torch.device) -> None:
        super().__init__()
        self.rope_type = rotary.rope_type
        self.attention_scaling = rotary.attention_scaling
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.tensor(rotary.frequencies, dtype=torch.float32, device=device))


def snapshot_of(
    model: Any,
    directory: ModelDirectory,
    limits: Limits,
    *,
    tokenizer: EffectiveTokenizer,
    probes: Sequence[Probe],
    expected: Tensor,
) -> ModelSnapshot | None:
    """The snapshot of transformers' `model`; None if the checkpoint's tensors are not exactly the model's parameters.

    `expected` is as in `ModelSnapshot`.
    """
    tensors = _tensor_names(model, directory)
    if tensors is None:
        return None
    return ModelSnapshot(
        architecture=architecture_of(model),
        config=json.loads(model.config.to_json_string(use_diff=False)),
        tensors=tensors,
        rotary=_rotary_of(model),
        last_norm_eps=last_norm_eps_of(model),
        max_tokens=limits.max_tokens,
        position_offset=limits.position_offset,
        padding=limits.padding,
        tokenizer=tokenizer.text,
        split_special_tokens=tokenizer.split_special_tokens,
        tokenizer_notes=tokenizer.notes,
        sequences=tuple(tuple(probe.ids.tolist()) for probe in probes),
        starts=tuple(probe.start for probe in probes),
        expected=expected.cpu().numpy().tobytes(),
    )


def _tensor_names(model: Any, directory: ModelDirectory) -> dict[str, str] | None:
    """The checkpoint's name of each parameter of transformers' `model`; None if they are not the same tensors."""
    shapes = {tensor.name: tensor.shape for tensor in directory.tensors}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(_UNUSED):
            continue
        for known in (name, f"{model.base_model_prefix}.{name}"):
            if shapes.get(known) == tuple(parameter.shape):
                found[name] = known
                break
        else:
            return None
    return found


def _rotary_of(model: Any) -> Rotary | None:
    """How transformers' `model` rotates queries and keys, if every layer does it the same way."""
    module = getattr(model, "rotary_emb", None)
    frequencies = getattr(module, "inv_freq", None)
    if module is None or frequencies is None:
        return None
    return Rotary(module.rope_type, tuple(frequencies.float().tolist()), float(module.attention_scaling))


def _read(
    names: Mapping[str, str],
    directory: ModelDirectory,
    device: torch.device,
    dtype: torch.dtype,
    cancel: Cancellation,
) -> dict[str, Tensor]:
    locations = {tensor.name: tensor.file for tensor in directory.tensors}
    files = {file: _open(file) for file in set(locations.values())}

    merger = Merger(directory.adapter, names)

    def read(name: str) -> Tensor:
        cancel.check()
        with current(device):
            # Always a copy: the file's own pages may change or go.
            tensor: Tensor = files[locations[name]].get_tensor(name).to(device, copy=True)
            return merger.merged(name, tensor.to(dtype))

    with ThreadPoolExecutor(_READERS if device.type == "cuda" else 1, "weights") as pool:
        return dict(zip(names, pool.map(read, names.values()), strict=True))


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt").__enter__()  # type: ignore[no-untyped-call]


def _tree(tensors: Mapping[str, Tensor]) -> torch.nn.Module:
    """Modules and parameters by dotted names; numbered modules are a list."""
    inner: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = tensor
        else:
            own[first] = tensor
    if inner and all(name.isdigit() for name in inner):
        return torch.nn.ModuleList(_tree(inner[name]) for name in sorted(inner, key=int))
    module = torch.nn.Module()
    for name, parts in inner.items():
        module.add_module(name, _tree(parts))
    for name, tensor in own.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module
