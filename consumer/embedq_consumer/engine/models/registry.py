"""Which architecture runs on which forward. A new family is one more `Family` here, and the file of its forward."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Protocol

import msgspec
import torch
from torch import Tensor

from embedq_consumer.engine.api import ModelError, Quantization
from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.kernels.cpu_teams import ONE, Teams, teams_for
from embedq_consumer.engine.models.any_transformers import (
    by_length_forward,
    obstacle,
    own_attention,
    packed_forward,
)
from embedq_consumer.engine.models.traits import ForwardOptions, architecture_of
from embedq_consumer.engine.row import HiddenForward, PooledForward

__all__ = ["FAMILIES", "Built", "Family", "build", "import_ahead", "is_written_out", "refuse"]


class WrittenOut(Protocol):
    """A forward that is written out here. Its constructor may take `model` apart, so that no weight is held twice."""

    kernels: Mapping[str, str]
    """As in `Encoder.kernels`."""

    def __init__(self, model: Any, options: ForwardOptions) -> None: ...

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether it computes what `model` does: the configuration has to be one that it knows."""

    def __call__(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Last hidden states (tokens, hidden) of `ids` at the model's own `positions`. On a CPU several threads may call at once."""

    def pooled(self) -> PooledForward | None:
        """The same up to the pooled vector, for CUDA graphs; None where there is none."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """Architectures that one forward runs."""

    architectures: frozenset[str]
    """transformers' classes."""
    device: str
    """"cpu" or "cuda"."""
    module: str
    forward: str
    """The class in `module`, which is imported only where it is needed."""
    triton: bool = False
    """Whether `module` needs Triton."""
    fp8: bool = False
    bf16: bool = False
    """Whether `forward` takes a model in float32 and rounds what it multiplies itself; every other one gets a model in bf16."""
    imports: tuple[str, ...] = ()
    """What its kernels import, which takes long and can be done while weights are read."""


_MODELS: Final = "embedq_consumer.engine.models"
_KERNELS: Final = "embedq_consumer.engine.kernels"

FAMILIES: Final = (
    Family(
        architectures=frozenset({"BertModel"}),
        device="cpu",
        module=f"{_MODELS}.bert_cpu",
        forward="PackedBert",
        bf16=True,
    ),
    Family(
        architectures=frozenset({"BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel"}),
        device="cuda",
        module=f"{_MODELS}.bert_cuda",
        forward="PackedBertCuda",
        triton=True,
        fp8=True,
    ),
    Family(
        architectures=frozenset({"Qwen3Model"}),
        device="cuda",
        module=f"{_MODELS}.qwen3_cuda",
        forward="PackedQwen3",
        triton=True,
        fp8=True,
        imports=("flash_attn.cute", f"{_KERNELS}.gated_epilogue"),
    ),
    *(
        Family(
            architectures=frozenset({name}),
            device=device,
            module=f"{_MODELS}.{module}",
            forward=forward,
            bf16=bf16,
        )
        for name, module, forward, bf16 in (
            ("MPNetModel", "mpnet", "PackedMPNet", True),
            ("DebertaV2Model", "deberta", "PackedDeberta", False),
        )
        for device in ("cpu", "cuda")
    ),
)


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A model's forward, and its form for CUDA graphs where there is one."""

    hidden: HiddenForward
    pooled: PooledForward | None = None
    kernels: Mapping[str, str]
    """As in `Encoder.kernels`."""
    teams: Teams = ONE
    """Those that may call `hidden` at once: more than one where it keeps nothing that two calls would share."""
    takes_positions: bool = True
    """Whether `hidden` puts tokens where the positions say; else each text begins at the model's first position."""
    slower: Callable[[], Built] | None = None
    """Makes another one of the same model, for where `hidden`, which is of no use afterwards, does not give what transformers
    gives."""


def is_written_out(model: Any) -> bool:
    """Whether `model` runs on a forward of ours, which needs its weights and none of transformers' code."""
    return _forward_for(model) is not None


def build(model: Any, options: ForwardOptions, *, written_out: bool = True) -> Built:
    """The fastest forward for `model`, which is taken apart for it.

    `written_out` false leaves transformers' own layers in place: a checkpoint that is quantized already has its weights in a
    form that only they know.

    Raises:
        ModelError: model or device cannot run as `options` say.
    """
    device: torch.device = model.device
    refuse("fp8" if options.quantized else "bf16" if options.bf16 else "none", device)
    forward = _forward_for(model) if written_out else None
    family = _family_of(architecture_of(model), device)
    if options.bf16 and not (forward is not None and family is not None and family.bf16):
        _round(model)
    if options.quantized and not (forward is not None and family is not None and family.fp8):
        raise ModelError(f"quantization fp8: {architecture_of(model)} has no FP8 forward")
    if forward is not None:
        made = forward(model, options)
        # With other threads a product's sums may have another order.
        alone = device.type != "cpu" or options.deterministic
        teams = ONE if alone else teams_for(torch.get_num_threads())
        return Built(hidden=made, pooled=made.pooled(), kernels=made.kernels, teams=teams)
    attention = "torch_sdpa" if device.type == "cpu" else "packed"
    own = own_attention(model)
    longest = options.limits.max_tokens

    def by_length() -> Built:
        return Built(
            hidden=by_length_forward(model, own, longest),
            kernels={"attention": "by_length"},
            takes_positions=False,
        )

    problem = obstacle(model)
    if problem is None:
        try:
            packed = packed_forward(model, longest)
            return Built(hidden=packed, kernels={"attention": attention}, slower=by_length)
        except NotImplementedError as error:
            problem = str(error)
    slower = by_length()
    return msgspec.structs.replace(slower, kernels={**slower.kernels, "not_packed": problem})


def import_ahead(architecture: str, device: torch.device) -> None:
    """Import what the forward of `architecture` imports, while weights are being read.

    Must not run during an import of transformers: each would find the other's modules half initialized.
    """
    family = _family_of(architecture, device)
    if family is None or not family.imports:
        return
    for name in (family.module, *family.imports):
        with suppress(Exception):  # the forward imports it again, and reports what is wrong
            importlib.import_module(name)


def _forward_for(model: Any) -> type[WrittenOut] | None:
    family = _family_of(architecture_of(model), model.device)
    if family is None:
        return None
    forward: type[WrittenOut] = getattr(importlib.import_module(family.module), family.forward)
    return forward if forward.fits(model) else None


def _family_of(architecture: str, device: torch.device) -> Family | None:
    for family in FAMILIES:
        if family.device == device.type and architecture in family.architectures:
            return family if _has_triton() or not family.triton else None
    return None


def _round(model: Any) -> None:
    """Make bf16 of the model's parameters, as transformers does where it reads them so: buffers, such as rotary frequencies, stay, and
    so do the parameters that the architecture wants in float32."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(torch.bfloat16)


def refuse(quantization: Quantization, device: torch.device) -> None:
    """
    Raises:
        ModelError: no model can run like that on `device`, or every one does anyway.
    """
    if quantization == "bf16" and device.type != "cpu":
        raise ModelError("quantization bf16: expected none: on a GPU every model runs in bf16")
    if quantization == "fp8":
        _refuse_without_fp8(device)


def _refuse_without_fp8(device: torch.device) -> None:
    if device.type != "cuda" or not _has_triton():
        raise ModelError("quantization fp8: needs CUDA and Triton")
    from embedq_consumer.engine.kernels.fp8 import fp8_available

    if not fp8_available(device):
        raise ModelError("quantization fp8: needs a GPU of compute capability 9.0 or later")


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
