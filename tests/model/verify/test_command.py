"""`embedq verify` as an operator runs it, on real directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from embedq_consumer.engine import DeviceLost, Encoder, OutOfMemory, load_encoder
from embedq_consumer.verify import comparison as module
from embedq_consumer.verify.command import verify
from embedq_consumer.verify.sample_texts import sample_texts
from embedq_sdk.cli.commands import cli
from tests.helpers.support import patient
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, minilm_path, nan_weights

TEXTS = [text for text in sample_texts() if len(text) < 200][:40]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(verify, [*map(str, arguments), "--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def report_of(*arguments: object) -> dict[str, Any]:
    """The JSON report of a run that went well."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """A directory's model is the same each time; loading it takes longer than all that is done with it here."""
    kept: dict[Path, Encoder] = {}
    closes: list[Callable[[], None]] = []

    def load(path: Path, **options: Any) -> Encoder:
        if options["quantization"] != "none" or options["keep_bf16"]:
            return load_encoder(path, **options)
        if path not in kept:
            kept[path] = encoder = load_encoder(path, **options)
            closes.append(encoder.close)
            patch.setattr(encoder, "close", lambda: None)
        return kept[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_encoder", load)
        yield
    for close in closes:
        close()


def perturbed(model: Path, path: Path, noise: float) -> Path:
    """A copy with every weight changed a little."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, path)
    random = np.random.default_rng(0)
    weights = {
        name: (w + noise * w.std() * random.standard_normal(w.shape)).astype(w.dtype) if w.ndim == 2 else w
        for name, w in load_file(path / "model.safetensors").items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_model_is_just_like_itself(texts: Path) -> None:
    model = minilm_path()
    report = report_of(
        model, "--against", model, "--texts", texts, "--min-cosine", "0.99999", "--min-agreement", "1"
    )
    assert report["texts"] == len(TEXTS)
    assert report["cosine"]["min"] == pytest.approx(1, abs=1e-6)
    assert report["cosine"]["below_threshold"] == 0
    assert report["cosine"]["largest_difference"] <= 1e-6
    assert report["neighbors"] == {"k": 10, "mean": 1, "min": 1, "unchanged": 1}
    one, other = report["model"], report["against"]
    assert one["model_version"] == other["model_version"]
    assert one["tokens"] == other["tokens"] > len(TEXTS)
    assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"])


def test_a_changed_copy_is_reported_with_its_size(texts: Path, bert: Path, tmp_path: Path) -> None:
    copies = [perturbed(bert, tmp_path / str(noise), noise) for noise in (0.02, 0.3)]
    near, far = (
        report_of(bert, "--against", copy, "--texts", texts, "--threshold", "0.999") for copy in copies
    )
    assert near["model"]["model_version"] != near["against"]["model_version"]
    assert 1 > near["cosine"]["min"] > far["cosine"]["min"]
    assert near["cosine"]["p1"] <= near["cosine"]["p5"] <= near["cosine"]["p50"] < 1
    assert near["neighbors"]["mean"] > far["neighbors"]["mean"]
    assert far["cosine"]["below_threshold"] == 1
    worst = far["worst"]
    assert worst[0]["cosine"] == pytest.approx(far["cosine"]["min"])
    assert [pair["cosine"] for pair in worst] == sorted(pair["cosine"] for pair in worst)
    assert all(pair["text"] == TEXTS[pair["line"] - 1][:40] for pair in worst)


def test_a_missed_threshold_is_exit_code_1(texts: Path, bert: Path, tmp_path: Path) -> None:
    copy = perturbed(bert, tmp_path / "copy", 0.3)
    for option, message in (("--min-cosine", "lowest cosine"), ("--min-agreement", "neighbor agreement")):
        result = run(bert, "--against", copy, "--texts", texts, option, "0.999")
        assert result.exit_code == 1
        assert message in result.stderr
        assert "top-10 agreement, mean" in result.stdout


def test_models_of_two_widths_have_neighbors_but_no_cosine(texts: Path, bert: Path, qwen3: Path) -> None:
    report = report_of(qwen3, "--against", bert, "--texts", texts, "--top-k", "5")
    assert report["dimensions"] == [256, 128]
    assert report["cosine"] is None
    assert 0 <= report["neighbors"]["mean"] < 1
    assert report["neighbors"]["k"] == 5
    assert "the vectors differ in length" in run(qwen3, "--against", bert, "--texts", texts).stdout
    missed = run(qwen3, "--against", bert, "--texts", texts, "--min-cosine", "0.5")
    assert missed.exit_code == 1
    assert "no cosine" in missed.stderr


def test_a_cut_to_one_length_makes_two_widths_comparable(texts: Path, bert: Path, qwen3: Path) -> None:
    report = report_of(qwen3, "--against", bert, "--texts", texts, "--dimensions", "64")
    assert report["dimensions"] == [64, 64]
    assert report["cosine"]["min"] < 0.9
    beyond = run(qwen3, "--against", bert, "--texts", texts, "--dimensions", "200")
    assert beyond.exit_code == 2
    assert "at most 128 components" in beyond.stderr


def test_an_instruction_and_a_prompt_are_prepended_to_every_text(texts: Path, qwen3: Path) -> None:
    plain, query, instructed = (
        report_of(qwen3, "--against", qwen3, "--texts", texts, *options)["model"]["tokens"]
        for options in ((), ("--input-type", "query"), ("--instruction", "Find the passage."))
    )
    assert query > plain
    assert instructed > plain
    assert (query - plain) % len(TEXTS) == 0


def test_lines_keep_their_numbers_where_empty_and_equal_ones_are_left_out(
    tmp_path: Path, qwen3: Path, bert: Path
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("the moon\n\nthe stone wall\nthe moon\n   \nthe river\n")
    report = report_of(qwen3, "--against", bert, "--texts", path)
    assert report["texts"] == 3
    assert report["neighbors"]["k"] == 2
    assert sorted((pair["line"], pair["text"]) for pair in report["worst"]) == [
        (1, "the moon"),
        (3, "the stone wall"),
        (6, "the river"),
    ]


def test_texts_without_a_vector_are_left_out_and_named(tmp_path: Path, qwen3: Path) -> None:
    broken = nan_weights(tmp_path / "broken", token="<|im_start|>")
    path = tmp_path / "texts.txt"
    path.write_text("the moon\nthe <|im_start|>moon\nthe wall\nthe river\n")
    result = run(broken, "--against", qwen3, "--texts", path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["texts"] == 3
    assert report["model"]["without_vector"] == [2]
    assert report["against"]["without_vector"] == []
    assert report["cosine"]["min"] == pytest.approx(1, abs=1e-6)
    assert "1 text has no vector" in result.stderr


def test_what_cannot_be_compared_is_one_line_and_exit_code_2(tmp_path: Path, bert: Path) -> None:
    few, odd = tmp_path / "few.txt", tmp_path / "odd.jsonl"
    few.write_text("alone\nalone\n")
    odd.write_text('{"text": "a"}\n{"title": "b"}\n')
    broken = Path(shutil.copytree(bert, tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    for arguments, message in (
        ((bert, "--against", bert, "--texts", few), "at least two different texts"),
        ((bert, "--against", bert, "--texts", odd), "line 2"),
        ((bert, "--against", broken), "tokenizer.json: missing"),
        ((bert, "--against", bert, "--quantization", "fp8"), "fp8"),
        ((bert, "--against", bert, "--keep-bf16", "0,x"), "--keep-bf16"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


def test_a_model_is_compared_with_itself_in_bf16_on_a_cpu(bert: Path, texts: Path) -> None:
    result = run(
        *(bert, "--against", bert, "--against-quantization", "bf16", "--device", "cpu"),
        *("--texts", texts, "--min-cosine", "0.99"),
    )
    assert result.exit_code == 0, result.stderr
    assert "bf16" in result.stdout


@pytest.mark.parametrize("failure", [OutOfMemory, DeviceLost])
def test_a_device_that_gives_out_is_no_missed_threshold(
    bert: Path, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    def give_out(*_: object) -> None:
        raise failure("cuda:0: no more")

    monkeypatch.setattr(module, "_encode", give_out)
    result = run(bert, "--against", bert)
    assert result.exit_code == 2
    assert result.stderr == "embedq: cuda:0: no more\n"


def test_a_package_that_is_missing_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(module, "load_encoder", no_torch)
    result = run(bert, "--against", bert)
    assert result.exit_code == 2
    assert result.stderr == "embedq: verify needs torch: pip install 'embedq[consumer]'\n"


def test_the_command_line_lists_it_without_loading_a_model_library() -> None:
    program = (
        "import sys; sys.argv = ['embedq', '--help']\n"
        "from embedq_sdk.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=patient(60), check=True
    )
    assert "verify  " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_command_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("other", "no_such_package_of_ours.commands:other", "embedq.commands")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: (entry,))
    assert "other" in CliRunner().invoke(cli, ["--help"]).output
    result = CliRunner().invoke(cli, ["other", "MODEL", "--against", "MODEL"])
    assert result.exit_code == 2
    assert result.stderr == ("embedq: other needs no_such_package_of_ours: pip install 'embedq[consumer]'\n")


def test_the_built_in_texts_are_many_and_no_two_are_equal() -> None:
    texts = sample_texts()
    assert len(texts) == len(set(texts)) >= 300
    assert min(map(len, texts)) < 5
    assert max(map(len, texts)) > 3000
