"""Architectures beyond BERT and Qwen3, through the general path, against sentence-transformers on the same directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_consumer.engine import Encoder, ModelError, Text, load_encoder
from embedq_consumer.engine.kernels.attention import SPARE_ROWS, Packing, attend_runs
from embedq_consumer.engine.loading.dry_run_process import try_directory
from embedq_consumer.engine.model_directory import read_directory
from tests.architectures.sweep import judge
from tests.helpers.architectures import LONG_TEXTS, MAKERS, make_embeddinggemma
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_gemma3, make_tiny_t5
from tests.model.test_parity import TOLERANCE


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def encoder(path: Path) -> Encoder:
    return load_encoder(path, device="cpu")


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


def test_a_mixed_batch_gives_what_sentence_transformers_gives(encoder: Encoder, reference: Any) -> None:
    ids = tokens_of(encoder, [Text(text, truncate="end") for text in LONG_TEXTS])
    assert max(len(i) for i in ids) == encoder.max_tokens == reference.max_seq_length
    vectors = encoder.encode(ids)
    expected = reference.encode(LONG_TEXTS)
    assert vectors.shape == expected.shape == (len(LONG_TEXTS), encoder.hidden_size)
    for dimensions in (32, None):
        difference = np.abs(normalized(vectors, dimensions) - normalized(expected, dimensions)).max()
        assert difference <= TOLERANCE, dimensions


def test_what_can_be_packed_is_packed(path: Path, encoder: Encoder) -> None:
    # T5's attention cannot be replaced: its texts run by length.
    assert encoder.kernels["attention"] == ("by_length" if path.name == "t5" else "torch_sdpa")


def test_a_text_gives_the_same_alone_and_packed_in_every_position(encoder: Encoder) -> None:
    for text in ("the old stone wall", "the old stone wall " * 30):
        neighbors = (*LONG_TEXTS[:4], *LONG_TEXTS[-4:-1])
        wanted, *others = tokens_of(encoder, [Text(t, truncate="end") for t in (text, *neighbors)])
        alone = normalized(encoder.encode([wanted]))[0]
        for position in range(len(others) + 1):
            packed = normalized(encoder.encode([*others[:position], wanted, *others[position:]]))
            assert np.abs(packed[position] - alone).max() <= TOLERANCE, position


def test_prompts_give_what_sentence_transformers_gives(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    path = make_embeddinggemma(tmp_path)
    encoder = load_encoder(path, device="cpu")
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    assert dict(encoder.prompts) == reference.prompts
    texts = ["how far is the moon?", "the old stone wall " * 20]
    for kind, encode in (("query", reference.encode_query), ("document", reference.encode_document)):
        vectors = encoder.encode(tokens_of(encoder, [Text(text, encoder.prompts[kind]) for text in texts]))
        assert np.abs(normalized(vectors) - encode(texts)).max() <= TOLERANCE


# -- attention in a window --------------------------------------------------------------------------------------------


def everything_at_once(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int, softcap: float | None
) -> Any:
    """Attention of one text (tokens, heads, head_dim) with its whole matrix of scores."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    distance = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
    hidden = distance.abs() >= window
    if causal:
        hidden |= distance < 0
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700) | st.integers(1, 40), min_size=1, max_size=4),
    window=st.integers(1, 300) | st.sampled_from([1, 2, 255, 256, 257]),
    causal=st.booleans(),
    softcap=st.none() | st.sampled_from([0.5, 50.0]),
)
def test_attention_by_bands_is_attention_with_the_whole_mask(
    lengths: list[int], window: int, causal: bool, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    out = torch.empty_like(q)
    packing = Packing.of(lengths, torch.device("cpu"))
    attend_runs(q, k, v, out, packing.runs, causal=causal, scale=8**-0.5, window=window, softcap=softcap)
    texts = zip(torch.split(q, lengths), torch.split(k, lengths), torch.split(v, lengths), strict=True)
    expected = torch.cat([everything_at_once(*text, causal, window, softcap) for text in texts])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(1, 200), min_size=1, max_size=5),
    spare=st.sampled_from([SPARE_ROWS, SPARE_ROWS + 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
)
def test_spare_rows_behind_the_keys_change_nothing(
    lengths: list[int], spare: int, dtype: torch.dtype, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens + spare, 4, 32, generator=generator).to(dtype) for _ in range(3))

    def bias(length: int) -> torch.Tensor:
        return torch.randn(4, length, length, generator=torch.Generator().manual_seed(length)).to(dtype)

    runs = Packing.of(sorted(lengths), torch.device("cpu")).runs
    found, expected = torch.empty(2, tokens, 4, 32, dtype=dtype)
    for out, keys in ((found, tokens + spare), (expected, tokens)):
        attend_runs(
            *(q[:tokens], k[:keys], v[:keys], out, runs),
            causal=False,
            scale=32**-0.5,
            bias=bias if biased else None,
        )
    close = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(found, expected, atol=close, rtol=close)


# -- Dense modules ----------------------------------------------------------------------------------------------------


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_length_of_a_vector_is_the_last_dense_modules(tmp_path: Path) -> None:
    assert load_encoder(make_embeddinggemma(tmp_path), device="cpu").hidden_size == 96


