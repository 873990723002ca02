"""The service that stays in a step of a reload: `python -m tests.helpers.waits_in_step FILE`.

FILE names the step. Once that has been published of a command, it goes on only when the file is gone.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

from embedq_consumer import process
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from tests.helpers.support import wait_until


def main(file: Path) -> int:
    update = StatusReporter.update

    def is_elsewhere(step: str) -> bool:
        return not file.exists() or file.read_text() != step

    async def patient_update(self: StatusReporter, step: Any, state: Any, **more: Any) -> None:
        await update(self, step, state, **more)
        if more.get("command") is not None:
            await wait_until(
                partial(asyncio.to_thread, is_elsewhere, step), within=300, what=f"the end of {step}"
            )

    StatusReporter.update = patient_update  # type: ignore[method-assign]
    return process.main()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
