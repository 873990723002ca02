"""The service that dies in a step of a reload: `python -m tests.helpers.dies_in_step FILE`.

FILE names the step. Once that has been published of a command, the file is gone and so is the process: its next start lives.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from embedq_consumer import process
from embedq_consumer.lifecycle.status_reporter import StatusReporter


def main(file: Path) -> int:
    update = StatusReporter.update

    async def deadly(self: StatusReporter, step: Any, state: Any, **more: Any) -> None:
        await update(self, step, state, **more)
        if more.get("command") is not None and file.exists() and file.read_text() == step:
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    StatusReporter.update = deadly  # type: ignore[method-assign]
    return process.main()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
