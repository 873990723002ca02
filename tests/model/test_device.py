"""Failures of a device get their names: real ones, of the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedq_consumer.engine import OutOfMemory
from embedq_consumer.engine.device import translate_errors, translated

CPU = torch.device("cpu")


class Late:
    """Its work is done when its result is asked for."""

    ready = False

    def result(self) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = torch.empty(1 << 50).numpy()
        return found


def test_memory_that_the_processor_does_not_have_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory), translate_errors(CPU):
        torch.empty(1 << 50)
    with pytest.raises(OutOfMemory), translate_errors(CPU):
        np.empty(1 << 60, dtype=np.uint8)


def test_a_result_that_fails_later_gets_its_name_too() -> None:
    pending = translated(CPU, Late)
    with pytest.raises(OutOfMemory):
        pending.result()


def test_other_failures_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), translate_errors(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
