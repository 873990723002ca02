"""Where a model puts each token: rotary types that depend on a text's length, and positions that skip padding, alone and packed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedq_consumer.engine import Chunked, Encoder, Text, Tokens, load_encoder
from embedq_consumer.engine.models.any_transformers import obstacle
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.position_models import (
    LENGTH_DEPENDENT,
    ORIGINAL,
    ROBERTAS,
    ROPE_TYPES,
    ROTARY,
    make_esm,
    make_roberta,
    make_rotary,
)
from tests.model.test_parity import TOLERANCE

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

UNKNOWN = {("Phi3", kind): "rope_parameters" for kind in ROPE_TYPES if kind not in ("default", "longrope")}
"""What transformers itself does not take, and the field that its error names."""
# Short and long, around the length from which frequencies change, and the longest last but one.
TEXTS = [
    "the moon",
    "a",
    *(f"{'moon ' * n}" for n in (ORIGINAL - 8, ORIGINAL - 2, ORIGINAL - 1, ORIGINAL, ORIGINAL + 9)),
    "the moon and the stone wall " * 15,
    "the old stone wall",
    "stone " * 600,
    "",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from two threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone_by_transformers(path: Path, ids: Sequence[Ids]) -> Vectors:
    """The last token's vector of each text, by a model that has seen no other one."""
    from transformers import AutoModel

    fresh = AutoModel.from_pretrained(path, local_files_only=True).eval()
    found = []
    for text in ids:
        model = copy.deepcopy(fresh)
        with torch.inference_mode():
            row = torch.from_numpy(text.astype(np.int64)).unsqueeze(0)
            hidden = model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
        found.append(hidden[0, -1].float().numpy())
    return np.stack(found)


