"""The directories that the CPU's tests use, too, and what libraries may say of each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.encoders import model_path
from tests.helpers.triton import interpret_without_gpu

__all__ = ["model_path"]

interpret_without_gpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kernel's libraries warn of each other as they are imported and compiled. As errors, these would make a kernel count as one
    that does not run, for as long as the process lasts, and a slower one would be tested instead."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for category in ("DeprecationWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))
