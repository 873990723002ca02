"""Rotary types on Qwen3's own forward on CUDA: those of fixed frequencies run there, where a prefix may be shared; no other does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.models import qwen3_cuda as qwen3
from embedq_consumer.engine.models.rotary import FIXED
from tests.helpers.position_models import LENGTH_DEPENDENT, ROPE_TYPES

_HEAD = 32


def model_of(rope_type: str, **fields: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=30,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=_HEAD,
        max_position_embeddings=512,
        rope_parameters=ROPE_TYPES[rope_type] | {"rope_type": rope_type, "rope_theta": 1e4} | fields,
    )
    return Qwen3Model(config).bfloat16().eval()


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_a_prefix_may_be_shared_only_where_it_is_the_same_in_a_text_of_any_length(rope_type: str) -> None:
    assert qwen3.PackedQwen3.fits(model_of(rope_type)) == (rope_type not in LENGTH_DEPENDENT)


def test_a_head_that_is_rotated_in_part_has_no_forward_of_its_own() -> None:
    assert not qwen3.PackedQwen3.fits(model_of("linear", partial_rotary_factor=0.5))


@pytest.mark.parametrize("rope_type", sorted(FIXED))
def test_angles_are_those_of_transformers(rope_type: str) -> None:
    model = model_of(rope_type).float()
    found = torch.stack(qwen3._rotation(model))
    positions = torch.arange(len(found[0]))[None]
    wanted = torch.stack(model.rotary_emb(torch.empty(1, 1), positions))[:, 0, :, : _HEAD // 2]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
