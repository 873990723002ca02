"""Triton's interpreter, for tests of kernels where there is no GPU."""

from __future__ import annotations

import os

import torch


def interpret_without_gpu() -> None:
    """Run kernels in the interpreter where there is no GPU. To be called before anything imports Triton, which reads the
    variable as kernels are defined, its own among them; so by the conftest of every folder whose tests import kernels."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
