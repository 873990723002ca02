"""A checkpoint of MiniLM's shape with random weights: its real size, for where the real one cannot be had."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny_models import make_tiny_bert


def make_minilm(path: Path, *, seed: int = 0) -> Path:
    """Write it to `path` unless it is there: six layers of 384, 512 tokens, 30,522 words; the tiny model's tokenizer."""
    if (path / "done").exists():
        return path
    import json

    import torch
    from transformers import BertConfig, BertModel

    make_tiny_bert(path, hidden=384, layers=1, max_tokens=512)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    # Wider than a fresh model's weights, so that different texts get different vectors.
    config.initializer_range = 0.05
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 6
    (path / "done").touch()
    return path