def test_dense_modules_count_for_the_model_version(tmp_path: Path) -> None:
    shapes: list[Any] = [[], [(128, "Identity", False)], [(128, "Tanh", False)], [(128, "Tanh", True)]]
    made = [make_tiny_gemma3(tmp_path / str(n), dense=shape) for n, shape in enumerate(shapes)]
    versions = [load_encoder(path, device="cpu").model_version for path in made]
    assert len(set(versions)) == len(versions)
    other = tmp_path / "1" / "2_Dense" / "model.safetensors"
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert load_encoder(made[1], device="cpu").model_version not in versions


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another activation": (
        lambda path: edit(
            path / "2_Dense/config.json", activation_function="torch.nn.modules.activation.ReLU"
        ),
        "activation_function: .*ReLU",
    ),
    "token embeddings": (
        lambda path: edit(path / "2_Dense/config.json", module_input_name="token_embeddings"),
        "module_input_name: .*token_embeddings",
    ),
    "a residual": (lambda path: edit(path / "2_Dense/config.json", use_residual=True), "use_residual"),
    "a width that is not the weights'": (
        lambda path: edit(path / "2_Dense/config.json", out_features=77),
        r"2_Dense/model\.safetensors: expected tensors of the shapes",
    ),
    "a bias that is not there": (
        lambda path: edit(path / "2_Dense/config.json", bias=True),
        r"2_Dense/model\.safetensors: expected tensors of the shapes",
    ),
    "no weights": (
        lambda path: (path / "3_Dense/model.safetensors").unlink(),
        r"3_Dense/model\.safetensors: missing",
    ),
    "widths that do not meet": (
        lambda path: shutil.copytree(path / "2_Dense", path / "3_Dense", dirs_exist_ok=True),
        r"3_Dense/config\.json: in_features is 128, but the Dense module before it gives 192",
    ),
    "a width that is not the pooling's": (
        lambda path: shutil.copytree(path / "3_Dense", path / "2_Dense", dirs_exist_ok=True),
        "in_features|first Dense module takes 192",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_dense_module_that_is_not_ours_to_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    path = make_embeddinggemma(tmp_path)
    change(path)
    with pytest.raises(ModelError, match=message):
        load_encoder(path, device="cpu")


def test_the_first_dense_module_must_take_what_the_pooling_gives(tmp_path: Path) -> None:
    path = make_tiny_gemma3(tmp_path / "a", dense=[(64, "Identity", False)])
    other = make_tiny_gemma3(tmp_path / "b", dense=[(96, "Identity", False), (64, "Identity", False)])
    shutil.copytree(other / "3_Dense", path / "2_Dense", dirs_exist_ok=True)
    with pytest.raises(
        ModelError, match=r"mean pooling gives 128 components, but the first Dense module takes 96"
    ):
        load_encoder(path, device="cpu")


def test_a_dense_module_after_the_normalizing_is_refused(tmp_path: Path) -> None:
    path = make_tiny_gemma3(tmp_path, dense=[(64, "Identity", False)])
    entries = json.loads((path / "modules.json").read_text())
    entries[2:] = reversed(entries[2:])
    (path / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError, match=r"modules\.json: expected a Transformer"):
        load_encoder(path, device="cpu")


# -- what cannot be packed ---------------------------------------------------------------------------------------------


def test_layers_of_an_unknown_kind_are_refused_by_name(tmp_path: Path) -> None:
    path = make_tiny_gemma3(tmp_path)
    edit(path / "config.json", layer_types=["chunked_attention"] * 4)
    with pytest.raises(ModelError, match=r"config\.json: .*chunked_attention"):
        load_encoder(path, device="cpu")


def test_layers_that_mix_tokens_in_another_way_than_attention_run_by_length(tmp_path: Path) -> None:
    found = judge("lfm2", tmp_path, layer_types=["conv", "full_attention", "conv"])
    assert found.verdict == "served"
    assert "'not_packed': 'layer_types: conv'" in found.detail


def test_token_types_that_the_model_would_not_get_are_refused(tmp_path: Path) -> None:
    path = make_tiny_bert(tmp_path)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"]["single"][0]["SpecialToken"]["type_id"] = 1
    file.write_text(json.dumps(tokenizer))
    edit(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: post_processor: expected tokens of type 0 alone, got 1"
    ):
        load_encoder(path, device="cpu")
    edit(path / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    load_encoder(path, device="cpu").close()


def test_an_encoder_is_taken_out_of_a_whole_encoder_decoder(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    path = make_tiny_t5(tmp_path, whole=True)
    try_directory(read_directory(path))
    encoder = load_encoder(path, device="cpu")
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    found = normalized(encoder.encode(tokens_of(encoder, ["the moon", "a stone wall"])))
    assert np.abs(found - reference.encode(["the moon", "a stone wall"])).max() <= TOLERANCE


def test_a_checkpoint_of_the_encoder_alone_passes_the_dry_run(tmp_path: Path) -> None:
    path = make_tiny_t5(tmp_path)
    try_directory(read_directory(path))
    load_encoder(path, device="cpu").close()


def test_how_much_of_a_text_is_fed_forward_at_once_changes_nothing(tmp_path: Path) -> None:
    """transformers fails on a text whose length that number does not divide."""
    path = make_tiny_bert(tmp_path)
    before = load_encoder(path, device="cpu")
    ids = tokens_of(before, LONG_TEXTS[:4])
    for activation, wanted in (("gelu", before.encode(ids)), ("gelu_new", None)):
        edit(path / "config.json", chunk_size_feed_forward=7, hidden_act=activation)
        found = load_encoder(path, device="cpu").encode(ids)
        assert wanted is None or np.abs(normalized(found) - normalized(wanted)).max() <= TOLERANCE
