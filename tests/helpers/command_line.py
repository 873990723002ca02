"""The command line as a user runs it: another process, an exit code, and what is on which stream."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

Run = Callable[..., Awaitable["Done"]]


class Done(msgspec.Struct):
    """What a command left."""

    code: int
    out: str
    err: str

    def lines(self) -> list[dict[str, Any]]:
        """The output as JSON lines."""
        return [msgspec.json.decode(line) for line in self.out.splitlines()]


async def run_embedq(
    *arguments: str, environ: Mapping[str, str], stdin: str | bytes = "", within: float = 60.0
) -> Done:
    """Run `embedq` with these variables on top of ours. It never shows a traceback."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from embedq_sdk.cli import main; main()", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | dict(environ),
    )
    async with asyncio.timeout(within):
        out, err = await process.communicate(stdin.encode() if isinstance(stdin, str) else stdin)
    assert b"Traceback" not in err, err.decode()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())
