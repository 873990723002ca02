"""The vectors of a chunked text, put together from those of the windows that the model ran. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedq_consumer.engine import Chunked
from embedq_shared.messages import ChunkMode

Vectors = npt.NDArray[np.float32]


class WindowAssembler:
    """One text's vectors, as far as they have come. Windows may come in any order, and twice.

    In mode mean only a running sum is kept: the windows' unit vectors, each weighted by its tokens of the text.
    """

    def __init__(self, chunked: Chunked, mode: ChunkMode, hidden_size: int) -> None:
        self._pieces = chunked.pieces
        self._first = np.cumsum([0, *(window.rows for window in chunked.windows)])
        self._missing = set(range(len(chunked.windows)))
        self._mean = mode == "mean"
        self._rows: npt.NDArray[np.floating] = (
            np.zeros((1, hidden_size), np.float64)
            if self._mean
            else np.zeros((len(chunked.pieces), hidden_size), np.float32)
        )

    def add(self, window: int, rows: Vectors) -> bool:
        """Keep one window's vectors, float32 (rows, hidden_size). True when it was the last one missing."""
        if window not in self._missing:
            return False
        self._missing.remove(window)
        if self._mean:
            row = rows[0].astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinity becomes NaN here, and postprocessing finds both
                unit = row / (np.linalg.norm(row) or 1.0)
                self._rows[0] += unit * max(1, self._pieces[window].tokens)
        else:
            self._rows[self._first[window] : self._first[window + 1]] = rows
        return not self._missing

    @property
    def rows(self) -> Vectors:
        """All of them, float32: (1, hidden_size) in mode mean, else (pieces, hidden_size)."""
        if self._mean:
            tokens = sum(max(1, piece.tokens) for piece in self._pieces)
            return (self._rows / tokens).astype(np.float32)
        return self._rows.astype(np.float32, copy=False)
