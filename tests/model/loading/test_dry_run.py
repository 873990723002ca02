"""What crashes, hangs or fills the memory does so in a process of its own, and is a reason to refuse the model."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from embedq_consumer.engine import ModelError, load_encoder
from embedq_consumer.engine.loading import dry_run as module
from embedq_consumer.engine.loading import loader
from embedq_consumer.engine.loading.dry_run import dry_run
from embedq_consumer.engine.loading.dry_run_process import try_directory
from embedq_consumer.engine.loading.load_cache import LoadCache
from embedq_consumer.engine.model_directory import read_directory
from tests.helpers.bad_models import copied, edit, panicking_tokenizer, without_unknown_token
from tests.helpers.support import patient, wait_for
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_modernbert


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("good") / "model")


def child(*lines: str) -> tuple[str, ...]:
    """A process in place of the real one."""
    return sys.executable, "-c", "\n".join(["import os, signal, sys, time", *lines])


def test_nothing_speaks_against_a_good_model(good: Path) -> None:
    dry_run(good, None, within_s=patient(120))


def test_a_model_that_fails_there_is_refused_with_its_own_reason(tmp_path: Path, good: Path) -> None:
    model = copied(good, tmp_path / "model")
    panicking_tokenizer(model)
    with pytest.raises(ModelError, match=r"tokenizer\.json: Precompiled: Error"):
        dry_run(model, None, within_s=patient(120))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (without_unknown_token, "the tokenizer does not take every text: WordPiece error: Missing"),
        (
            lambda model: edit(model / "config.json", vocab_size=10_000_000, num_hidden_layers=30),
            "describes a model of 1,2",
        ),
    ],
    ids=["no unknown token", "a model that its weights do not fill"],
)
def test_what_the_process_looks_at_is_refused_with_its_own_reason(
    tmp_path: Path, good: Path, harm: Any, told: str
) -> None:
    """In this process, which has the libraries already."""
    model = copied(good, tmp_path / "model")
    harm(model)
    with pytest.raises(ModelError) as refused:
        try_directory(read_directory(model))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "/model: a dry run of it ended by SIGSEGV"),
        ("os.abort()", "/model: a dry run of it ended by SIGABRT"),
        (
            "print('thread panicked: out of luck', file=sys.stderr); sys.exit(101)",
            "exit code 101: thread panicked",
        ),
        ("", "gave no verdict"),
        ("print('{}')", "gave no verdict"),
    ],
)
def test_a_crash_is_a_verdict(line: str, told: str) -> None:
    with pytest.raises(ModelError) as refused:
        dry_run(Path("/model"), None, within_s=patient(60), command=child(line))
    assert told in str(refused.value)


def test_one_that_hangs_is_ended_and_leaves_no_process(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    command = child(f"open({str(noted)!r}, 'w').write(str(os.getpid()))", "time.sleep(1000)")
    with pytest.raises(ModelError, match=r"a dry run of it did not end within 3 s"):
        dry_run(Path("/model"), None, within_s=3, command=command)
    if noted.exists():  # on a busy machine it may not have come so far
        with pytest.raises(ProcessLookupError):
            os.kill(int(noted.read_text()), 0)


def test_one_that_fills_the_memory_is_ended_there(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEMORY_BYTES", 100_000_000)  # too little for the libraries
    with pytest.raises(ModelError, match="a dry run of it"):
        dry_run(good, None, within_s=patient(120))


def test_it_knows_none_of_our_settings_and_no_way_to_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_KAFKA_SASL_PASSWORD", "secret")
    command = child(
        "assert not [name for name in os.environ if name.startswith('EMBEDQ_')]",
        "assert os.environ['HF_HUB_OFFLINE'] == '1'",
        "print('{\"error\": null}')",
    )
    dry_run(Path("/model"), None, within_s=patient(60), command=command)


def test_it_ends_with_the_process_that_asked_for_it(good: Path) -> None:
    """A replica that is killed meanwhile leaves nothing behind."""
    asked = child(
        "import subprocess",
        "from pathlib import Path",
        "from embedq_consumer.engine.loading import dry_run as module",
        f"module.dry_run(Path({str(good)!r}), None, within_s=600)",
    )
    parent = psutil.Popen(asked, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: bool(parent.children()), within=60, what="a dry run")
        [dry] = parent.children()
        parent.send_signal(signal.SIGKILL)
        wait_for(lambda: not dry.is_running() or dry.status() == psutil.STATUS_ZOMBIE, within=60)
    finally:
        parent.kill()
        parent.wait()


def test_a_model_is_tried_once_and_then_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(loader, "dry_run", lambda path, *_, **__: tried.append(path))
    model, known = make_tiny_modernbert(tmp_path / "model"), tmp_path / "known"
    for _ in range(2):  # its forward is transformers' own, so that nothing else is kept of it
        load_encoder(model, device="cpu", known_models=known, dry_run_s=1.0).close()
    assert tried == [model]
    edit(model / "tokenizer_config.json", something="else")
    load_encoder(model, device="cpu", known_models=known, dry_run_s=1.0).close()
    assert tried == [model, model]


def test_a_model_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, *_: object, **__: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(loader, "dry_run", fails)
    model = make_tiny_bert(tmp_path / "model")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"^no$"):
            load_encoder(model, device="cpu", known_models=tmp_path / "known", dry_run_s=1.0)


def test_a_damaged_file_of_what_is_known_counts_as_unknown(tmp_path: Path) -> None:
    cache = LoadCache(tmp_path)
    packed = msgspec.msgpack.encode({"architecture": 7})
    (tmp_path / "key.model").write_bytes(hashlib.sha256(packed).digest() + packed)
    os.mkfifo(tmp_path / "pipe.model")
    with (tmp_path / "large.model").open("wb") as file:
        file.truncate(5_000_000_000)
    started = time.monotonic()
    assert [cache.get(key) for key in ("key", "pipe", "large", "missing")] == [None] * 4
    assert time.monotonic() - started < patient(10)
