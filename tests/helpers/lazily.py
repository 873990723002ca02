"""Libraries that take a second or more to import, which only the worker that runs their tests should spend."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def lazily(name: str) -> ModuleType:
    """The module `name`, imported when one of its names is first asked for. Each worker of the suite imports every file of tests, and
    runs a part of them. Where it is not installed, it is empty: such tests are skipped.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return ModuleType(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
