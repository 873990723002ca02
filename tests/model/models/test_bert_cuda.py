"""The forward written for BERT on CUDA, run on the CPU in Triton's interpreter, against transformers' own in float32.

Attention is the one part that has no kernel there: PyTorch's own takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from benchmarks.texts import varied
from embedq_consumer.engine import load_encoder
from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.kernels.fp8 import in_fp8
from embedq_consumer.engine.models.bert_cuda import PackedBertCuda
from embedq_consumer.engine.models.traits import ForwardOptions, Limits
from embedq_consumer.engine.pooling import POOLINGS, pooling_of
from embedq_consumer.engine.row import Row, input_length, pack_row, split_row
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import minilm_path
from tests.model.test_pooling import DEFINITIONS

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_bert.py runs it for real"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's overflow, in the interpreter
]

HIDDEN, HEADS, LONGEST = 64, 2, 40
LENGTHS = [3, 1, 5, 34]
SIZE = 48


def model_of(kind: str, activation: str) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        max_position_embeddings=LONGEST + 2,
        hidden_act=activation,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("LayerNorm.weight"):
            parameter.data = 1 + 0.1 * noise
        else:
            parameter.data = noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.1 * noise
    return model.eval().requires_grad_(False)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slot by slot, as flash attention's kernels define it."""
    assert longest <= LONGEST
    out = torch.zeros(q.shape, dtype=q.dtype)
    ends, q_ends = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_q is None else cu_seqlens_q).tolist()
    for slot in range(len(ends) - 1):
        keys, queries = slice(ends[slot], ends[slot + 1]), slice(q_ends[slot], q_ends[slot + 1])
        if keys.start < keys.stop:
            q1, k1, v1 = (t.float().transpose(0, 1) for t in (q[queries], k[keys], v[keys]))
            out[queries] = F.scaled_dot_product_attention(q1, k1, v1, scale=scale).transpose(0, 1).to(q.dtype)
    return out


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 60, (n,), generator=generator, dtype=torch.int32) for n in LENGTHS]


def row_of(sequences: Sequence[torch.Tensor], size: int, slots: int, padding: int | None = None) -> Row:
    inputs = np.zeros(input_length(size, slots), dtype=np.int32)
    lengths = np.array([len(ids) for ids in sequences], dtype=np.int32)
    pack_row(inputs, [ids.numpy() for ids in sequences], lengths, size, slots, padding)
    return split_row(torch.from_numpy(inputs), size, slots, None, 0, 0)


# More than six: what a forward is used for, each by its own name.
def options(
    pooling: str = "mean",
    max_tokens: int = LONGEST,
    offset: int = 0,
    padding: int | None = None,
    **fields: Any,
) -> ForwardOptions:
    limits = Limits(max_tokens=max_tokens, position_offset=offset, padding=padding)
    return ForwardOptions(pooling=pooling_of(pooling.split("+")), limits=limits, **fields)


def test_a_text_that_spells_the_padding_is_what_transformers_makes_of_it() -> None:
    """Such tokens stand at the padding's position, and those after them are counted without them."""
    model = model_of("XLMRoberta", "gelu")
    padding = int(model.config.pad_token_id)
    spelled = [*texts(), torch.tensor([5, padding, 6, padding, padding, 7], dtype=torch.int32)]
    spelled[2][-1] = padding
    wanted = [model(input_ids=ids.long()[None]).last_hidden_state[0] for ids in spelled]
    used = options("mean", offset=padding + 1, padding=padding)
    forward = PackedBertCuda(model.bfloat16(), used, attention=attend)
    out = torch.full((16, HIDDEN), float("nan"))
    forward.pooled().run(row_of(spelled, SIZE + 8, 16, padding), SIZE + 8, out)
    expected = torch.stack([x.mean(0) for x in wanted])
    assert F.cosine_similarity(out[: len(spelled)], expected, dim=1).min() > 0.999


SEVERAL = "mean+lasttoken+weightedmean"


@pytest.mark.parametrize(
    ("kind", "activation", "offset", "pooling"),
    [
        *(("Bert", "gelu", 0, pooling) for pooling in [*POOLINGS, SEVERAL]),
        # What the families differ in comes before the pooling; what is picked has an attention of its own.
        *(("XLMRoberta", "gelu", 2, pooling) for pooling in ("cls", SEVERAL)),
        *(("Roberta", "gelu_new", 2, pooling) for pooling in ("lasttoken", SEVERAL)),
    ],
)
def test_pooled_and_hidden_states_are_those_of_transformers(
    kind: str, activation: str, offset: int, pooling: str
) -> None:
    model = model_of(kind, activation)
    wanted = [model(input_ids=ids.long()[None]).last_hidden_state[0] for ids in texts()]
    forward = PackedBertCuda(model.bfloat16(), options(pooling, offset=offset), attention=attend)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]) + offset
    hidden = forward(torch.cat(texts()), positions, Packing.of(LENGTHS, torch.device("cpu")))
    assert hidden.dtype == torch.float32
    assert F.cosine_similarity(hidden, torch.cat(wanted), dim=1).min() > 0.999
    pooled = forward.pooled()
    out = torch.full((16, pooled.hidden_size), float("nan"))
    pooled.run(row_of(texts(), SIZE, 16), SIZE, out)
    expected = torch.stack([torch.cat([DEFINITIONS[name](x) for name in pooling.split("+")]) for x in wanted])
    assert F.cosine_similarity(out[: len(LENGTHS)], expected, dim=1).min() > 0.9995
    assert out.isfinite().all()


@pytest.mark.parametrize(("quantized", "least"), [(False, 0.9995), (True, 0.99)])
def test_a_trained_model_keeps_its_vectors(quantized: bool, least: float) -> None:
    """In FP8 by less than on a GPU: the interpreter cuts numbers where the device rounds them."""
    from transformers import AutoModel

    encoder = load_encoder(minilm_path(), device="cpu")
    # Short ones: the interpreter takes its time for each token.
    ids = tokens_of(encoder, sorted(varied(40), key=len)[:4])
    size = 16 * -(-sum(map(len, ids)) // 16)
    assert size <= 64
    model = AutoModel.from_pretrained(minilm_path(), dtype=torch.bfloat16)
    forward = PackedBertCuda(model, options(max_tokens=256, quantized=quantized), attention=attend)
    out = torch.empty(16, 384)
    forward.pooled().run(row_of([torch.from_numpy(each) for each in ids], size, 16), LONGEST, out)
    cosines = (normalized(out[: len(ids)].numpy()) * normalized(encoder.encode(ids))).sum(axis=1)
    assert cosines.min() >= least


def test_kept_layers_have_no_product_in_fp8() -> None:
    forward = PackedBertCuda(
        model_of("Bert", "gelu").bfloat16(),
        options(quantized=True, keep_bf16=frozenset({0, 2})),
        attention=attend,
    )
    assert [in_fp8(layer.down) for layer in forward._layers] == [False, True, False]
    out = torch.empty(16, HIDDEN)
    forward.pooled().run(row_of(texts(), SIZE, 16), SIZE, out)
    assert out.isfinite().all()