def served(path: Path) -> tuple[Encoder, list[Ids]]:
    encoder = load_encoder(path, device="cpu")
    return encoder, tokens_of(encoder, [Text(text, truncate="end") for text in TEXTS])


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("family", ROTARY)
def test_each_text_has_the_rotary_positions_that_it_has_alone(
    family: str, rope_type: str, tmp_path: Path
) -> None:
    if (family, rope_type) in UNKNOWN:
        with pytest.raises(Exception, match=UNKNOWN[family, rope_type]):
            make_rotary(tmp_path, family, rope_type)
        return
    encoder, ids = served(make_rotary(tmp_path, family, rope_type))
    assert encoder.max_tokens == (4 * ORIGINAL if rope_type == "dynamic" else 512)
    assert max(map(len, ids)) == encoder.max_tokens
    assert "not_packed" not in encoder.kernels
    wanted = normalized(alone_by_transformers(tmp_path, ids))
    for order in (range(len(ids)), reversed(range(len(ids)))):
        places = list(order)
        packed = normalized(encoder.encode([ids[n] for n in places]))
        assert np.abs(packed - wanted[places]).max() <= TOLERANCE
    alone = normalized(np.concatenate([encoder.encode([text]) for text in ids]))
    assert np.abs(alone - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("rope_type", sorted(LENGTH_DEPENDENT))
def test_a_short_text_is_what_sentence_transformers_gives_beside_a_long_one(
    rope_type: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    encoder, ids = served(make_rotary(tmp_path, "Llama", rope_type))
    reference = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    packed = normalized(encoder.encode(ids))
    for number in (0, 1, 8):
        assert np.abs(packed[number] - reference.encode([TEXTS[number]])[0]).max() <= TOLERANCE


@pytest.mark.parametrize("rope_type", sorted(LENGTH_DEPENDENT))
def test_windows_of_a_long_text_have_the_positions_of_their_own_length(
    rope_type: str, tmp_path: Path
) -> None:
    """Chunks run side by side, too; and a late chunk is part of a text that is as long as it is."""
    from embedq_shared.messages import Chunking

    encoder, _ = served(make_rotary(tmp_path, "Qwen3", rope_type))
    text = "the moon and the stone wall " * 30
    short, long = Text("the moon"), Text(text, chunk=Chunking(mode="late", tokens=16))
    [found] = encoder.chunk([long])
    assert isinstance(found, Chunked)
    [plain] = encoder.tokenize([short])
    assert isinstance(plain, Tokens)
    together = encoder.submit([plain, *found.windows]).result()
    apart = np.concatenate([encoder.submit([each]).result() for each in (plain, *found.windows)])
    assert np.abs(normalized(together) - normalized(apart)).max() <= TOLERANCE
    assert len(found.windows[0].ids) > ORIGINAL


class _Forgetful(torch.nn.Module):
    """A rotary module that looks at the longest position of a call in a way of its own."""

    kind = "of its own"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.rope_type = self.kind
        self.device = torch.nn.Buffer(torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] / (1 + position_ids.max() // 100) * torch.logspace(0, -3, 16)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


@pytest.mark.parametrize("kind", [_Forgetful.kind, "default", "dynamic"])
def test_positions_that_depend_on_the_call_in_an_unknown_way_are_not_packed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they say that they are: a type that never depends on it, one that does in another way."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(_Forgetful, "kind", kind)
    monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", _Forgetful)
    encoder, ids = served(make_rotary(tmp_path, "Llama", "default"))
    assert encoder.kernels["not_packed"] == (
        f"rope_type {kind}: _Forgetful depends on the longest text of a call"
    )
    wanted = normalized(alone_by_transformers(tmp_path, ids))
    assert np.abs(normalized(encoder.encode(ids)) - wanted).max() <= TOLERANCE


def test_the_proof_sees_frequencies_that_follow_the_longest_text_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what gives each text its own, such a model does not pass: a few tokens stand for a long text."""
    from embedq_consumer.engine.models import any_transformers

    monkeypatch.setattr(any_transformers, "by_text", lambda model, longest: lambda packing: None)
    encoder, _ = served(make_rotary(tmp_path, "Llama", "longrope"))
    assert encoder.kernels["not_packed"] == "packed sequences do not give the same as each one alone"


def test_what_goes_by_a_tokens_place_in_the_row_is_not_packed() -> None:
    """Llama 4's attention counts the call's tokens, in steps of 8,192: no short probe could tell."""
    from transformers import Llama4TextConfig

    layers: Any = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    for tuned in (True, False):
        model = SimpleNamespace(config=Llama4TextConfig(attn_temperature_tuning=tuned, **layers))
        assert (obstacle(model) is not None) == tuned


# -- positions that skip padding ---------------------------------------------------------------------------------------

SPELLED = [
    "the moon [PAD] is round",
    "[PAD]",
    "[PAD] [PAD] stone wall",
    "the old stone wall [PAD]",
    "[MASK] the [UNK] moon [SEP] [CLS] [PAD] [PAD] water",
    "the moon is round",
    "stone wall " * 50 + "[PAD] " + "water " * 50,
]


@pytest.mark.parametrize("family", ROBERTAS)
def test_a_text_that_spells_the_padding_is_what_sentence_transformers_makes_of_it(
    family: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(make_roberta(tmp_path, family), device="cpu")
    # By length, transformers counts the positions itself: that is right, too, but slow.
    assert "not_packed" not in encoder.kernels
    reference = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    ids = tokens_of(encoder, [Text(text, truncate="end") for text in SPELLED])
    assert sum(int((text == 0).sum()) for text in ids) == 8
    wanted = np.stack([reference.encode([text])[0] for text in SPELLED])
    together = normalized(encoder.encode(ids))
    apart = normalized(np.concatenate([encoder.encode([text]) for text in ids]))
    assert np.abs(together - wanted).max() <= TOLERANCE
    assert np.abs(apart - wanted).max() <= TOLERANCE


def test_special_tokens_that_change_what_stands_beside_them_are_seen_by_the_proof(tmp_path: Path) -> None:
    """ESM scales a call's embeddings by its share of masked tokens, which a packed row mixes."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(make_esm(tmp_path), device="cpu")
    assert "not_packed" in encoder.kernels
    reference = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    ids = tokens_of(encoder, [Text(text, truncate="end") for text in SPELLED])
    wanted = np.stack([reference.encode([text])[0] for text in SPELLED])
    assert np.abs(normalized(encoder.encode(ids)) - wanted).max() <= TOLERANCE
