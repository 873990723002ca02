"""Relative positions: buckets and biases against transformers' own, and what DeBERTa's and MPNet's forwards leave to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq_consumer.engine import Encoder, ModelError, load_encoder
from embedq_consumer.engine.models.relative import log_buckets, t5_buckets
from tests.helpers.encoders import normalized
from tests.helpers.tiny_models import make_tiny_deberta, make_tiny_mpnet
from tests.model.test_parity import TOLERANCE


@pytest.mark.parametrize("most", [1, 2, 9, 300])
def test_mpnets_buckets_are_those_of_transformers(most: int) -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distance = torch.arange(1 - most, most)
    expected = MPNetEncoder.relative_position_bucket(distance, num_buckets=32, max_distance=128)
    assert torch.equal(t5_buckets(most, buckets=32, max_distance=128), expected)


@pytest.mark.parametrize(("buckets", "max_distance"), [(256, 512), (16, 512), (16, 24), (-1, 512)])
@pytest.mark.parametrize("most", [1, 2, 600])
def test_debertas_buckets_are_those_of_transformers(most: int, buckets: int, max_distance: int) -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    row = torch.empty(1, most, 1)
    matrix = build_relative_position(row, row, bucket_size=buckets, max_position=max_distance)[0]
    # The first column has all distances from 0 on, the first row those down to the least.
    expected = torch.cat([matrix[0, 1:].flip(0), matrix[:, 0]])
    assert torch.equal(log_buckets(most, buckets=buckets, max_distance=max_distance), expected)


def alone(path: Path, ids: list[Any]) -> Any:
    """transformers' own means over the hidden states of each text."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path).eval()
    with torch.inference_mode():
        rows = [torch.from_numpy(each.astype(np.int64)).unsqueeze(0) for each in ids]
        masks = [torch.ones_like(row) for row in rows]
        pairs = zip(rows, masks, strict=True)
        return np.stack(
            [model(row, attention_mask=mask).last_hidden_state[0].mean(0).numpy() for row, mask in pairs]
        )


def random_ids() -> list[Any]:
    random = np.random.default_rng(0)
    return [random.integers(5, 300, n).astype(np.int32) for n in (1, 2, 31, 31, 140, 512)]


def difference(encoder: Encoder, path: Path) -> float:
    ids = random_ids()
    return float(np.abs(normalized(encoder.encode(ids)) - normalized(alone(path, ids))).max())


@pytest.mark.parametrize(
    "fields",
    [
        {"pos_att_type": "p2c"},
        {"pos_att_type": "c2p", "share_att_key": False},
        {"pos_att_type": []},
        {"position_buckets": -1, "max_relative_positions": -1},
        {"type_vocab_size": 2, "position_biased_input": True, "embedding_size": 24},
    ],
    ids=str,
)
def test_every_kind_of_deberta_runs_packed(tmp_path: Path, fields: dict[str, Any]) -> None:
    encoder = load_encoder(make_tiny_deberta(tmp_path, **fields), device="cpu")
    assert encoder.kernels == {"attention": "torch_sdpa"}
    assert difference(encoder, tmp_path) <= TOLERANCE


@pytest.mark.parametrize(
    "fields", [{"conv_kernel_size": 3}, {"relative_attention": False}, {"hidden_act": "silu"}], ids=str
)
def test_a_deberta_that_is_not_written_out_runs_by_length(tmp_path: Path, fields: dict[str, Any]) -> None:
    encoder = load_encoder(make_tiny_deberta(tmp_path, **fields), device="cpu")
    assert encoder.kernels["attention"] == "by_length"
    assert difference(encoder, tmp_path) <= TOLERANCE


def test_both_start_again_without_transformers(tmp_path: Path) -> None:
    """From the load cache, which holds weights and configuration alone."""
    for name, make in (("mpnet", make_tiny_mpnet), ("deberta", make_tiny_deberta)):
        path = make(tmp_path / name)
        known = tmp_path / "known"
        first = load_encoder(path, device="cpu", known_models=known)
        second = load_encoder(path, device="cpu", known_models=known)
        assert "transformers" in first.phases
        assert "transformers" not in second.phases
        assert np.array_equal(first.encode(random_ids()), second.encode(random_ids()))


def test_a_mpnet_of_fewer_buckets_is_refused_as_transformers_fails_on_it(tmp_path: Path) -> None:
    from transformers import MPNetConfig, MPNetModel

    path = make_tiny_mpnet(tmp_path)
    config = MPNetConfig.from_pretrained(path)
    config.relative_attention_num_buckets = 8
    MPNetModel(config, add_pooling_layer=False).save_pretrained(path)
    with pytest.raises(ModelError, match=r"config\.json: model_type mpnet: expected .* raises IndexError"):
        load_encoder(path, device="cpu")
