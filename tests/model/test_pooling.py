"""Each pooling by its definition, of whole texts and of spans of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from embedq_consumer.engine import ModelError, load_encoder
from embedq_consumer.engine.pooling import POOLINGS, Pooling
from embedq_consumer.engine.row import Row
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_bert
from tests.model.test_model_directory import edit
from tests.model.test_parity import TOLERANCE

LENGTHS = [3, 1, 5]
DEFINITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda tokens: tokens[0],
    "mean": lambda tokens: tokens.mean(0),
    "lasttoken": lambda tokens: tokens[-1],
}


@pytest.fixture(params=POOLINGS)
def pooling(request: pytest.FixtureRequest) -> Pooling:
    return POOLINGS[request.param]


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(sum(LENGTHS), 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_vector_is_float32_and_what_its_texts_tokens_give(pooling: Pooling, hidden: torch.Tensor) -> None:
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    found = pooling.pool(hidden, ends)
    wanted = [DEFINITIONS[pooling.name](text.float()) for text in torch.split(hidden, LENGTHS)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted))


def test_a_spans_vector_is_what_its_own_tokens_give(pooling: Pooling, hidden: torch.Tensor) -> None:
    spans = np.array([[0, 2], [4, 9], [3, 4]])
    if not pooling.supports_spans:
        with pytest.raises(RuntimeError, match="cls pooling has no vectors for spans"):
            pooling.pool_spans(hidden, spans)
        return
    found = pooling.pool_spans(hidden, spans)
    wanted = [DEFINITIONS[pooling.name](hidden[begin:end].float()) for begin, end in spans.tolist()]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted))


def test_a_pooling_picks_one_token_of_each_text_or_pools_rows_on_the_device(
    pooling: Pooling, hidden: torch.Tensor
) -> None:
    ends = torch.tensor([0, 3, 4, 9, 9], dtype=torch.int32)
    last = torch.tensor([2, 3, 8, 0], dtype=torch.int32)
    empty = torch.empty(len(hidden), dtype=torch.int32)
    row = Row(ids=empty, positions=empty, cu_seqlens=ends, last=last)
    picked = pooling.picked(row)
    if picked is None:
        assert type(pooling).pool_row is not Pooling.pool_row
        return
    assert len(picked) == 4  # a slot without a text picks a token of the row, too
    torch.testing.assert_close(hidden[picked[:3].long()].float(), pooling.pool(hidden, ends[:4]))
    with pytest.raises(RuntimeError, match="picks one token"):
        pooling.pool_row(hidden, row, torch.empty(4, 8))


class _Max(Pooling):
    name = "max"

    def pool(self, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        texts = torch.split(hidden.float(), cu_seqlens.diff().tolist())
        return torch.stack([text.amax(0) for text in texts])


def test_a_new_pooling_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in `POOLINGS`, it is read from a directory, loaded, and computed as sentence-transformers computes it."""
    from sentence_transformers import SentenceTransformer

    path = make_tiny_bert(tmp_path, pooling="mean")
    edit("1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True)(path)
    with pytest.raises(ModelError, match=r"expected one of cls, mean, lasttoken, got .'max'"):
        load_encoder(path, device="cpu")
    monkeypatch.setitem(cast("dict[str, Pooling]", POOLINGS), "max", _Max())
    encoder = load_encoder(path, device="cpu")
    found = normalized(encoder.encode(tokens_of(encoder, ["the moon", "a stone wall"])))
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    assert np.abs(found - reference.encode(["the moon", "a stone wall"])).max() <= TOLERANCE
