"""embedq for tables of texts: a source in, a target of vectors out, resumed after whatever happened.

    summary = await embedq_batch.running.run("rows.parquet", "vectors.parquet", servers="localhost:9092", text="body", id="key")

Sources and targets of your own are objects with the methods of `Source` and `Sink`.
"""

from __future__ import annotations

from embedq_batch.api import run
from embedq_batch.content.columns import Columns
from embedq_batch.content.rows import Problem, RowBatch, Shape, VectorBatch
from embedq_batch.running.options import RunOptions
from embedq_batch.running.run import Check, Summary
from embedq_batch.sinks.sink import PartsRecord, Sink
from embedq_batch.sources.source import Source

__all__ = [
    "Check",
    "Columns",
    "PartsRecord",
    "Problem",
    "RowBatch",
    "RunOptions",
    "Shape",
    "Sink",
    "Source",
    "Summary",
    "VectorBatch",
    "run",
]
