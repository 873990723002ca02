"""A load that nobody wants any more ends at its next look, wherever that is, and frees what it has without the collector."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from embedq_consumer.engine import Abandoned, Cancellation, ModelError, load_encoder
from embedq_consumer.engine.encoder import PackedEncoder
from embedq_consumer.engine.loading.dry_run import dry_run
from embedq_consumer.engine.loading.load_cache import LoadCache
from tests.helpers.support import patient, wait_for
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3


class AtLook(Cancellation):
    """Set at the n-th look of the thread that made it, or of any other one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.looks = 0
        self._number = number
        self._counting = threading.Lock()

    def check(self) -> None:
        with self._counting:
            self.looks += 1
            reached = self.looks >= self._number
        if reached:
            self.set()
        super().check()


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.disable()
    gc.freeze()  # what the libraries and other tests hold is then not looked through for each load
    yield
    gc.enable()


def live_tensors() -> list[torch.Tensor]:
    """All in this process that were made since the collector is off."""
    return [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]


def left_since(before: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """The shapes of tensors that were made after `before`, which keeps its own alive, and are still there."""
    known = set(map(id, before))
    return [tuple(each.shape) for each in live_tensors() if id(each) not in known]


@pytest.mark.usefixtures("collector_off")
@pytest.mark.parametrize("known", [False, True], ids=["by transformers", "known"])
def test_whenever_a_load_is_given_up_nothing_is_left_of_it(tmp_path: Path, known: bool) -> None:
    model = make_tiny_qwen3(tmp_path / "model")
    cache = tmp_path / "known" if known else None
    load_encoder(model, device="cpu", known_models=cache).close()
    never = AtLook(sys.maxsize)
    load_encoder(model, None, never, device="cpu", known_models=cache).close()
    before = live_tensors()
    step = max(1, never.looks // 5)
    for number in (*range(1, never.looks, step), never.looks):
        with pytest.raises(Abandoned):
            load_encoder(model, None, AtLook(number), device="cpu", known_models=cache)
        assert left_since(before) == [], f"after look {number} of {never.looks}"


@pytest.mark.usefixtures("collector_off")
@pytest.mark.parametrize("known", [False, True], ids=["by transformers", "known"])
def test_nothing_is_left_of_a_model_that_fails_its_proof(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_qwen3(tmp_path / "model")
    cache = tmp_path / "known" if known else None
    load_encoder(model, device="cpu", known_models=cache).close()
    before = live_tensors()

    def fails(*_: object) -> None:
        raise NotImplementedError("packed sequences do not give the same as each one alone")

    monkeypatch.setattr(PackedEncoder, "prove", fails)
    with pytest.raises(ModelError, match="packed sequences"):
        load_encoder(model, device="cpu", known_models=cache)
    assert left_since(before) == []


@pytest.mark.usefixtures("collector_off")
def test_nothing_is_left_of_a_model_that_transformers_loads_and_that_is_not_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_tiny_bert(tmp_path / "model")
    load_encoder(model, device="cpu").close()
    before = live_tensors()
    tensors = load_file(model / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.bias"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    del tensors
    with pytest.raises(ModelError, match="1 tensors are missing"):
        load_encoder(model, device="cpu")
    assert left_since(before) == []


def test_a_load_that_is_not_wanted_from_the_start_reads_nothing(tmp_path: Path) -> None:
    cancel = Cancellation()
    cancel.set()
    with pytest.raises(Abandoned):
        load_encoder(tmp_path / "nowhere", None, cancel, device="cpu")


def test_a_load_that_ended_well_is_known_to_need_no_dry_run(tmp_path: Path) -> None:
    model = make_tiny_bert(tmp_path / "model")
    load_encoder(model, device="cpu", known_models=tmp_path / "known").close()
    assert len(list((tmp_path / "known").glob("*.tried"))) == 1
    assert LoadCache(tmp_path / "known").was_tried(next((tmp_path / "known").glob("*.tried")).stem)


def test_the_process_of_a_dry_run_ends_at_once() -> None:
    cancel, mine = Cancellation(), psutil.Process(os.getpid())
    before = {child.pid for child in mine.children()}

    def cancel_once_it_runs() -> None:
        wait_for(lambda: bool({child.pid for child in mine.children()} - before), what="the process")
        cancel.set()

    watching = threading.Thread(target=cancel_once_it_runs)
    watching.start()
    with pytest.raises(Abandoned):
        dry_run(
            Path("/model"),
            None,
            within_s=patient(600),
            command=(sys.executable, "-c", "import time; time.sleep(1000)"),
            cancel=cancel,
        )
    watching.join()
    assert {child.pid for child in mine.children()} <= before
