"""The command line as a user runs it: another process, an exit code, and what is on which stream."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from tempfile import TemporaryFile
from typing import IO, Any

import msgspec

from embedq_sdk.cli import main
from tests.helpers import warm_start

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
    whole = os.environ | dict(environ)
    with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as err:
        given.write(stdin.encode() if isinstance(stdin, str) else stdin)
        given.seek(0)
        command = [__name__, *arguments]
        process = await asyncio.to_thread(
            warm_start.start, "command", command, whole, out=out, err=err, stdin=given
        ) or await asyncio.create_subprocess_exec(
            sys.executable, "-m", *command, stdin=given, stdout=out, stderr=err, env=whole
        )
        try:
            async with asyncio.timeout(within):
                code = await process.wait()
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
        done = Done(code, *(_all_of(stream).decode() for stream in (out, err)))
    assert "Traceback" not in done.err, done.err
    return done


def _all_of(stream: IO[bytes]) -> bytes:
    stream.seek(0)
    return stream.read()


if __name__ == "__main__":
    main()
