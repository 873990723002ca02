"""What an adapter's directory says, read and checked before a weight is loaded.

Plain LoRA is served: W + scale · B · A for linear layers. Every setting that would give other weights is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.safety.files import read_bounded
from embedq_consumer.engine.safety.headers import TensorSlice, read_header

__all__ = ["ADAPTER_CONFIG", "Adapter", "LowRank", "base_of", "read_adapter"]

ADAPTER_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_TENSOR: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_FLOATS: Final = frozenset({"F32", "F16", "BF16"})
_PLAIN_STARTS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` of adapters over the base as it is; others (pissa, olora, corda, loftq, …) have changed the base's weights."""
_UNDERSTOOD: Final = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "use_rslora",
    }
)
_IDLE: Final = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""How it was trained, or what its tensors say themselves: which layers there are, and of which rank."""


class LowRank(msgspec.Struct, frozen=True, kw_only=True):
    """What is added to one linear layer's weight: `scale` · `b` · `a`, of the shapes (out, rank) and (rank, in)."""

    module: str
    """The layer's name in the model that the adapter was trained on, which may have other names before it."""
    a: TensorSlice
    b: TensorSlice
    scale: float

    def belongs_to(self, parameter: str) -> bool:
        """Whether this is for the parameter of this name: their names agree as far as both go."""
        mine = f".{self.module}.weight"
        return mine.endswith(f".{parameter}") or f".{parameter}".endswith(mine)


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """One checked adapter."""

    path: Path
    layers: tuple[LowRank, ...]
    """Sorted by module."""

    @property
    def tensors(self) -> tuple[TensorSlice, ...]:
        """All of its tensors, in a fixed order."""
        return tuple(tensor for layer in self.layers for tensor in (layer.a, layer.b))

    @property
    def scales(self) -> Mapping[str, float]:
        """Of each module."""
        return {layer.module: layer.scale for layer in self.layers}


def base_of(path: Path, root: Path | None) -> Path:
    """The directory of the base model that an adapter's configuration names, as a command would name it.

    Raises:
        ModelError: it names none below the model root.
    """
    file = path / ADAPTER_CONFIG
    name = _config(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ModelError(f"{file}: base_model_name_or_path: expected a model directory's name")
    if root is None:
        raise ModelError(
            f"{file}: base_model_name_or_path: a base model is looked for below a model root, and there is none"
        )
    base = (root / name).resolve()
    if not base.is_relative_to(root.resolve()) or base == path.resolve():
        raise ModelError(
            f"{file}: base_model_name_or_path: expected a directory below {root}, got {name[:200]!r}"
        )
    if not base.is_dir():
        raise ModelError(
            f"{file}: base_model_name_or_path: {base} is no directory; put the base model there (`embedq pull {name[:200]}`, if it "
            "is the hub's)"
        )
    if (base / ADAPTER_CONFIG).exists() and not (base / "config.json").exists():
        raise ModelError(
            f"{file}: base_model_name_or_path: {name[:200]!r} is an adapter itself; expected a model"
        )
    return base


def read_adapter(path: Path) -> Adapter:
    """Read and check an adapter; of its weights, only the header is read.

    Raises:
        ModelError: a file is missing or malformed, or it is no plain LoRA of linear layers.
    """
    file = path / ADAPTER_CONFIG
    config = _config(file)
    _refuse_what_is_not_plain(file, config)
    if (path / "modules.json").exists():
        raise ModelError(
            f"{path / 'modules.json'}: pooling and prompts are the base model's; an adapter with a layout of its own is not served"
        )
    halves = _halves(path / _WEIGHTS)
    layers = []
    for module, (a, b) in sorted(halves.items()):
        if a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{a.file}: {module}: lora_A is of rank {a.shape[0]}, lora_B of rank {b.shape[1]}"
            )
        layers.append(LowRank(module=module, a=a, b=b, scale=_scale(file, config, module, a.shape[0])))
    return Adapter(path=path, layers=tuple(layers))


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_bounded(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: expected an object")
    return config


def _refuse_what_is_not_plain(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type: expected LORA, got {str(config.get('peft_type'))[:80]!r}")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{file}: bias: expected none, since trained biases are not served")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise ModelError(
            f"{file}: init_lora_weights: {str(config['init_lora_weights'])[:80]!r} changes the base model's weights; save the adapter "
            "converted to LoRA"
        )
    for name in sorted(set(config) - _UNDERSTOOD - _IDLE):
        if config[name]:
            raise ModelError(
                f"{file}: {name[:80]}: only plain LoRA is served; merge the adapter into its model"
            )


def _scale(file: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's: alpha / rank, or alpha / sqrt(rank) of rank-stabilized LoRA."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{file}: alpha_pattern: expected an object")
    alpha = config.get("lora_alpha", 8)
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            raise ModelError(f"{file}: alpha_pattern: {pattern[:80]!r} is no regular expression") from None
        if matches:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ModelError(f"{file}: lora_alpha: expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _halves(file: Path) -> dict[str, tuple[TensorSlice, TensorSlice]]:
    """A and B of each module."""
    found: dict[str, dict[str, TensorSlice]] = {}
    for tensor in _header(file):
        parts = _TENSOR.fullmatch(tensor.name)
        if parts is None:
            raise ModelError(
                f"{file}: {tensor.name[:200]}: expected lora_A and lora_B of linear layers alone (no embeddings, magnitudes, biases, "
                "nor modules saved whole)"
            )
        if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{file}: {tensor.name[:200]}: expected a matrix of floats, got {tensor.dtype} {list(tensor.shape)}"
            )
        found.setdefault(parts["module"], {})[parts["half"]] = tensor
    if not found:
        raise ModelError(f"{file}: no tensors")
    for module, halves in found.items():
        if set(halves) != {"A", "B"}:
            raise ModelError(
                f"{file}: {module[:200]}: expected lora_A and lora_B, it has lora_{min(halves)} alone"
            )
    return {module: (halves["A"], halves["B"]) for module, halves in found.items()}


def _header(file: Path) -> Sequence[TensorSlice]:
    if not file.exists() and (file.with_suffix(".bin")).exists():
        raise ModelError(
            f"{file}: missing; pickled weights ({file.with_suffix('.bin').name}) are never loaded"
        )
    return tuple(read_header(file))
