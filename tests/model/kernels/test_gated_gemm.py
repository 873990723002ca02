"""Gate and up as one product that gates: what does not need Hopper and quack-kernels, as tests/gpu does."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.kernels import gated_gemm
from embedq_consumer.engine.kernels.gated_gemm import fuses, interleaved, obstacle

WIDTH, INNER = 1536, 512


def weights(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    gate, up = (torch.randn(WIDTH, INNER, device=device, generator=generator) for _ in "ab")
    return (gate * INNER**-0.5).to(torch.bfloat16), (up * INNER**-0.5).to(torch.bfloat16)


def test_interleaved_weights_alternate() -> None:
    gate, up = weights("cpu")
    mixed = interleaved(gate, up)
    assert mixed.is_contiguous()
    assert torch.equal(mixed[0::2], gate)
    assert torch.equal(mixed[1::2], up)


def test_only_many_rows_in_few_counts_are_fused() -> None:
    assert [rows for rows in (16, 256, 512, 513, 640, 1000, 16384) if fuses(rows)] == [512, 640, 16384]


def test_why_a_cpu_has_no_product_that_gates() -> None:
    assert obstacle(WIDTH, INNER, torch.device("cpu")) == "no_hopper_gpu"


def test_the_epilogue_refers_to_modules_alone_so_that_the_package_can_name_it_wherever_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """quack-kernels names an epilogue by all functions that it refers to, and by those that these refer to, until it meets
    something without a name: in CUTLASS, unless that lies in a folder called `site-packages`."""
    functions: list[Callable[..., Any]] = []

    def gemm_epilogue(**_: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda function: functions.append(function) or function  # type: ignore[func-returns-value]

    def stands_in(name: str, **attributes: object) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(attributes, __getattr__=lambda _: lambda *_: None)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    math, activation = stands_in("quack.epilogue.math"), stands_in("quack.activation")
    epilogue = stands_in("quack.epilogue", gemm_epilogue=gemm_epilogue, math=math)
    stands_in("quack", activation=activation, epilogue=epilogue)
    path = Path(gated_gemm.__file__).with_name("gated_epilogue.py")
    spec = importlib.util.spec_from_file_location("traced_epilogue", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    (gate,) = functions
    found = inspect.getclosurevars(gate)
    assert {**found.globals, **found.nonlocals} == {"activation": activation, "math": math}
