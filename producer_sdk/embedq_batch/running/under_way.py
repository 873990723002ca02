"""What is between the source and the manifest: read, and not yet written down."""

from __future__ import annotations

from collections.abc import Sequence

from embedq_batch.content.rows import Problem, RowId
from embedq_batch.errors import TooManyFailures
from embedq_batch.running.progress import Progress

LEAST_FOR_SHARE = 100
"""Rows before a share of failures means anything."""


class UnderWay:
    """Rows that were read and of which the manifest does not know yet, each with its latest content.

    The source's thread looks while the event loop changes it; each call is safe by itself.
    """

    def __init__(self) -> None:
        self._content: dict[RowId, bytes] = {}

    def begin(self, ids: Sequence[RowId], hashes: Sequence[bytes]) -> None:
        """These rows were read."""
        self._content.update(zip(ids, hashes, strict=True))

    def among(self, ids: Sequence[RowId]) -> dict[RowId, bytes]:
        """The content of those of these rows that are under way."""
        found = list(map(self._content.get, ids))
        if not any(found):
            return {}
        return {id: content for id, content in zip(ids, found, strict=True) if content is not None}

    def arrived(self, ids: Sequence[RowId], hashes: Sequence[bytes]) -> None:
        """The manifest knows of these rows now, unless there is a later one of an id."""
        content = self._content
        for id, hash in zip(ids, hashes, strict=True):
            if content.get(id) == hash:
                del content[id]


class Failures:
    """Counts the rows that were answered and those that failed, and says when they are too many."""

    def __init__(self, progress: Progress, share: float) -> None:
        self._progress = progress
        self._share = share
        self._answered = 0
        self._first = ""

    def failed(self, id: RowId, problem: Problem) -> None:
        """A row failed."""
        self._progress.failed += 1
        self._first = self._first or f"{id}: {problem.code}: {problem.message}"

    def answered(self, rows: int = 0) -> None:
        """So many more rows were answered, in whatever way.

        Raises:
            TooManyFailures: too many of all of them failed.
        """
        self._answered += rows
        failed = self._progress.failed
        if self._answered >= LEAST_FOR_SHARE and failed > self._share * self._answered:
            raise TooManyFailures(failed=failed, handled=self._answered, share=self._share, first=self._first)
