"""Which forward a model runs on, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from embedq_consumer.engine import ModelError
from embedq_consumer.engine.models import registry
from embedq_consumer.engine.models.bert_cpu import PackedBert
from embedq_consumer.engine.models.traits import ForwardOptions, Limits
from embedq_consumer.engine.pooling import POOLINGS
from tests.helpers.encoders import FEW_ROWS

CPU = torch.device("cpu")


def options(*, quantized: bool = False) -> ForwardOptions:
    return ForwardOptions(
        pooling=POOLINGS["mean"], limits=Limits(max_tokens=8, position_offset=0), quantized=quantized
    )


def bert(**fields: Any) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        **fields,
    )
    return BertModel(config).eval().requires_grad_(False)


def test_no_two_families_claim_an_architecture_on_one_device() -> None:
    claims = [(family.device, name) for family in registry.FAMILIES for name in family.architectures]
    assert len(set(claims)) == len(claims)


def test_every_family_names_a_file_of_this_folder() -> None:
    folder = Path(registry.__file__).parent
    for family in registry.FAMILIES:
        file = folder / f"{family.module.rpartition('.')[2]}.py"
        assert f"class {family.forward}" in file.read_text(encoding="utf-8")


def test_a_plain_bert_on_a_cpu_runs_on_the_forward_that_is_written_out() -> None:
    model = bert()
    assert registry.is_written_out(model)
    built = registry.build(model, options())
    assert isinstance(built.hidden, PackedBert)
    assert built.pooled is None
    assert built.kernels == {"attention": "torch_sdpa", "few_rows": FEW_ROWS}


def test_a_bert_with_a_rare_activation_runs_on_transformers_layers() -> None:
    model = bert(hidden_act="silu")
    assert not registry.is_written_out(model)
    assert not isinstance(registry.build(model, options()).hidden, PackedBert)


def test_a_quantized_checkpoint_runs_on_transformers_layers() -> None:
    built = registry.build(bert(), options(), written_out=False)
    assert not isinstance(built.hidden, PackedBert)


def test_fp8_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="quantization fp8: needs CUDA"):
        registry.build(bert(), options(quantized=True))


def test_on_a_cpu_nothing_is_imported_ahead() -> None:
    before = set(sys.modules)
    for architecture in ("BertModel", "Qwen3Model", "NoModel"):
        registry.import_ahead(architecture, CPU)
    assert set(sys.modules) == before
