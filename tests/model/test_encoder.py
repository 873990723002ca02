"""Other architectures, weights that are not numbers, long texts, and what closing frees."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedq_consumer.engine import ModelError, Quantization, Text, load_encoder
from embedq_consumer.engine.encoder import PackedEncoder
from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.models import registry
from embedq_consumer.engine.models.bert_cpu import PackedBert
from tests.helpers.encoders import FEW_ROWS, normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, nan_weights, nan_word
from tests.model.test_parity import TEXTS, TOLERANCE


def make_other(path: Path, config: Any) -> Path:
    """A tiny BERT's directory around another architecture's random weights."""
    from transformers import AutoModel

    make_tiny_bert(path, max_tokens=64)
    config.vocab_size = 500
    torch.manual_seed(0)
    auto: Any = AutoModel
    auto.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def small(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": 500,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        **fields,
    }


@pytest.mark.usefixtures("quiet")
def test_positions_that_start_after_the_padding_give_what_sentence_transformers_gives(
    tmp_path: Path,
) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import XLMRobertaConfig

    config = XLMRobertaConfig(**small(max_position_embeddings=80, pad_token_id=0, type_vocab_size=1))
    path = make_other(tmp_path, config)
    encoder = load_encoder(path, device="cpu")
    vectors = encoder.encode(tokens_of(encoder, [Text(text, truncate="end") for text in TEXTS]))
    expected = SentenceTransformer(str(path), device="cpu", local_files_only=True).encode(TEXTS)
    assert np.abs(normalized(vectors) - expected).max() <= TOLERANCE


@pytest.mark.usefixtures("quiet")
def test_an_architecture_that_packing_would_break_runs_by_length_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import FNetConfig

    fields = small(max_position_embeddings=512, pad_token_id=0, tpu_short_seq_length=512)
    path = make_other(tmp_path, FNetConfig(**{k: v for k, v in fields.items() if k != "num_attention_heads"}))
    encoder = load_encoder(path, device="cpu")
    assert encoder.kernels["attention"] == "by_length"
    assert encoder.kernels["not_packed"]
    found = normalized(encoder.encode(tokens_of(encoder, [Text(t, truncate="end") for t in TEXTS])))
    # One text a call: of a padded batch, FNet mixes the padding into every token.
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    expected = np.concatenate([reference.encode([text]) for text in TEXTS])
    assert np.abs(found - normalized(expected)).max() <= TOLERANCE
    monkeypatch.setattr(registry, "by_length_forward", lambda *_: lambda ids, *_: torch.zeros(len(ids), 128))
    with pytest.raises(
        ModelError, match=r"config\.json: model_type fnet: neither packed \(.*\) nor by length"
    ):
        load_encoder(path, device="cpu")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_written_out_bert_gives_what_the_general_path_gives(
    tmp_path: Path, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_bert(tmp_path, pooling=pooling)
    written_out = load_encoder(path, device="cpu")
    monkeypatch.setattr(PackedBert, "fits", staticmethod(lambda _: False))
    general = load_encoder(path, device="cpu")
    ids = tokens_of(general, [Text(text, truncate="end") for text in TEXTS])
    assert np.abs(normalized(written_out.encode(ids)) - normalized(general.encode(ids))).max() <= TOLERANCE


def test_weights_that_are_not_numbers_load_and_give_nan(tmp_path: Path) -> None:
    encoder = load_encoder(nan_weights(tmp_path), device="cpu")
    assert np.isnan(encoder.encode(tokens_of(encoder, ["moon", "", "the stone wall"]))).all()


def test_a_text_that_gives_nan_leaves_its_neighbors_alone(tmp_path: Path) -> None:
    encoder = load_encoder(nan_weights(tmp_path, token="<|im_start|>"), device="cpu")
    texts = ["the moon", "the <|im_start|>moon", "the wall", "<|im_start|>", "a"]
    vectors = encoder.encode(tokens_of(encoder, texts))
    assert np.isfinite(vectors).all(axis=1).tolist() == [True, False, True, False, True]
    alone = encoder.encode(tokens_of(encoder, ["the moon"]))
    assert np.abs(normalized(vectors[:1]) - normalized(alone)).max() <= TOLERANCE


@pytest.mark.parametrize("quantization", ["none", "bf16"])
@pytest.mark.parametrize("repeated", [1, 40])
def test_a_text_that_gives_nan_leaves_those_alone_whose_keys_lie_beside_its_own(
    tmp_path: Path, repeated: int, quantization: Quantization
) -> None:
    """A short row, which ONNX Runtime may run, and a long one; the text before it reads its keys, and gives them no weight."""
    encoder = load_encoder(nan_word(tmp_path, "stone"), device="cpu", quantization=quantization)
    texts = ["the moon", "the stone moon", "a wall"] * repeated
    vectors = encoder.encode(tokens_of(encoder, texts))
    assert np.isfinite(vectors).all(axis=1).tolist() == [True, False, True] * repeated
    alone = encoder.encode(tokens_of(encoder, ["the moon"]))
    difference = np.abs(normalized(vectors[:1]) - normalized(alone)).max()
    assert difference <= (TOLERANCE if quantization == "none" else 0.02)


def test_a_long_text_runs_alongside_a_short_one(tmp_path: Path) -> None:
    """The longest that Qwen3-Embedding-0.6B takes."""
    encoder = load_encoder(make_tiny_qwen3(tmp_path, hidden=64, layers=1), device="cpu")
    assert encoder.max_tokens == 32768
    short, long = tokens_of(encoder, ["the moon", Text("stone wall " * 20_000, truncate="end")])
    assert len(long) == 32768
    vectors = encoder.encode([long, short])
    assert np.isfinite(vectors).all()
    assert np.abs(normalized(vectors)[1] - normalized(encoder.encode([short]))[0]).max() <= TOLERANCE


@pytest.mark.parametrize(("threads", "rows"), [(2, [1_000, 1_000, 500]), (8, [2_000, 500])])
def test_a_cpu_runs_as_many_tokens_at_once_as_its_threads_are_worth(
    threads: int, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    encoder = load_encoder(make_tiny_qwen3(tmp_path, hidden=64, layers=1), device="cpu")
    assert isinstance(encoder, PackedEncoder)
    ran: list[int] = []
    forward = encoder._forward
    assert forward is not None

    def noted(ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        ran.append(len(ids))
        return forward(ids, positions, packing)

    monkeypatch.setattr(encoder, "_forward", noted)
    encoder.encode([np.full(100, 7, dtype=np.int32)] * 25)
    assert ran == rows


def test_a_closed_encoder_frees_its_weights(tmp_path: Path) -> None:
    shape = (128, 193)  # the query projection's, in no other test

    def weights() -> int:
        gc.collect()
        return sum(type(o) is torch.nn.Parameter and tuple(o.shape) == shape for o in gc.get_objects())

    gc.freeze()  # what is there before is not looked through
    encoder = load_encoder(make_tiny_qwen3(tmp_path, hidden=193), device="cpu")
    (ids,) = tokens_of(encoder, ["the moon"])
    encoder.encode([ids])
    assert weights() == 2
    encoder.close()
    assert weights() == 0
    with pytest.raises(RuntimeError, match="This is a bug"):
        encoder.encode([ids])


def test_loading_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own: in this one the threads of another test's libraries may say something, too."""
    program = "import sys; from pathlib import Path; from embedq_consumer.engine import load_encoder; load_encoder(Path(sys.argv[1]), device='cpu')"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(make_tiny_bert(tmp_path))], capture_output=True, check=True
    )
    assert (ran.stdout, ran.stderr) == (b"", b"")


def test_a_token_beyond_the_embeddings_is_an_error_before_it_reaches_the_device(tmp_path: Path) -> None:
    encoder = load_encoder(make_tiny_qwen3(tmp_path / "model"), device="cpu")
    with pytest.raises(IndexError, match="beyond the model's"):
        encoder.encode([np.array([1, 10_000_000], dtype=np.int32)])
    assert np.isfinite(encoder.encode([np.array([1, 2], dtype=np.int32)])).all()


def test_an_encoder_says_how_long_each_step_of_its_load_took(tmp_path: Path) -> None:
    encoder = load_encoder(make_tiny_bert(tmp_path), device="cpu")
    assert set(encoder.phases) >= {"directory", "weights", "device", "digest", "proof"}
    assert all(seconds >= 0 for seconds in encoder.phases.values())
    assert encoder.kernels == {"attention": "torch_sdpa", "few_rows": FEW_ROWS}
