"""The trace of `benchmarks.one_text` names methods of the service and of the SDK, some of them their own business."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.one_text import CLIENT_HOPS, SERVICE_HOPS


@pytest.mark.parametrize(("module", "owner", "name", "label"), [*CLIENT_HOPS, *SERVICE_HOPS])
def test_each_hop_is_a_method_that_there_is(module: str, owner: str, name: str, label: str | None) -> None:
    assert callable(getattr(getattr(importlib.import_module(module), owner), name))
