"""What a load learns from transformers serves the next one, which then does without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedq_consumer.engine import ModelError, Text, Tokens, load_encoder
from embedq_consumer.engine.loading.load_cache import LoadCache, ModelSnapshot
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, minilm_path

_LOADS = """
import sys
from pathlib import Path
import numpy as np
from embedq_consumer.engine import Text, load_encoder
encoder = load_encoder(Path(sys.argv[1]), device="cpu", known_models=Path(sys.argv[2]))
vectors = encoder.submit(encoder.tokenize([Text("the moon"), Text("stone " * 300, truncate="end")])).result()
np.save(sys.argv[3], vectors)
print(encoder.model_version, "transformers" in sys.modules)
"""


def load_in_a_process(model: Path, known: Path, vectors: Path) -> tuple[str, bool]:
    """(model version, whether transformers was imported) of a fresh process that writes two vectors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LOADS, str(model), str(known), str(vectors)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    version, imported = done.stdout.split()[-2:]
    return version, imported == "True"


def files_of(known: Path) -> list[Path]:
    return sorted(known.glob("*.model"))


def test_a_second_start_imports_no_transformers_and_gives_the_same_bits(tmp_path: Path) -> None:
    known = tmp_path / "known"
    first = load_in_a_process(minilm_path(), known, tmp_path / "first.npy")
    second = load_in_a_process(minilm_path(), known, tmp_path / "second.npy")
    assert first[1]
    assert not second[1]
    assert first[0] == second[0]
    assert np.array_equal(np.load(tmp_path / "first.npy"), np.load(tmp_path / "second.npy"))


def test_a_load_without_transformers_is_proved_against_its_hidden_states(tmp_path: Path) -> None:
    path, known = make_tiny_bert(tmp_path / "model"), tmp_path / "known"
    load_encoder(path, device="cpu", known_models=known).close()
    [file] = files_of(known)
    kept = LoadCache(known).get(file.stem)
    assert kept is not None
    other = np.random.default_rng(0).standard_normal(len(kept.expected) // 4).astype(np.float32)
    LoadCache(known).put(file.stem, msgspec.structs.replace(kept, expected=other.tobytes()))
    with pytest.raises(ModelError, match="packed sequences do not give the same"):
        load_encoder(path, device="cpu", known_models=known)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    known = tmp_path / "known"
    for seed in (0, 1):
        load_encoder(
            make_tiny_bert(tmp_path / str(seed), seed=seed), device="cpu", known_models=known
        ).close()
    assert len(files_of(known)) == 2


def test_a_copy_elsewhere_is_the_same_model(tmp_path: Path) -> None:
    here, known = make_tiny_bert(tmp_path / "here"), tmp_path / "known"
    there = shutil.copytree(here, tmp_path / "there")
    for path in (here, there):
        load_encoder(path, device="cpu", known_models=known).close()
    assert len(files_of(known)) == 1


def test_another_limit_of_tokens_is_another_model(tmp_path: Path) -> None:
    path, known = make_tiny_bert(tmp_path / "model"), tmp_path / "known"
    limits = []
    for limit in (50, 60):
        (path / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {limit}}}')
        limits.append(load_encoder(path, device="cpu", known_models=known).max_tokens)
    assert limits == [50, 60]


@pytest.mark.parametrize(
    "harm", [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-1] + b"!", lambda _: b""]
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    path, known = make_tiny_bert(tmp_path / "model"), tmp_path / "known"
    load_encoder(path, device="cpu", known_models=known).close()
    [file] = files_of(known)
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    load_encoder(path, device="cpu", known_models=known).close()
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = make_tiny_bert(tmp_path / "model")
    encoder = load_encoder(path, device="cpu", known_models=tmp_path / "file" / "known")
    [tokens] = encoder.tokenize([Text("moon")])
    assert isinstance(tokens, Tokens)
    assert np.isfinite(encoder.submit([tokens]).result()).all()


def test_a_model_that_runs_transformers_own_code_is_not_cached(tmp_path: Path) -> None:
    known = tmp_path / "known"
    load_encoder(make_tiny_qwen3(tmp_path / "model"), device="cpu", known_models=known).close()
    assert files_of(known) == []


def test_the_least_recently_used_ones_are_evicted(tmp_path: Path) -> None:
    known = LoadCache(tmp_path)
    model = ModelSnapshot(
        architecture="BertModel",
        config={},
        tensors={},
        rotary=None,
        last_norm_eps=None,
        max_tokens=1,
        position_offset=0,
        padding=None,
        tokenizer=b"{}",
        split_special_tokens=False,
        tokenizer_notes=(),
        sequences=((1,),),
        starts=(0,),
        expected=b"\0\0\0\0",
    )
    for number in range(16):
        known.put(str(number), model)
        os.utime(tmp_path / f"{number}.model", (number, number))
    assert known.get("0") == model  # used just now
    known.put("new", model)
    assert known.get("1") is None
    assert known.get("0") is not None
    assert known.get("new") is not None
