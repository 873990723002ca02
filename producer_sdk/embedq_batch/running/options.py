"""What a run is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from embedq_batch.manifest.plan import OnModelChange
from embedq_sdk.job_options import JobOptions


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a run goes. What decides the vectors is in `job`; its lane is always bulk."""

    job: JobOptions = JobOptions(lane="bulk")
    about: dict[str, Any] = {}
    """What else the manifest holds the run to: columns and template."""
    on_model_change: OnModelChange = "finish"
    only_changed: bool = False
    """After a complete run: embed rows that are new or changed, or whose model version is old."""
    again: bool = False
    """Begin anew, whatever is done."""
    retry_errors: bool = False
    delete_missing: bool = False
    """Delete what the source no longer has, when all of it was read."""
    force: bool = False
    """Overwrite a file that no manifest knows."""
    max_error_share: float = 0.05
    """The run stops when more of its rows failed, once there are `LEAST_FOR_SHARE`."""
    errors: Path | None = None
    """The file that failed rows are written to, as JSON Lines."""
    metrics: Path | None = None
    """The file that the run's figures are written to, in Prometheus' text format."""
    check: int = 0
    """Rows that are embedded anew in the end, and compared with what the target gives back."""
    job_texts: int = 64
    """Rows in a job."""
    in_flight: int = 4096
    """Rows that are read and not yet answered, at most."""
    command: str = ""
    """What to type to go on, for messages and the manifest."""
