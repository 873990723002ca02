"""A tiny model of each architecture that transformers knows, made without knowing any of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.helpers.tiny_models import make_tiny_bert

__all__ = ["Unmade", "every_kind", "make"]

_LAYERS: Final = 3
_MOST_PARAMETERS: Final = 4_000_000
"""What is larger did not obey: most of it is a part for images or sound."""
_SMALL: Final[Mapping[str, Any]] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size", "width"), 32
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), _LAYERS
    ),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "vision_layers"), 2),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "num_key_value_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "kv_channels", "rotary_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(
        (
            "intermediate_size",
            "d_inner",
            "ffn_dim",
            "n_inner",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "hidden_dim",
            "ffn_hidden_size",
        ),
        48,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 512
    ),
    # Far shorter than the longest text, so that what happens beyond shows.
    **dict.fromkeys(("sliding_window", "local_attention", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"), 600),
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    # What is special to one architecture: without it the model cannot be made, or takes no text of some length.
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 16,
        "share_att_key": True,
        "conv_kernel_size": 3,
    },
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "longformer": {"attention_window": [8, 8, 8]},
    "mpt": {"max_seq_len": 512},
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "local", "local"],
    },
    "xmod": {"default_language": "en_XX"},
}


class Unmade(Exception):
    """There is no tiny model of this architecture, or it reads no token ids: so there is nothing to serve."""


def every_kind() -> list[str]:
    """transformers' `model_type` of each architecture that has a base model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def make(kind: str, path: Path, **fields: Any) -> Path:
    """Write a tiny `kind` with mean pooling below `path`, with these `fields` of its configuration, and return its directory.

    Raises:
        Unmade: it cannot be made, is too large, or reads no token ids.
    """
    import torch

    try:
        config = _config(kind, fields)
        model_class = _class_of(config)
        if "input_ids" not in inspect.signature(model_class.forward).parameters:
            raise Unmade("reads no token ids")
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > _MOST_PARAMETERS:
            raise Unmade(f"{size:,} parameters")
        model = model_class(config).eval()
    except Unmade:
        raise
    except Exception as error:
        raise Unmade(f"{type(error).__name__}: {error}") from error
    make_tiny_bert(path, hidden=32, max_tokens=512)
    _fill(model)
    model.save_pretrained(path)
    return path


def _class_of(config: Any) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    from embedq_consumer.engine.model_directory import ENCODERS

    if config.model_type in ENCODERS:
        return getattr(transformers, ENCODERS[config.model_type])
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _config(kind: str, fields: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**(_small(CONFIG_MAPPING[kind]) | dict(_OWN.get(kind, {})) | dict(fields)))


def _small(kind: Any) -> dict[str, Any]:
    """The fields that make a configuration small, as far as it has them; those of its parts, too."""
    default = kind()
    known = {*default.to_dict(), *kind.attribute_map, *kind.attribute_map.values()}
    fields: dict[str, Any] = {}
    for name, value in _SMALL.items():
        usual = getattr(default, name, None) if name in known else None
        if name in known and not isinstance(usual, dict):
            fields[name] = [value] * _LAYERS if isinstance(usual, list | tuple) else value
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "layer_types" in known:
        fields["layer_types"] = (kinds * _LAYERS)[:_LAYERS]
    for name, part in (kind.sub_configs or {}).items():
        if hasattr(part, "sub_configs") and name in known:
            fields[name] = _small(part)
    return fields


def _fill(model: Any) -> None:
    """Weights of a size that lets every part of the model count: libraries' own are so small that attention hardly does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
