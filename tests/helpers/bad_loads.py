"""The service whose loads hang, or end the process, where a directory says so: `python -m tests.helpers.bad_loads`.

A file `hangs` in the directory makes its load wait for ever; NAME.begun beside the directory gets a byte for each (a directory that
changes would have another dry run). `crashes` ends the process as native code does, `breaks` takes the device with it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from embedq_consumer import opening, process
from embedq_consumer.engine import DeviceLost, load_encoder
from embedq_consumer.leaving import ExitDeadline, leave


def load(path: Path, *args: Any, **kwargs: Any) -> Any:
    if (path / "hangs").exists():
        with path.with_suffix(".begun").open("ab") as file:
            file.write(b"1")
        time.sleep(100_000)
    if (path / "crashes").exists():
        os.abort()
    if (path / "breaks").exists():
        raise DeviceLost("device 0: an illegal memory access")
    return load_encoder(path, *args, **kwargs)


if __name__ == "__main__":
    opening.load_encoder = load  # type: ignore[attr-defined]  # the one seam of a whole process
    leave(process.main(ExitDeadline().arm))
