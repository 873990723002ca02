"""Qwen3's forward with shared prefixes against the same forward of whole texts, in Triton's interpreter.

Everything is what runs on the GPU but attention, which is its definition here: the layout, the kernels, the layers.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("test_prefix_gpu.py shows it on the device", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read as kernels are defined, Triton's own among them
pytest.importorskip("triton")

from embedq_consumer.engine.cuda_graphs import Row, Shared, fill, fill_shared, input_length, shared_length
from embedq_consumer.engine.models import qwen3_cuda as qwen3
from embedq_consumer.engine.prefix_cache import MARGIN

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's overflow, in the interpreter

Ids = npt.NDArray[np.int32]
SIZE, ROOMS = 32, 16
NONE: Ids = np.empty(0, dtype=np.int32)


def attention_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    longest: int,
    scale: float,
    cu_q: Tensor | None = None,
    longest_q: int = 1,
) -> Tensor:
    """Causal, aligned at the end: a text's last query sees all of its keys."""
    out = torch.zeros_like(q)
    queries = cu if cu_q is None else cu_q
    group = q.shape[1] // k.shape[1]
    for place in range(len(cu) - 1):
        rows, keys = slice(queries[place], queries[place + 1]), slice(cu[place], cu[place + 1])
        count, length = rows.stop - rows.start, keys.stop - keys.start
        assert count <= (longest if cu_q is None else longest_q)
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
        model = Qwen3Model(config).to(torch.bfloat16).eval().requires_grad_(False)
        self.norm = model.norm.weight.detach()
        self.qwen = qwen3.PackedQwen3(model)
        self.pool = self.qwen.prefix_pool(64)

    @torch.inference_mode()
    def __call__(
        self, texts: list[Ids], prefixes: list[Ids] | None = None, kept: Ids | None = None
    ) -> Tensor:
        """Unit vectors of `texts`, of which the first tokens are read from these rows of the pool."""
        prefixes = prefixes or [NONE] * len(texts)
        own = [text[len(rows) :] for text, rows in zip(texts, prefixes, strict=True)]
        lengths = np.array([len(ids) for ids in own], dtype=np.int32)
        room = 4 * SIZE + MARGIN
        inputs = np.zeros(shared_length(SIZE, ROOMS, room), dtype=np.int32)
        plain = input_length(SIZE, ROOMS)
        fill(inputs[:plain], own, lengths, SIZE, ROOMS)
        shared = None
        if kept is not None or any(map(len, prefixes)):
            fill_shared(inputs, prefixes, lengths, kept, SIZE, ROOMS)
            begin = -(-plain // 16) * 16
            parts = torch.from_numpy(inputs)
            moves = parts[begin + 48 :].view(-1, 2)
            shared = Shared(
                self.pool, parts[begin : begin + 17], parts[begin + 32 : begin + 33], moves, 4 * SIZE
            )
        ids, positions, last, cu = torch.split(
            torch.from_numpy(inputs[:plain]), [SIZE, SIZE, ROOMS, ROOMS + 1]
        )
        out = torch.empty(ROOMS, 64)
        self.qwen.pooled(Row(ids, positions, cu, last, shared), SIZE, self.norm, out)
        return F.normalize(out[: len(texts)])


@pytest.fixture(scope="module")
def forward() -> Forward:
    patch = pytest.MonkeyPatch()
    patch.setattr(qwen3, "cuda_kernel", lambda *_: attention_by_definition)
    made = Forward()
    patch.undo()
    return made


def test_texts_behind_shared_prefixes_have_the_vectors_of_whole_texts(forward: Forward) -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 300, 8).astype(np.int32) for _ in range(2))
    rows = np.array([5, 3, 60, 9, 10, 40, 2, 7], dtype=np.int32)
    other = np.array([20, 21, 22, 23, 24, 25, 26, 27], dtype=np.int32)
    forward([first], kept=rows)
    forward([second], kept=other)
    own = [random.integers(0, 300, n).astype(np.int32) for n in (2, 1, 3, 2)]
    texts = [np.concatenate([first, ids]) for ids in own[:2]]
    texts += [np.concatenate([second, own[2]]), own[3]]
    prefixes = [rows, rows, other, NONE]
    wanted = forward(texts)
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        found = forward([texts[i] for i in order], [prefixes[i] for i in order])
        cosines = (found * wanted[order]).sum(dim=1)
        assert float(cosines.min()) >= 0.9999, (order, cosines)
    # What is read is the prefix: another one's keys and values give other vectors.
    mistaken = (forward(texts, [other, other, rows, NONE]) * wanted).sum(dim=1)
    assert float(mistaken[:3].max()) < 0.99 <= float(mistaken[3])
