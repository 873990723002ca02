"""Programs in an interpreter of their own, where every warning is an error and nothing may be said on the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.helpers.support import patient

ROOT: Final = Path(__file__).parents[2]

STRICT: Final = ("-W", "error", "-W", "ignore:This process:DeprecationWarning")
"""The one warning that is allowed says, from Python 3.12 on, that a process with threads is forked, which is what is tested."""


def command(program: str, *arguments: str) -> list[str]:
    """How a program is started; it may import the tests' helpers."""
    return [sys.executable, *STRICT, "-c", program, *arguments]


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would measure or log in the program."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


def printed(program: str, *arguments: str, seconds: float = 60, **more: str) -> str:
    """What a program prints that ends well, and says nothing else."""
    done = subprocess.run(
        command(program, *arguments),
        env=environment(**more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(seconds),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
