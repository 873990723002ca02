"""What a source is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import pyarrow as pa

from embedq_batch.content.rows import RowBatch

Since = int | Mapping[int, int]
"""Where a topic's records begin to count: at a time in epoch milliseconds, or at an offset of each partition that is named."""


class Source(Protocol):
    """Rows to embed. It is used in one thread, and may block there."""

    @property
    def name(self) -> str:
        """What is read, without secrets: a manifest and messages show it."""

    @property
    def kept(self) -> pa.Schema | None:
        """The columns that go along, once it is open; None: none do."""

    @property
    def ids(self) -> type[str | int]:
        """What ids are, once it is open: all integers, or strings, perhaps among integers."""

    @property
    def latest_wins(self) -> bool:
        """Whether a later row replaces an earlier one of its id, as in a topic of changes. In a table that is a mistake."""

    def open(self) -> None:
        """Look at what is there.

        Raises:
            BadSource: it cannot be read, or lacks a column.
        """

    def count(self) -> int | None:
        """Number of rows, if that is cheap to know. It may be off by a few."""

    def batches(self) -> Iterator[RowBatch]:
        """All rows in batches of about `BATCH_ROWS`, from the first one each time this is called, in the same order.

        Raises:
            BadSource: while reading.
        """

    def close(self) -> None:
        """Let go of files and connections."""


@runtime_checkable
class Log(Protocol):
    """A source that is read from a time or an offset on."""

    since: Since | None
    """None: from its start. It may be changed before a pass begins."""


@runtime_checkable
class Named(Protocol):
    """A source that knows all of its columns."""

    @property
    def names(self) -> list[str]:
        """Their names, once it is open."""
