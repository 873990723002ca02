"""Tiny models of the architectures beyond BERT and Qwen3, and texts longer than their windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.tiny_models import (
    make_tiny_deberta,
    make_tiny_gemma2,
    make_tiny_gemma3,
    make_tiny_llama,
    make_tiny_mistral,
    make_tiny_modernbert,
    make_tiny_mpnet,
    make_tiny_t5,
)
from tests.model.test_parity import TEXTS

__all__ = ["LONG_TEXTS", "MAKERS", "make_embeddinggemma"]


def make_embeddinggemma(path: Path) -> Path:
    """Both ways, with two Dense modules that widen and narrow again, as EmbeddingGemma has them."""
    return make_tiny_gemma3(path, dense=[(192, "Identity", False), (96, "Identity", False)])


def make_causal_gemma3(path: Path) -> Path:
    return make_tiny_gemma3(path, bidirectional=False, dense=[(64, "Tanh", True)])


def make_first_deberta(path: Path) -> Path:
    """All that DeBERTa-v3 does without: positions and types in the embeddings, which are narrower, and distances of their own."""
    return make_tiny_deberta(
        path,
        position_biased_input=True,
        type_vocab_size=2,
        embedding_size=48,
        share_att_key=False,
        norm_rel_ebd="none",
        position_buckets=-1,
        max_relative_positions=24,
        pos_att_type="c2p",
    )


MAKERS: dict[str, Callable[[Path], Path]] = {
    "modernbert": make_tiny_modernbert,
    "embeddinggemma": make_embeddinggemma,
    "gemma3": make_causal_gemma3,
    "mistral": make_tiny_mistral,
    "llama": make_tiny_llama,
    "mpnet": make_tiny_mpnet,
    "deberta-v3": make_tiny_deberta,
    "deberta-v2": make_first_deberta,
    "gemma2": make_tiny_gemma2,
    "t5": make_tiny_t5,
}
# Longer than every window, by much and by little, and so long that queries are attended to in several calls.
LONG_TEXTS = [*TEXTS, "the moon and the stone wall " * 70, "moon " * 15, "a b c d e f g h", "stone " * 900]
