"""A model that serves is no longer its files: they may be written over or cut short in place, and no vector changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.architectures import MAKERS, make_embeddinggemma
from tests.helpers.position_models import make_roberta
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3

_SERVES = """
import os, sys, threading
from pathlib import Path
import numpy as np
from embedq_consumer.engine import Text, load_encoder

root, known = Path(sys.argv[1]), Path(sys.argv[2])
encoders, again = [], []
for directory in sorted(root.iterdir()):
    before = len(list(known.glob("*.model")))
    encoders.append(load_encoder(directory, device="cpu", known_models=known))
    if len(list(known.glob("*.model"))) > before:
        again.append(directory)
# The second time without transformers, whose answers are cached.
encoders += [load_encoder(each, device="cpu", known_models=known) for each in again]
texts = [Text("the moon"), Text("the old stone wall " * 30, truncate="end")]

def vectors():
    return [encoder.submit(encoder.tokenize(texts)).result() for encoder in encoders]

before = vectors()
maps = Path("/proc/self/maps")
mapped = [line for line in maps.read_text().splitlines() if str(root) in line or str(known) in line] if maps.exists() else []
assert not mapped, mapped
rounds, over = [], threading.Event()

def compute():
    while not (over.is_set() and rounds):
        rounds.append(all(np.array_equal(*each) for each in zip(before, vectors())))

thread = threading.Thread(target=compute)
thread.start()
files = [file for folder in (root, known) for file in folder.rglob("*") if file.is_file()]
assert any(file.name == "model.safetensors" for file in files)
for file in files:
    with file.open("r+b") as opened:
        opened.write(os.urandom(file.stat().st_size))
for file in files:
    os.truncate(file, 0)
over.set()
thread.join()
assert all(rounds), rounds
assert all(np.array_equal(*each) for each in zip(before, vectors()))
print("held", len(encoders), "of which again", len(again))
"""


def test_models_serve_the_same_while_their_files_are_written_over_and_cut_short(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for name in ("modernbert", "mpnet", "deberta-v3", "gemma2", "t5"):
        MAKERS[name](root / name)
    make_embeddinggemma(root / "dense")
    make_tiny_bert(root / "bert")
    make_tiny_qwen3(root / "qwen3", max_tokens=512)
    make_roberta(root / "roberta", "Roberta")
    done = subprocess.run(
        [sys.executable, "-c", _SERVES, str(root), str(tmp_path / "known")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    models, again = len(list(root.iterdir())), 3  # BERT, MPNet and DeBERTa
    assert f"held {models + again} of which again {again}\n" in done.stdout
