"""What each model gives for the run's texts, computed once by sentence-transformers, and the version that embedq gives it.

    python -m tests.faults.reference MODEL TEXTS.json OUT.npz

A program of its own, so that the harness need not hold PyTorch beside three brokers and three workers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.helpers.support import patient

Vectors = npt.NDArray[np.float32]


def expected(models: Sequence[Path], texts: Sequence[str], directory: Path) -> dict[str, Vectors]:
    """Vectors of all texts, float32 (texts, hidden), by model version. `directory` takes the files in between."""
    given = directory / "texts.json"
    given.write_text(json.dumps(list(texts)))
    found = {}
    for model in models:
        out = directory / f"{model.name}.npz"
        subprocess.run(
            [sys.executable, "-m", __name__, str(model), str(given), str(out)],
            check=True,
            timeout=patient(300),
        )
        with np.load(out) as arrays:
            found[str(arrays["version"])] = arrays["vectors"]
    return found


def main(arguments: Sequence[str]) -> None:
    """Compute one model's vectors."""
    from sentence_transformers import SentenceTransformer

    from embedq_consumer.engine import load_encoder

    model, texts, out = map(Path, arguments)
    reference = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    vectors = reference.encode(json.loads(texts.read_text()), batch_size=64, show_progress_bar=False)
    encoder = load_encoder(model, device="cpu", threads=1)
    np.savez(out, vectors=vectors.astype(np.float32), version=np.array(encoder.model_version))
    encoder.close()


if __name__ == "__main__":
    main(sys.argv[1:])
