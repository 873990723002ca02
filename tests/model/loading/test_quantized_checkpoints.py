"""Checkpoints that are already quantized: run as transformers runs them, or refused with what it asks for."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq_consumer.engine import ModelError, Text, load_encoder
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_qwen3
from tests.model.test_parity import TEXTS, TOLERANCE

GROUP = 32
"""Inputs that share a scale."""

Parts = dict[str, torch.Tensor]
Packer = Callable[[torch.Tensor, torch.Tensor], Parts]
"""(levels from -8 to 7 (out, in), scales (out, in / GROUP)) → tensors of one layer."""


def gptq(levels: torch.Tensor, scales: torch.Tensor) -> Parts:
    """Eight levels of one output in an int32, from 0 on, with zero points that are stored minus one."""
    outputs, inputs = levels.shape
    return {
        "qweight": eight_in_one((levels + 8).t().reshape(inputs // 8, 8, outputs).transpose(1, 2)),
        "qzeros": eight_in_one(torch.full((inputs // GROUP, outputs // 8, 8), 7)),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }


def awq(levels: torch.Tensor, scales: torch.Tensor) -> Parts:
    """Eight outputs of one input in an int32, those at even positions first."""
    outputs, inputs = levels.shape
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": eight_in_one((levels + 8).t().reshape(inputs, outputs // 8, 8)[..., order]),
        "qzeros": eight_in_one(torch.full((inputs // GROUP, outputs // 8, 8), 8)),
        "scales": scales.t().contiguous(),
    }


def compressed_tensors(levels: torch.Tensor, scales: torch.Tensor) -> Parts:
    outputs, inputs = levels.shape
    return {
        "weight_packed": eight_in_one((levels + 8).reshape(outputs, inputs // 8, 8)),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }


def eight_in_one(levels: torch.Tensor) -> torch.Tensor:
    """Int32 (…) of levels from 0 to 15 (…, 8), the first in the lowest bits."""
    packed = (levels.to(torch.int64) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


METHODS: dict[str, tuple[str, Packer, dict[str, Any]]] = {
    "gptq": (
        "gptqmodel",
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        "gptqmodel",
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "compressed-tensors": (
        "compressed_tensors",
        compressed_tensors,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": GROUP,
                    },
                }
            },
        },
    ),
}


def quantize(path: Path, method: str) -> tuple[Path, Path]:
    """A tiny Qwen3 with its products in 4 bits, and one with plain weights of the values that these stand for."""
    from safetensors.torch import load_file, save_file

    _, packed, settings = METHODS[method]
    quantized, plain = make_tiny_qwen3(path / "quantized"), make_tiny_qwen3(path / "plain")
    few: Parts = {}
    meant: Parts = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            few[name] = meant[name] = weight
            continue
        groups = weight.view(len(weight), -1, GROUP)
        scales = (groups.abs().amax(-1) / 7).half()
        levels = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
        meant[name] = (levels * scales.float().unsqueeze(-1)).flatten(1)
        stem = name.removesuffix("weight")
        few |= {stem + part: tensor for part, tensor in packed(levels.flatten(1), scales).items()}
    save_file(few, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    claim(quantized, settings)
    return quantized, plain


def claim(path: Path, settings: dict[str, Any]) -> Path:
    """Let `config.json` say that the weights are quantized."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    return path


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if not installed(METHODS[found][0]):
        pytest.skip(f"{METHODS[found][0]} is not installed")
    return found


@pytest.mark.filterwarnings("ignore")  # the packages' own, about themselves
def test_a_quantized_checkpoint_gives_the_vectors_of_the_values_that_it_stands_for(
    tmp_path: Path, method: str
) -> None:
    paths = quantize(tmp_path, method)
    quantized, plain = (load_encoder(path, device="cpu") for path in paths)
    ids = tokens_of(plain, [Text(text, truncate="end") for text in TEXTS])
    vectors = normalized(quantized.encode(ids))
    # GPTQ's scales are products in half precision.
    assert np.abs(vectors - normalized(plain.encode(ids))).max() <= 1e-3
    alone = np.concatenate([normalized(quantized.encode([i])) for i in ids])
    assert np.abs(vectors - alone).max() <= TOLERANCE
    quantized.close()


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_count_for_the_model_version(tmp_path: Path, method: str) -> None:
    first, plain = quantize(tmp_path, method)
    other = Path(shutil.copytree(first, tmp_path / "other"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    versions = {load_encoder(path, device="cpu").model_version for path in (first, plain, other)}
    assert len(versions) == 3


@pytest.mark.filterwarnings("ignore")
def test_fp8_on_top_of_a_quantized_checkpoint_is_refused(tmp_path: Path, method: str) -> None:
    path, _ = quantize(tmp_path, method)
    with pytest.raises(ModelError, match=f"quantization fp8: the checkpoint is already quantized .{method}"):
        load_encoder(path, device="cpu", quantization="fp8")


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        (METHODS["gptq"][2], "optimum"),
        (METHODS["awq"][2], "gptqmodel"),
        ({"quant_method": "aqlm"}, "aqlm"),
        (METHODS["compressed-tensors"][2], "compressed_tensors"),
    ],
    ids=["gptq", "awq", "aqlm", "compressed-tensors"],
)
def test_a_missing_package_is_named(tmp_path: Path, settings: dict[str, Any], package: str) -> None:
    if installed(package):
        pytest.skip(f"{package} is installed")
    path = claim(make_tiny_qwen3(tmp_path), settings)
    with pytest.raises(ModelError, match=rf"config\.json: .*{package.replace('_', '.')}"):
        load_encoder(path, device="cpu")


def test_a_method_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    path = claim(make_tiny_qwen3(tmp_path), {"quant_method": "nonesuch"})
    with pytest.raises(ModelError, match=r"config\.json: .*nonesuch"):
        load_encoder(path, device="cpu")
