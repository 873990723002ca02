"""What a failure on the device means, in two names that the service knows: out of memory, and a device that is lost."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from embedq_consumer.engine import DeviceLost, Memory, OutOfMemory, Pending
from embedq_consumer.engine.devices import current

__all__ = ["guarded", "memory", "named"]

_OUT_OF_MEMORY = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
"""How CUDA, its libraries and PyTorch's CPU allocator say it where they do not raise an exception of its own."""


class _Guarded(msgspec.Struct, frozen=True):
    """Vectors on their way, of which a failure gets its name."""

    device: torch.device
    pending: Pending

    def result(self) -> npt.NDArray[np.float32]:
        with named(self.device):
            return self.pending.result()


def guarded(device: torch.device, start: Callable[[], Pending]) -> Pending:
    """What `start` gives, with `named` around it now and around its result later."""
    with named(device):
        return _Guarded(device, start())


@contextmanager
def named(device: torch.device) -> Iterator[None]:
    """Work on `device`, and give its failures their names; others stay as they are.

    Raises:
        OutOfMemory: the device had too little memory left. What it held for later is given back, so that less fits.
        DeviceLost: the device's context is broken, and every later call would fail too.
    """
    try:
        with current(device):
            yield
    except (OutOfMemory, DeviceLost):
        raise
    except Exception as error:
        if device.type == "cuda" and _is_lost(device):
            raise DeviceLost(f"{device}: {_first_line(error)}") from error
        if not _means_out_of_memory(error):
            raise
        # The frames below hold tensors for as long as the exception lives.
        traceback.clear_frames(error.__traceback__)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(_first_line(error)) from error


def memory(device: torch.device) -> Memory | None:
    """The device's memory, None for a CPU. What PyTorch holds without using it counts as free."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return Memory(free=free + held, total=total, peak=peak)


def _is_lost(device: torch.device) -> bool:
    """Whether a call that cannot fail by itself fails: errors that break a context come back from every later call."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return not _means_out_of_memory(error)
    return False


def _means_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
