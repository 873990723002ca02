"""Tiny models whose positions are awkward: every rotary type in many families, and RoBERTa's relatives, which do not count padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import tiny_models

__all__ = [
    "LENGTH_DEPENDENT",
    "ORIGINAL",
    "ROBERTAS",
    "ROPE_TYPES",
    "ROTARY",
    "make_esm",
    "make_roberta",
    "make_rotary",
]

_tiny: Any = tiny_models
"""Its parts, of which these models are made, too."""

ORIGINAL = 64
"""Tokens after which rotary frequencies change, where they do."""
LONGEST = 512
_HEAD = 32
_HIDDEN = 128

ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.05 * n for n in range(_HEAD // 2)],
        "long_factor": [1.0 + 0.9 * n for n in range(_HEAD // 2)],
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
"""Every type of transformers' ROPE_INIT_FUNCTIONS, and the default one, with what each needs."""
LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})

ROTARY = (
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Phi3",
    "Gemma",
    "Gemma3Text",
    "ModernBert",
    "EuroBert",
    "Olmo2",
)
"""Families by the first part of their classes' names."""
_NESTED = frozenset({"Gemma3Text", "ModernBert"})
"""Families with rotary parameters for each type of layer: the type under test in layers that attend everywhere."""

ROBERTAS = (
    "Roberta",
    "XLMRoberta",
    "XLMRobertaXL",
    "Camembert",
    "Data2VecText",
    "RobertaPreLayerNorm",
    "Xmod",
)
"""RoBERTa and its relatives, by the first part of their classes' names."""


def make_rotary(path: Path, family: str, rope_type: str, *, seed: int = 0) -> Path:
    """Write an embedding model of `family` (last token, then normalize) with positions of `rope_type`, and return `path`.

    It takes 512 tokens; with `dynamic`, 64 are its `max_position_embeddings`, and 256 the scaled length.
    """
    import transformers

    tokenizer = _tiny._byte_level_bpe()
    end = tokenizer.token_to_id("<|endoftext|>")
    rope = ROPE_TYPES[rope_type] | {"rope_type": rope_type, "rope_theta": 10_000.0}
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": _HIDDEN,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": ORIGINAL if rope_type == "dynamic" else LONGEST,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    if family in _NESTED:
        default = {"rope_type": "default", "rope_theta": 10_000.0}
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": default}
        fields["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    else:
        fields["rope_parameters"] = rope
    match family:
        case "ModernBert":
            fields |= {"local_attention": 16, "cls_token_id": end, "sep_token_id": end}
        case "EuroBert":
            fields |= {"mask_token_id": end, "head_dim": _HEAD, "num_key_value_heads": 2}
        case "Gemma3Text":
            fields |= {"sliding_window": 16, "use_bidirectional_attention": True}
            fields |= {"head_dim": _HEAD, "num_key_value_heads": 2}
        case _:
            fields |= {"head_dim": _HEAD, "num_key_value_heads": 2, "use_cache": False}
    if family == "Phi3":
        fields["original_max_position_embeddings"] = ORIGINAL
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(
        transformers,
        f"{family.removesuffix('Text')}TextModel" if family == "Gemma3Text" else f"{family}Model",
    )(config)
    path.mkdir(parents=True, exist_ok=True)
    _tiny._write_weights(path, model, seed)
    _tiny._write_byte_level_bpe(path, tokenizer)
    _tiny._write_sentence_transformers(path, hidden=_HIDDEN, pooling="lasttoken", normalize=True)
    return path


def make_roberta(path: Path, family: str, *, seed: int = 0, max_tokens: int = 128) -> Path:
    """Write an embedding model of a `family` in ROBERTAS (mean, then normalize); its padding is the token [PAD]. Returns `path`."""
    import transformers

    tokenizer = _tiny._word_piece()
    pad = tokenizer.token_to_id("[PAD]")
    assert pad is not None
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": _HIDDEN,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": max_tokens + pad + 1,
        "type_vocab_size": 1,
        "pad_token_id": pad,
        "bos_token_id": tokenizer.token_to_id("[CLS]"),
        "eos_token_id": tokenizer.token_to_id("[SEP]"),
    }
    if family == "Xmod":
        fields |= {"languages": ["en_XX"], "default_language": "en_XX"}
    config = getattr(transformers, f"{family}Config")(**fields)
    maker: Callable[..., Any] = getattr(transformers, f"{family}Model")
    path.mkdir(parents=True, exist_ok=True)
    _tiny._write_weights(path, maker(config, add_pooling_layer=False), seed)
    _tiny._write_word_piece(path, tokenizer, max_tokens, tokenizer_class="PreTrainedTokenizerFast")
    _tiny._write_sentence_transformers(
        path, hidden=_HIDDEN, pooling="mean", normalize=True, max_seq_length=max_tokens
    )
    return path


def make_esm(path: Path, *, seed: int = 0, max_tokens: int = 128) -> Path:
    """Write an ESM embedding model (mean, then normalize), whose embeddings are scaled by the share of [MASK]. Returns `path`."""
    from transformers import EsmConfig, EsmModel

    tokenizer = _tiny._word_piece()
    pad = tokenizer.token_to_id("[PAD]")
    config = EsmConfig(
        vocab_size=tokenizer.get_vocab_size(),
        mask_token_id=tokenizer.token_to_id("[MASK]"),
        pad_token_id=pad,
        hidden_size=_HIDDEN,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_tokens + pad + 1,
        position_embedding_type="rotary",
        token_dropout=True,
    )
    path.mkdir(parents=True, exist_ok=True)
    _tiny._write_weights(path, EsmModel(config, add_pooling_layer=False), seed)
    _tiny._write_word_piece(path, tokenizer, max_tokens, tokenizer_class="PreTrainedTokenizerFast")
    _tiny._write_sentence_transformers(
        path, hidden=_HIDDEN, pooling="mean", normalize=True, max_seq_length=max_tokens
    )
    return path
