"""What stands beside a vector in stores whose records have no columns."""

from __future__ import annotations

from typing import Any

from embedq_batch.content.rows import VectorBatch


def payloads(batch: VectorBatch) -> list[dict[str, Any]]:
    """What belongs to each vector, by name."""
    found = []
    for n, row in enumerate(batch.kept_rows()):
        known: dict[str, Any] = {
            "id": batch.ids[n],
            "model_version": batch.model_version,
            "tokens": int(batch.tokens[n]),
        }
        if batch.rows is not None and batch.spans is not None:
            known |= {
                "row": batch.rows[n],
                "start": int(batch.spans[n, 0]),
                "end": int(batch.spans[n, 1]),
            }
        found.append(known | row)
    return found
