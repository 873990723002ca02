"""The service on a device that runs out of memory above n tokens: `python -m tests.helpers.oom_device FILE`.

FILE holds n, which a test may change while the service runs; 0 means that the device is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedq_consumer import opening, process
from embedq_consumer.engine import DeviceLost, Encoder, Memory, OutOfMemory, Pending, Tokens, load_encoder


class SmallDevice:
    """A real encoder. A micro-batch of more than `most()` tokens fails as it would on a GPU that is full."""

    def __init__(self, encoder: Encoder, most: Callable[[], int]) -> None:
        self._encoder = encoder
        self._most = most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        most = self._most()
        if most == 0:
            raise DeviceLost("device 0: an illegal memory access")
        if sum(len(tokens.ids) for tokens in batch) > most:
            raise OutOfMemory("out of memory")
        return self._encoder.submit(batch)

    def memory(self) -> Memory | None:
        return Memory(used=0, free=self._most(), total=self._most(), reserved=0, peak=0)


def main(file: Path) -> int:
    def load(*args: Any, **kwargs: Any) -> Any:
        return SmallDevice(load_encoder(*args, **kwargs), lambda: int(file.read_text()))

    opening.load_encoder = load  # type: ignore[attr-defined]  # the one seam of a whole process
    return process.main()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
