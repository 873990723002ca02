"""Checkpoints of the Qwen3-Embedding shapes with random weights: real files of the real sizes, for where none can be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.tiny_models import make_tiny_qwen3

SHAPES: dict[str, dict[str, Any]] = {
    "least": {"layers": 2, "hidden": 128, "heads": 2, "kv_heads": 1, "inner": 256, "vocabulary": 600},
    "tiny": {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 2, "inner": 1536, "vocabulary": 600},
    "0.6B": {"layers": 28, "hidden": 1024, "heads": 16, "kv_heads": 8, "inner": 3072, "vocabulary": 151669},
    "4B": {"layers": 36, "hidden": 2560, "heads": 32, "kv_heads": 8, "inner": 9728, "vocabulary": 151665},
    "8B": {"layers": 36, "hidden": 4096, "heads": 32, "kv_heads": 8, "inner": 12288, "vocabulary": 151665},
}
HEAD_DIM = 128


def make(path: Path, name: str, *, seed: int = 0) -> Path:
    """Write the shape `name` to `path` unless it is there; random weights from `seed`, made on the GPU if there is one."""
    if (path / "model.safetensors").exists():
        return path
    import torch
    from safetensors.torch import save_file

    shape = SHAPES[name]
    make_tiny_qwen3(path, layers=1)
    (path / "model.safetensors").unlink()
    _patch(
        path / "config.json",
        {
            "vocab_size": shape["vocabulary"],
            "hidden_size": shape["hidden"],
            "intermediate_size": shape["inner"],
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "num_key_value_heads": shape["kv_heads"],
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 40960,
            "max_window_layers": shape["layers"],
            "layer_types": ["full_attention"] * shape["layers"],
            "dtype": "bfloat16",
        },
    )
    _patch(path / "1_Pooling" / "config.json", {"word_embedding_dimension": shape["hidden"]})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def random(rows: int, columns: int, scale: float) -> torch.Tensor:
        noise = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return noise.mul_(scale).cpu()

    def norm(width: int) -> torch.Tensor:
        noise = torch.randn(width, generator=generator, device=device)
        return (1 + 0.1 * noise).to(torch.bfloat16).cpu()

    hidden, inner, heads, kv_heads = (shape[key] for key in ("hidden", "inner", "heads", "kv_heads"))
    tensors = {
        "embed_tokens.weight": random(shape["vocabulary"], hidden, 1.0),
        "norm.weight": norm(hidden),
    }
    for layer in range(shape["layers"]):
        for part, rows, columns in (
            ("self_attn.q_proj", heads * HEAD_DIM, hidden),
            ("self_attn.k_proj", kv_heads * HEAD_DIM, hidden),
            ("self_attn.v_proj", kv_heads * HEAD_DIM, hidden),
            ("self_attn.o_proj", hidden, heads * HEAD_DIM),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"layers.{layer}.{part}.weight"] = random(rows, columns, columns**-0.5)
        for part, width in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", HEAD_DIM),
            ("self_attn.k_norm", HEAD_DIM),
        ):
            tensors[f"layers.{layer}.{part}.weight"] = norm(width)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _patch(file: Path, fields: dict[str, Any]) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | fields, indent=2) + "\n")
