"""Which device a thread works on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["current"]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` this thread's own for a while.

    Triton and CuTe launch their kernels on the thread's current device, whatever device their tensors are on, and a new
    thread begins with the first one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
