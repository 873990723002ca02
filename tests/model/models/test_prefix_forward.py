"""Qwen3's forward with shared prefixes against the same forward of whole texts, in Triton's interpreter.

Everything is what runs on the GPU but attention, which is its definition here: the layout, the kernels, the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_prefix.py shows it on the device", allow_module_level=True)
pytest.importorskip("triton")

from embedq_consumer.engine import row as row_module
from embedq_consumer.engine.kernels import fused_ops
from embedq_consumer.engine.models import qwen3_cuda as qwen3
from embedq_consumer.engine.models.traits import ForwardOptions, Limits
from embedq_consumer.engine.pooling import POOLINGS
from embedq_consumer.engine.row import input_length, pack_prefixes, pack_row, shared_length, split_row

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's overflow, in the interpreter

Ids = npt.NDArray[np.int32]
SLOTS = 8
MARGIN = 8
"""Of zeros; attention by its definition reads none of them."""
NONE: Ids = np.empty(0, dtype=np.int32)


def attention_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    longest_q: int = 1,
) -> Tensor:
    """Causal, aligned at the end: a text's last query sees all of its keys."""
    out = torch.zeros_like(q)
    ends = cu_seqlens.tolist()
    query_ends = ends if cu_seqlens_q is None else cu_seqlens_q.tolist()
    group = q.shape[1] // k.shape[1]
    for slot in range(len(ends) - 1):
        rows, keys = slice(query_ends[slot], query_ends[slot + 1]), slice(ends[slot], ends[slot + 1])
        count, length = rows.stop - rows.start, keys.stop - keys.start
        assert count <= (longest if cu_seqlens_q is None else longest_q)
        assert length <= longest
        if not count:
            continue
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        k1, v1 = (t[keys].repeat_interleave(group, dim=1).transpose(0, 1).float() for t in (k, v))
        part = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1).float(), k1, v1, attn_mask=seen, scale=scale
        )
        out[rows] = part.transpose(0, 1).to(out.dtype)
    return out


class Forward:
    """PackedQwen3 of random weights on the CPU, and a pool of prefixes."""

    def __init__(self) -> None:
        from transformers import Qwen3Config, Qwen3Model

        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
        )
        model: Any = Qwen3Model(config)
        model = model.bfloat16().eval().requires_grad_(False)
        options = ForwardOptions(
            pooling=POOLINGS["lasttoken"],
            limits=Limits(max_tokens=256, position_offset=0),
            last_norm=model.norm.weight.detach(),
        )
        pooled = qwen3.PackedQwen3(model, options).pooled()
        assert pooled is not None
        assert pooled.prefix_pool is not None
        self.run = pooled.run
        self.pool = pooled.prefix_pool(64)

    @torch.inference_mode()
    def __call__(
        self, texts: list[Ids], prefixes: list[Ids] | None = None, saved_rows: Ids | None = None
    ) -> Tensor:
        """Unit vectors of `texts`, of which the first tokens are read from these rows of the pool."""
        prefixes = prefixes or [NONE] * len(texts)
        own = [text[len(rows) :] for text, rows in zip(texts, prefixes, strict=True)]
        lengths = np.array([len(ids) for ids in own], dtype=np.int32)
        shared = saved_rows is not None or any(map(len, prefixes))
        size = 12 if shared else 34  # the interpreter takes its time for each token
        room = 128 + MARGIN
        inputs = np.zeros(shared_length(size, SLOTS, room), dtype=np.int32)
        pack_row(inputs[: input_length(size, SLOTS)], own, lengths, size, SLOTS)
        if shared:
            pack_prefixes(inputs, prefixes, lengths, saved_rows, size, SLOTS)
        row = split_row(torch.from_numpy(inputs), size, SLOTS, self.pool, 96, room if shared else 0)
        out = torch.empty(SLOTS, 64)
        self.run(row, size, out)
        return F.normalize(out[: len(texts)])


@pytest.fixture(scope="module")
def forward() -> Iterator[Forward]:
    patch = pytest.MonkeyPatch()
    patch.setattr(qwen3, "cuda_kernel", lambda *_: attention_by_definition)
    made = Forward()
    patch.undo()
    # The interpreter takes its time for each program, also for those to which no row is left.
    patch.setattr(fused_ops, "_COPY_PROGRAMS", 8)
    patch.setattr(row_module, "MARGIN", MARGIN)
    yield made
    patch.undo()


def test_texts_after_shared_prefixes_have_the_vectors_of_whole_texts(forward: Forward) -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 300, 8).astype(np.int32) for _ in range(2))
    rows = np.array([5, 3, 60, 9, 10, 40, 2, 7], dtype=np.int32)
    other = np.array([20, 21, 22, 23, 24, 25, 26, 27], dtype=np.int32)
    forward([first], saved_rows=rows)
    forward([second], saved_rows=other)
    own = [random.integers(0, 300, n).astype(np.int32) for n in (2, 1, 3, 2)]
    texts = [np.concatenate([first, ids]) for ids in own[:2]]
    texts += [np.concatenate([second, own[2]]), own[3]]
    prefixes = [rows, rows, other, NONE]
    wanted = forward(texts)
    order = [3, 2, 0, 1]
    found = forward([texts[i] for i in order], [prefixes[i] for i in order])
    cosines = (found * wanted[order]).sum(dim=1)
    assert float(cosines.min()) >= 0.9999, cosines
    # What is read is the prefix: another one's keys and values give other vectors.
    mistaken = (forward(texts, [other, other, rows, NONE]) * wanted).sum(dim=1)
    assert float(mistaken[:3].max()) < 0.99 <= float(mistaken[3])


def test_a_prefix_may_read_a_shorter_one_as_it_is_saved(forward: Forward) -> None:
    random = np.random.default_rng(1)
    longer = random.integers(0, 300, 10).astype(np.int32)
    rows = random.permutation(np.arange(1, 64, dtype=np.int32))[:10]
    forward([longer[:6]], saved_rows=rows[:6])
    forward([longer], [rows[:6]], saved_rows=rows[6:])
    texts = [
        np.concatenate([longer[:count], random.integers(0, 300, own).astype(np.int32)])
        for count, own in ((10, 1), (10, 2), (6, 3))
    ]
    cosines = (forward(texts, [rows, rows, rows[:6]]) * forward(texts)).sum(dim=1)
    assert float(cosines.min()) >= 0.9999, cosines
