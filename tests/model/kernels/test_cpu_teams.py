"""Texts that run at once in several threads, each with texts of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedq_consumer.engine import Quantization, Text, Tokens, load_encoder
from embedq_consumer.engine.encoder import PackedEncoder
from embedq_consumer.engine.kernels.attention import Packing, attend_runs
from embedq_consumer.engine.kernels.cpu_teams import ONE, Teams, teams_for
from embedq_consumer.engine.models import bert_cpu
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import (
    make_tiny_bert,
    make_tiny_deberta,
    make_tiny_mpnet,
    make_tiny_qwen3,
    minilm_path,
    nan_word,
)

MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert": make_tiny_bert,
    "mpnet": make_tiny_mpnet,
    "deberta": make_tiny_deberta,
    "minilm": lambda _: minilm_path(),
}
TEXTS = [
    "The moon is round.",
    "a",
    "stone wall " * 20,
    "gravity attracts bodies " * 9,
    "北京是中国的首都。",
] * 12


@pytest.fixture(scope="module")
def teams() -> Teams:
    """Three, whatever this machine has."""
    return Teams(3, 1)


def loaded(path: Path, teams: Teams, quantization: Quantization = "none") -> PackedEncoder:
    encoder = load_encoder(path, device="cpu", quantization=quantization)
    assert isinstance(encoder, PackedEncoder)
    encoder._teams = teams
    return encoder


def noted(encoder: PackedEncoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that run rows of `encoder` from now on."""
    names: list[str] = []
    forward = encoder._forward
    assert forward is not None

    def note(ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        names.append(threading.current_thread().name)
        return forward(ids, positions, packing)

    monkeypatch.setattr(encoder, "_forward", note)
    return names


@pytest.mark.parametrize("quantization", ["none", "bf16"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_text_gets_in_a_team_the_vector_that_it_gets_alone(
    kind: str, quantization: Quantization, teams: Teams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(MAKERS[kind](tmp_path / "model"), teams, quantization)
    ids = tokens_of(encoder, TEXTS)
    alone = normalized(np.concatenate([encoder.encode([each]) for each in ids[:5]]))
    names = noted(encoder, monkeypatch)
    for _ in range(5):  # rows of the same team, one after the other, and beside those of the others
        found = normalized(encoder.encode(ids))
        assert np.sum(found * np.tile(alone, (12, 1)), axis=1).min() >= (
            1 - 1e-5 if quantization == "none" else 0.98
        )
    assert "team" in {name[:4] for name in names}


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_rows_that_stand_in_the_same_layer_do_not_write_into_each_other(
    kind: str, teams: Teams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(MAKERS[kind](tmp_path / "model"), teams)
    ids = [np.arange(n, n + 40, dtype=np.int32) for n in range(5, 20)]
    alone = np.concatenate([encoder.encode([each]) for each in ids])
    at_once = threading.Barrier(3)

    def together(*args: Any, **more: Any) -> None:
        at_once.wait(10)
        attend_runs(*args, **more)
        at_once.wait(10)

    monkeypatch.setattr(bert_cpu, "attend_runs", together)
    for _ in range(2):  # the first rows make their scratch
        assert np.abs(encoder.encode(ids) - alone).max() <= 1e-5


def test_passages_of_texts_run_in_teams_too(
    teams: Teams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(make_tiny_bert(tmp_path, pooling="mean"), teams)
    texts = [Tokens(ids, whole=True, spans=((0, 2), (2, len(ids)))) for ids in tokens_of(encoder, TEXTS)]
    alone = np.concatenate([encoder.submit([text]).result() for text in texts[:5]])
    names = noted(encoder, monkeypatch)
    found = encoder.submit(texts).result()
    assert np.abs(found - np.tile(alone, (12, 1))).max() <= 1e-5
    assert "team" in {name[:4] for name in names}


def test_a_text_that_gives_nan_spoils_nobody_in_its_team(teams: Teams, tmp_path: Path) -> None:
    encoder = loaded(nan_word(tmp_path, "stone"), teams)
    vectors = encoder.encode(tokens_of(encoder, ["the moon", "the stone moon", "a wall"] * 60))
    assert np.isfinite(vectors).all(axis=1).tolist() == [True, False, True] * 60


def test_what_fails_in_one_team_is_raised_when_no_team_computes_any_more(teams: Teams) -> None:
    fails, ended = threading.Event(), []

    def compute(share: list[int]) -> list[int]:
        if 0 in share:
            fails.set()
            raise ValueError("of one team")
        assert fails.wait(10)
        ended.append(share)
        return share

    with pytest.raises(ValueError, match="of one team"):
        teams.each(compute, range(3), range(3), lambda _: 500)
    assert len(ended) == 2


def test_other_threads_keep_as_many_of_pytorchs_as_before() -> None:
    before = torch.get_num_threads()
    two = Teams(2, before + 1)
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before
    assert {
        found
        for _, found in two.each(
            lambda share: [torch.get_num_threads()] * len(share), range(4), range(4), lambda _: 500
        )
    } == {before + 1}


def test_texts_run_one_by_one_where_their_bits_or_a_foreign_forward_need_it(tmp_path: Path) -> None:
    """transformers' own layers keep a row's positions for a moment; and with other threads a product's sums have another order."""
    fixed = load_encoder(make_tiny_bert(tmp_path / "bert"), device="cpu", deterministic=True)
    foreign = load_encoder(make_tiny_qwen3(tmp_path / "qwen3"), device="cpu")
    free = load_encoder(tmp_path / "bert", device="cpu")
    assert isinstance(fixed, PackedEncoder)
    assert isinstance(foreign, PackedEncoder)
    assert isinstance(free, PackedEncoder)
    assert fixed._teams is foreign._teams is ONE
    assert free._teams is teams_for(torch.get_num_threads())


def test_a_long_text_of_a_small_batch_has_all_threads(
    teams: Teams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(make_tiny_bert(tmp_path), teams)
    names = noted(encoder, monkeypatch)
    encoder.encode(tokens_of(encoder, [Text("stone wall " * 2_000, truncate="end"), "the moon"]))
    assert names == [threading.current_thread().name]
