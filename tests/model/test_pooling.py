"""Each pooling by its definition, of whole texts and of spans of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from embedq_consumer.engine import ModelError, load_encoder
from embedq_consumer.engine.pooling import POOLINGS, Pooling, pooling_of
from embedq_consumer.engine.row import Row
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_bert
from tests.model.test_model_directory import edit
from tests.model.test_parity import TOLERANCE

LENGTHS = [3, 1, 5]


def weighted(tokens: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1.0, len(tokens) + 1).unsqueeze(1)
    return (tokens * weights).sum(0) / weights.sum()


DEFINITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: tokens.amax(0),
    "mean": lambda tokens: tokens.mean(0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(0) / len(tokens) ** 0.5,
    "weightedmean": weighted,
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
        with pytest.raises(RuntimeError, match=f"{pooling.name} pooling has no vectors for spans"):
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
    if picked is None and pooling.name != "max" and not torch.cuda.is_available():
        assert (
            type(pooling).pool_row is not Pooling.pool_row
        )  # a kernel: tests/model/models/test_bert_cuda.py runs it
        return
    if picked is None:
        out = torch.full((4, 8), torch.nan)
        pooling.pool_row(hidden, row, out)
        torch.testing.assert_close(out[:3], pooling.pool(hidden, ends[:4]))
        assert not out[3].any()  # a slot without a text
        return
    assert len(picked) == 4  # a slot without a text picks a token of the row, too
    torch.testing.assert_close(hidden[picked[:3].long()].float(), pooling.pool(hidden, ends[:4]))
    with pytest.raises(RuntimeError, match="picks one token"):
        pooling.pool_row(hidden, row, torch.empty(4, 8))


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_poolings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("all") / "model", pooling=list(POOLINGS))


def test_every_pooling_and_all_at_once_give_what_sentence_transformers_gives(
    all_poolings: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["the moon", "", "stone", "the old stone wall " * 15, "a stone wall"]
    encoder = load_encoder(all_poolings, device="cpu")
    reference = SentenceTransformer(str(all_poolings), device="cpu", local_files_only=True)
    ids = tokens_of(encoder, texts)
    expected = reference.encode(texts)
    assert encoder.hidden_size == 6 * 128 == reference.get_embedding_dimension()
    found = encoder.encode(ids)
    assert np.abs(normalized(found) - expected).max() <= TOLERANCE
    alone = np.concatenate([encoder.encode([each]) for each in ids])
    assert np.abs(normalized(alone) - expected).max() <= TOLERANCE
    # All of them concatenated could hide in its length which one is wrong.
    for number, name in enumerate(POOLINGS):
        path = shutil.copytree(all_poolings, tmp_path / name)
        edit("1_Pooling/config.json", pooling_mode=name)(path)
        own = load_encoder(path, device="cpu").encode(ids)
        assert np.abs(own - found[:, 128 * number : 128 * (number + 1)]).max() <= TOLERANCE, name
        reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
        assert np.abs(normalized(own) - reference.encode(texts)).max() <= TOLERANCE, name


def test_several_poolings_stand_in_the_order_of_their_list(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    path = make_tiny_bert(tmp_path)
    versions = set()
    for modes in (["lasttoken", "cls"], ["cls", "lasttoken"]):
        edit("1_Pooling/config.json", pooling_mode=modes)(path)
        encoder = load_encoder(path, device="cpu")
        versions.add(encoder.model_version)
        found = normalized(encoder.encode(tokens_of(encoder, ["the moon", "a stone wall"])))
        reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
        assert np.abs(found - reference.encode(["the moon", "a stone wall"])).max() <= TOLERANCE
    assert len(versions) == 2


def test_a_dense_module_takes_what_all_poolings_give(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    path = make_tiny_bert(tmp_path, pooling=["cls", "mean"], dense=[(80, "Tanh", True)])
    encoder = load_encoder(path, device="cpu")
    found = encoder.encode(tokens_of(encoder, ["the moon", "a stone wall"]))
    assert found.shape == (2, 80)
    assert encoder.hidden_size == 80
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    for dimensions in (32, None):
        wanted = normalized(reference.encode(["the moon", "a stone wall"]), dimensions)
        assert np.abs(normalized(found, dimensions) - wanted).max() <= TOLERANCE


def test_several_poolings_have_vectors_for_spans_if_each_of_them_has(all_poolings: Path) -> None:
    assert not load_encoder(all_poolings, device="cpu").late_chunks
    both = pooling_of(["mean", "lasttoken"])
    assert both.supports_spans
    assert both.end_token
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    found = both.pool_spans(hidden, np.array([[1, 4]]))
    torch.testing.assert_close(found, torch.cat([hidden[1:4].mean(0), hidden[3]]).unsqueeze(0))


def test_several_poolings_of_a_row_are_those_of_its_texts(hidden: torch.Tensor) -> None:
    """On a CPU, where there is no kernel for the mean."""
    both = pooling_of(["lasttoken", "max", "cls"])
    ends = torch.tensor([0, 3, 4, 9, 9], dtype=torch.int32)
    last = torch.tensor([2, 3, 8, 0], dtype=torch.int32)
    empty = torch.empty(len(hidden), dtype=torch.int32)
    row = Row(ids=empty, positions=empty, cu_seqlens=ends, last=last)
    assert both.picked(row) is None
    out = torch.full((4, 24), torch.nan)
    both.pool_row(hidden, row, out)
    torch.testing.assert_close(out[:3], both.pool(hidden, ends[:4]))
    assert out.isfinite().all()


class _Min(Pooling):
    name = "min"

    def pool(self, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        texts = torch.split(hidden.float(), cu_seqlens.diff().tolist())
        return torch.stack([text.amin(0) for text in texts])


def test_a_new_pooling_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in `POOLINGS`, it is read from a directory, loaded, and computed."""
    path = make_tiny_bert(tmp_path)
    edit("1_Pooling/config.json", pooling_mode=["min", "mean"])(path)
    with pytest.raises(ModelError, match=r"pooling_mode: expected one or more of cls, max, mean, .*, got"):
        load_encoder(path, device="cpu")
    monkeypatch.setitem(cast("dict[str, Pooling]", POOLINGS), "min", _Min())
    encoder = load_encoder(path, device="cpu")
    found = encoder.encode(tokens_of(encoder, ["the moon", "a stone wall"]))
    assert found.shape == (2, 256)
    assert (found[:, :128] <= found[:, 128:] + 1e-6).all()
