"""Ids as SQL and what is like it have them."""

from __future__ import annotations

from embedq_batch.content.rows import RowId


def quoted(value: RowId) -> str:
    """An id as SQL has it."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
