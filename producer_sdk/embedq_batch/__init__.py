"""embedq for tables of texts: a source in, a target of vectors out, resumed after whatever happened.

    summary = await embedq_batch.run("rows.parquet", "vectors.parquet", servers="localhost:9092", text="body", id="key")

Sources and targets of your own are objects with the methods of `Source` and `Sink`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
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

# The command line's plug-ins are in this package, and their help needs neither pyarrow nor numpy: what is above is imported when it
# is first asked for. Type checkers see the imports above, and not these lines.
if not TYPE_CHECKING:
    _HOMES: Final = {
        "run": "embedq_batch.api",
        "Columns": "embedq_batch.content.columns",
        "Problem": "embedq_batch.content.rows",
        "RowBatch": "embedq_batch.content.rows",
        "Shape": "embedq_batch.content.rows",
        "VectorBatch": "embedq_batch.content.rows",
        "RunOptions": "embedq_batch.running.options",
        "Check": "embedq_batch.running.run",
        "Summary": "embedq_batch.running.run",
        "PartsRecord": "embedq_batch.sinks.sink",
        "Sink": "embedq_batch.sinks.sink",
        "Source": "embedq_batch.sources.source",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_HOMES[name]), name)
        return value
