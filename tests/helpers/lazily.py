"""Libraries that take a second or more to import, which only the worker that runs their tests should spend."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def lazily(name: str) -> ModuleType:
    """In place of the module `name`, which is imported when one of its names is first asked for. Each worker of the suite imports
    every file of tests, and runs a part of them.

    The standard library's loader of this kind will not do: pytest asks everything in a file for its class, which loads it.
    """
    return _Lazy(name)


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what pytest and others look for in everything
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)
