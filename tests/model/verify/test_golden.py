"""`embedq golden` as an operator runs it, on real directories: what it writes, a reload's check takes."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.gates.golden import check_golden, read_golden
from embedq_consumer.verify import golden_vectors
from embedq_sdk.cli.commands import cli
from embedq_sdk.cli.golden.texts import BUILT_IN
from embedq_shared.golden import Golden
from embedq_shared.messages import GOLDEN_FILE
from tests.helpers.tiny_models import make_tiny_bert, minilm_path


def run(*arguments: object) -> Result:
    result = CliRunner(env={"EMBEDQ_KAFKA_SERVERS": ""}).invoke(cli, ["golden", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


class Here:
    """In place of the process of `golden_vectors`: what it would do, in this one, which has the libraries already."""

    def __init__(self, model: str, patch: pytest.MonkeyPatch) -> None:
        self._model = model
        self._patch = patch
        self.returncode = -1

    async def communicate(self, asked: bytes) -> tuple[bytes, bytes]:
        output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with self._patch.context() as patch:
            streams = {"stdin": io.TextIOWrapper(io.BytesIO(asked)), "stdout": output, "stderr": errors}
            patch.setattr(golden_vectors, "sys", SimpleNamespace(**streams))
            self.returncode = await asyncio.to_thread(golden_vectors.main, Path(self._model))
        return output.buffer.getvalue(), errors.getvalue().encode()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, directories are loaded by `Here`: libraries take seconds to import, in each process."""

    async def start(python: str, option: str, program: str, model: str, **_: object) -> Here:
        assert (python, option, program) == (sys.executable, "-m", golden_vectors.__name__)
        return Here(model, monkeypatch)

    return lambda: monkeypatch.setattr(asyncio, "create_subprocess_exec", start)


def vectors_of(model: Path, golden: Golden) -> np.ndarray:
    """As the trial of a reload computes them."""
    encoder = load_encoder(model, device="cpu", threads=1)
    prompts = [
        encoder.default_prompt if each.input_type is None else encoder.prompts.get(each.input_type, "")
        for each in golden.texts
    ]
    texts = [Text(each.text, prompt, "end") for each, prompt in zip(golden.texts, prompts, strict=True)]
    tokens = [found for found in encoder.tokenize(texts) if isinstance(found, Tokens)]
    vectors = np.concatenate([encoder.submit([each]).result() for each in tokens])
    encoder.close()
    return vectors


def test_what_is_written_of_a_directory_is_what_a_reload_checks(
    tmp_path: Path, here: Callable[[], None]
) -> None:
    model = make_tiny_bert(tmp_path / "models" / "one", seed=1, hidden=64)
    wrote = run("write", "--from", model, "--device", "cpu")
    assert (wrote.exit_code, f"{len(BUILT_IN)} texts, 64 numbers each, of sha256:" in wrote.stdout) == (
        0,
        True,
    )
    stored = read_golden(model / GOLDEN_FILE)
    check_golden(stored, vectors_of(model, stored), min_cosine=0.9999)
    assert [each.text for each in stored.texts] == list(BUILT_IN)

    here()
    same = run("check", model / GOLDEN_FILE, "--from", model, "--device", "cpu", "--min-cosine", "0.9999")
    assert (same.exit_code, "lowest cosine 1.000000" in same.stdout) == (0, True)
    other = make_tiny_bert(tmp_path / "models" / "other", seed=2, hidden=64)
    with pytest.raises(ModelRejected, match=r"texts\[0\]"):
        check_golden(stored, vectors_of(other, stored), None)
    missed = run("check", model / GOLDEN_FILE, "--from", other, "--device", "cpu")
    assert missed.exit_code == 1
    assert "embedq: texts[0]: expected a cosine of at least 0.995" in missed.stderr

    again = run("write", "--from", model, "--device", "cpu")
    assert (again.exit_code, "--force overwrites it" in again.stderr) == (2, True)


def test_texts_of_ones_own_with_a_type_a_threshold_and_a_cut(
    tmp_path: Path, here: Callable[[], None]
) -> None:
    here()
    texts, file = tmp_path / "texts.jsonl", tmp_path / "golden.json"
    texts.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    options = ("--texts", texts, "--query", "--dimensions", 32, "--min-cosine", 0.9, "--out", file)
    wrote = run("write", "--from", minilm_path(), "--device", "cpu", *options)
    assert wrote.exit_code == 0, wrote.stderr
    stored = json.loads(file.read_bytes())
    assert stored["min_cosine"] == 0.9
    found = [(each["text"], each["input_type"], len(each["embedding"])) for each in stored["texts"]]
    assert found == [("one", "query", 32), ("two", "query", 32)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("write",), "--out: expected the file to write"),
        (("write", "--out", "golden.json"), "expected --from, a model directory, or --servers"),
        (("check", "texts.txt"), "expected --from, a model directory, or --servers"),
        (("check", "texts.txt", "--from", "empty"), "texts.txt: not valid JSON"),
        (("write", "--from", "empty", "--texts", "empty.txt"), "expected 1 to 256 texts, got 0"),
        (("write", "--from", "empty"), "config.json: missing"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: Callable[[], None],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    here()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts.txt").write_text("a text\n")
    (tmp_path / "empty.txt").write_text("\n")
    result = run(*arguments)
    assert (result.exit_code, reason in result.stderr) == (2, True), result.stderr
    assert list((tmp_path / "empty").iterdir()) == []
