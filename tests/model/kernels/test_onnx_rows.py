"""Rows of few tokens by ONNX Runtime, against PyTorch's own products."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq_consumer.engine import Encoder, ModelError, load_encoder
from embedq_consumer.engine.kernels import cpu_products, onnx_rows
from embedq_consumer.engine.kernels.cpu_products import FEW_TOKENS
from tests.helpers.encoders import normalized
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_mpnet

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")
pytest.importorskip("onnx", reason="the extra `cpu` is not installed")

ROWS = {
    "one token": (1,),
    "one text": (16,),
    "texts of one length": (9, 9, 9),
    "texts of several lengths": (3, 9, 3, 1),
    "as many tokens as fit": (100, FEW_TOKENS - 100),
}
Make = Callable[[Path], Path]


def row(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(5, 60, length).astype(np.int32) for length in lengths]


@pytest.fixture(params=[make_tiny_bert, make_tiny_mpnet], ids=["bert", "mpnet"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Encoder, Encoder]:
    """One model with ONNX Runtime, and without."""
    make: Make = request.param
    path = make(tmp_path)
    fast = load_encoder(path, device="cpu")
    monkeypatch.setattr(cpu_products, "PACKED_BYTES", 0)
    return fast, load_encoder(path, device="cpu")


def test_texts_get_the_vectors_that_pytorch_gives(both: tuple[Encoder, Encoder]) -> None:
    fast, plain = both
    assert (fast.kernels["few_rows"], plain.kernels["few_rows"]) == ("onnxruntime", "plain")
    for name, lengths in ROWS.items():
        found, expected = (normalized(each.encode(row(*lengths))) for each in both)
        assert np.abs(found - expected).max() <= 1e-6, name


def test_a_row_of_more_tokens_is_pytorchs(
    both: tuple[Encoder, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*arguments: Any) -> None:
        raise AssertionError("ONNX Runtime was asked")

    monkeypatch.setattr(onnx_rows.OnnxBert, "__call__", called)
    fast, _ = both
    fast.encode(row(FEW_TOKENS, 1))
    with pytest.raises(AssertionError):
        fast.encode(row(FEW_TOKENS))


def test_a_load_proves_what_onnx_runtime_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_rows.OnnxBert.__call__
    monkeypatch.setattr(
        onnx_rows.OnnxBert,
        "__call__",
        lambda self, ids, *others: right(self, ids.flip(0).contiguous(), *others),
    )
    with pytest.raises(ModelError, match="do not give the same"):
        load_encoder(make_tiny_bert(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("raised", "said"),
    [(ImportError("No module named 'onnxruntime'"), None), (RuntimeError("no such\nkernel"), "no such")],
)
def test_without_onnx_runtime_the_packed_weights_run_and_what_went_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str | None
) -> None:
    def fails(*arguments: Any) -> None:
        raise raised

    monkeypatch.setattr(onnx_rows.OnnxBert, "__init__", fails)
    encoder = load_encoder(make_tiny_bert(tmp_path), device="cpu")
    assert encoder.kernels["few_rows"] == "packed"
    assert encoder.kernels.get("not_onnxruntime") == (said and f"RuntimeError: {said}")
    assert np.isfinite(encoder.encode(row(5))).all()


def test_it_has_as_many_threads_as_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime: Any = import_module("onnxruntime")

    asked: list[int] = []
    real = onnxruntime.InferenceSession

    def session(model: bytes, options: Any, **others: Any) -> Any:
        asked.append(options.intra_op_num_threads)
        return real(model, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    load_encoder(make_tiny_bert(tmp_path), device="cpu")
    assert asked == [torch.get_num_threads()]
