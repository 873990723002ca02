"""Results that wait to be written down together. Nothing here does I/O."""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from embedq_gateway.batches.running.lines import Destination

FULL_BYTES: Final = 4 << 20
"""Of a segment: large enough for S3, small enough to be in memory for several batches."""
SHORTEST_WAIT_S: Final = 1.0
WAIT_SHARE: Final = 0.01
"""Of the time that the batch runs: what a kill makes be done again is a hundredth of it, and a day makes some 700 segments."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """Results to be written: the bytes for each file, and what is counted."""

    lines: tuple[int, ...]
    output: bytes
    failures: bytes
    completed: int
    failed: int
    unrun: int
    tokens: int
    model_versions: dict[str, int]


class SegmentBuffer:
    """Collects results until they are many, or have waited for long enough; then the next buffer does.

    Args:
        began: when the batch began to run, on the clock of all times here, in seconds.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._oldest: float | None = None
        self._lines: list[int] = []
        self._files: dict[Destination, list[bytes]] = {"output": [], "failures": []}
        self._size = 0
        self._unrun = 0
        self._tokens = 0
        self._versions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._lines)

    def add(
        self,
        number: int,
        line: bytes,
        file: Destination,
        now: float,
        *,
        tokens: int = 0,
        model_version: str | None = None,
        unrun: bool = False,
    ) -> None:
        """A line's result. `unrun`: it was not run at all."""
        if self._oldest is None:
            self._oldest = now
        self._lines.append(number)
        self._files[file].append(line)
        self._size += len(line)
        self._unrun += unrun
        self._tokens += tokens
        if model_version is not None:
            self._versions[model_version] += 1

    def due_in(self, now: float) -> float | None:
        """Seconds until it should be written; 0 or less: now; None: there is nothing."""
        if self._oldest is None:
            return None
        if self._size >= FULL_BYTES:
            return 0.0
        wait = max(SHORTEST_WAIT_S, WAIT_SHARE * (self._oldest - self._began))
        return self._oldest + wait - now

    @property
    def size(self) -> int:
        """Bytes of all results here."""
        return self._size

    def written(self) -> Written:
        """All that is here, as it is to be written."""
        return Written(
            lines=tuple(self._lines),
            output=b"".join(self._files["output"]),
            failures=b"".join(self._files["failures"]),
            completed=len(self._files["output"]),
            failed=len(self._files["failures"]),
            unrun=self._unrun,
            tokens=self._tokens,
            model_versions=dict(self._versions),
        )
