"""The service on a device that exists only here, and takes a fixed time: `python -m benchmarks.fixed_device`.

For what a service costs around a device that is faster than this machine, such as a GPU: everything is the service's own but
the forward. A micro-batch takes `FULL_S` seconds (the environment variable `FIXED_DEVICE_S`) where it is full, by tokens or by texts, and its
part of them where it is not; vectors are random rows, the same each time. No processor time goes into it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_consumer import opening, process
from embedq_consumer.engine import Encoder, Pending, Tokens, load_encoder

FULL_S: Final = float(os.environ.get("FIXED_DEVICE_S", "0.02"))
_LEAST_S: Final = 0.001
_TOKENS: Final = 16_384
_TEXTS: Final = 1_024
"""A full micro-batch, as on a GPU."""


class _At:
    """Vectors that are there from a moment on."""

    def __init__(self, at: float, vectors: npt.NDArray[np.float32]) -> None:
        self._at = at
        self._vectors = vectors

    @property
    def ready(self) -> bool:
        """False: they may not be there."""
        return False

    def result(self) -> npt.NDArray[np.float32]:
        time.sleep(max(0.0, self._at - time.monotonic()))
        return self._vectors


class FixedDevice:
    """A real encoder whose forward takes a fixed time, one micro-batch after the other."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._free_at = 0.0
        self._rows = np.random.default_rng(0).standard_normal((_TEXTS, encoder.hidden_size), np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        """Compute nothing."""
        tokens, rows = sum(tokens.cost for tokens in batch), sum(tokens.rows for tokens in batch)
        seconds = max(_LEAST_S, FULL_S * max(tokens / _TOKENS, len(batch) / _TEXTS))
        self._free_at = max(self._free_at, time.monotonic()) + seconds
        return _At(self._free_at, np.resize(self._rows, (rows, self._rows.shape[1])))


def main() -> int:
    """The service."""
    opening.load_encoder = lambda *args, **kwargs: FixedDevice(load_encoder(*args, **kwargs))  # type: ignore[attr-defined]
    opening.is_cpu = lambda device: False  # type: ignore[attr-defined]
    os.environ.setdefault("EMBEDQ_MAX_BATCH_TOKENS", str(_TOKENS))
    return process.main()


if __name__ == "__main__":
    raise SystemExit(main())
