"""The device a thread launches on, its memory, and what its failures mean: out of memory, or a device that is lost."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from embedq_consumer.engine.api import DeviceLost, Memory, OutOfMemory, Pending

__all__ = ["current", "means_out_of_memory", "memory", "translate_errors", "translated"]

_OUT_OF_MEMORY = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
"""How CUDA, its libraries and PyTorch's CPU allocator word it where they raise no specific exception."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the thread's current one within the context.

    Triton and CuTe launch their kernels on the thread's current device, whatever device their tensors are on, and a new
    thread starts on the first one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Translated(msgspec.Struct, frozen=True):
    """Vectors that are being computed, with `translate_errors` around their result."""

    device: torch.device
    pending: Pending

    @property
    def ready(self) -> bool:
        return self.pending.ready

    def result(self) -> npt.NDArray[np.float32]:
        with translate_errors(self.device):
            return self.pending.result()


def translated(device: torch.device, start: Callable[[], Pending]) -> Pending:
    """What `start` returns, with `translate_errors` around the call now and around its result later."""
    with translate_errors(device):
        return _Translated(device, start())


@contextmanager
def translate_errors(device: torch.device) -> Iterator[None]:
    """Work on `device`, and raise its failures as what they mean; other exceptions pass unchanged.

    Raises:
        OutOfMemory: the device had too little memory left. What PyTorch cached is released, so that a smaller batch may fit.
        DeviceLost: the device's context is broken, so every later call would fail too.
    """
    try:
        with current(device):
            yield
    except (OutOfMemory, DeviceLost):
        raise
    except Exception as error:
        if device.type == "cuda" and _is_lost(device):
            raise DeviceLost(f"{device}: {_first_line(error)}") from error
        if not means_out_of_memory(error):
            raise
        # The frames below hold tensors for as long as the exception lives.
        traceback.clear_frames(error.__traceback__)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(_first_line(error)) from error


def memory(device: torch.device) -> Memory | None:
    """The device's memory; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return Memory(
        used=total - free,
        free=free + reserved - torch.cuda.memory_allocated(device),
        total=total,
        reserved=reserved,
        peak=torch.cuda.max_memory_allocated(device),
    )


def _is_lost(device: torch.device) -> bool:
    """Whether a call that cannot fail by itself fails: errors that break a context come back from every later call."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return not means_out_of_memory(error)
    return False


def means_out_of_memory(error: BaseException) -> bool:
    """Whether the device, and not what it was asked to compute, made the call fail."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
