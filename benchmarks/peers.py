"""Other engines over the same token ids: transformers with padding, as sentence-transformers runs it, and vLLM where installed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

PADDED_TOKENS = 65_536
"""Of one padded batch at most, or the longest texts would not fit."""


def reference(path: Path, texts: Sequence[Ids]) -> Vectors:
    """Unit vectors of transformers' own forward of each text alone, in bf16: float32 (texts, hidden_size)."""
    model = _transformers(path)
    found = []
    with torch.inference_mode():
        for ids in texts:
            row = torch.from_numpy(ids.astype(np.int64)).to(model.device).unsqueeze(0)
            found.append(model(input_ids=row).last_hidden_state[0, -1].float())
    return unit(torch.stack(found).cpu().numpy())


def padded(path: Path, texts: Sequence[Ids]) -> tuple[float, Vectors]:
    """sentence-transformers' way: sorted by length, 32 at a time (fewer of long ones), padded; (seconds, vectors)."""
    model = _transformers(path)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)

    def run(part: Sequence[int]) -> None:
        width = max(len(texts[i]) for i in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for row, i in enumerate(part):
            ids[row, width - len(texts[i]) :] = torch.from_numpy(texts[i].astype(np.int64))
            mask[row, width - len(texts[i]) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        vectors[list(part)] = hidden.float().cpu().numpy()

    together = max(1, min(32, PADDED_TOKENS // max(len(ids) for ids in texts)))
    parts = [order[i : i + together] for i in range(0, len(order), together)]
    with torch.inference_mode():
        run(parts[0])
        begin = time.perf_counter()
        for part in parts:
            run(part)
    return time.perf_counter() - begin, vectors


def has_vllm() -> bool:
    """Whether vLLM can be measured here."""
    return find_spec("vllm") is not None


def vllm(path: Path, texts: Sequence[Ids], *, quantization: str | None = None) -> tuple[float, Vectors]:
    """vLLM's own offline call, `LLM.embed`, over the same ids; (seconds, vectors)."""
    from vllm import LLM  # type: ignore[import-not-found]

    engine: Any = LLM(model=str(path), runner="pooling", dtype="bfloat16", quantization=quantization)
    prompts = [{"prompt_token_ids": ids.tolist()} for ids in texts]
    engine.embed(prompts[:64], use_tqdm=False)
    begin = time.perf_counter()
    outputs = engine.embed(prompts, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return seconds, np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


def unit(vectors: Vectors) -> Vectors:
    """Each divided by its length."""
    lengths: Vectors = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def _transformers(path: Path) -> Any:
    from transformers import AutoModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModel.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).to(device).eval()
