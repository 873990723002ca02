"""One way to embed, in a process of its own: `python -m benchmarks.peer_process WAY MODEL` answers lines of texts with lines of vectors.

Only what the way itself needs is imported, so that it can run in an environment without embedq.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

REFERENCE: Final = "sentence-transformers torch"
NEEDS: Final = {
    REFERENCE: "sentence_transformers",
    "sentence-transformers onnx": "optimum.onnxruntime",
    "sentence-transformers openvino": "optimum.intel",
    "sentence-transformers openvino float32": "optimum.intel",
    "infinity": "infinity_emb",
    "embedq, encoder alone": "embedq_consumer",
    "embedq, encoder alone, bf16": "embedq_consumer",
}
"""The ways, and the package that each needs. OpenVINO by itself computes in bfloat16 where the processor has AMX."""


def serve(way: str, model: str) -> None:
    """Answer each line of standard input, a JSON list of texts, with a line of vectors."""
    answers, sys.stdout = sys.stdout, sys.stderr  # some say on the screen what they do
    embed = _loaded(way, model)
    for line in sys.stdin:
        print(json.dumps(np.asarray(embed(json.loads(line))).tolist()), file=answers, flush=True)


def _loaded(way: str, model: str) -> Callable[[list[str]], Any]:
    if way.startswith("embedq"):
        from benchmarks.encoder_cpu import embed
        from embedq_consumer.engine import default_batch_tokens, load_encoder
        from embedq_consumer.engine.safety.heaps import keep_for_reuse

        quantization: Any = "bf16" if way.endswith("bf16") else "none"
        encoder = load_encoder(Path(model), device="cpu", quantization=quantization)
        keep_for_reuse()  # as the service does
        return lambda texts: embed(encoder, texts, default_batch_tokens("cpu", quantization=quantization))
    if way == "infinity":
        return _infinity(model)
    from sentence_transformers import SentenceTransformer

    backend: Any = way.split()[1]
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}} if way.endswith("float32") else None
    made: Any = SentenceTransformer(model, device="cpu", backend=backend, model_kwargs=options)
    return lambda texts: made.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def _infinity(model: str) -> Callable[[list[str]], Any]:
    engine_module = importlib.import_module("infinity_emb")
    arguments = engine_module.EngineArgs(
        model_name_or_path=model,
        engine="torch",
        device="cpu",
        pooling_method="mean",
        lengths_via_tokenize=True,
    )
    engine = engine_module.AsyncEmbeddingEngine.from_args(arguments)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    def embed(texts: list[str]) -> Any:
        vectors, _ = loop.run_until_complete(engine.embed(sentences=texts))
        return np.asarray(vectors)

    return embed


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
