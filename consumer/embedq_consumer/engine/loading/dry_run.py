"""A process of its own tries a model before this one loads it: what would crash, hang or fill the memory does so there.

Native code reads a model's files: a tokenizer that makes it abort, a configuration that makes transformers build a million
layers. No guard in Python stops that, but another process is cheap. It does not read the weights: of those, only the header is
ever parsed, which is checked here (`safety/headers.py`), and their bytes reach nothing but arithmetic.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO, Final

import msgspec

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.safety.cancellation import Cancellation
from embedq_consumer.engine.safety.foreign import OFFLINE

__all__ = ["Verdict", "Wanted", "dry_run"]

_PROCESS: Final = "embedq_consumer.engine.loading.dry_run_process"
_MEMORY_BYTES: Final = 6 * 1024**3
"""Of data: libraries take half a gigabyte, the largest tokenizers that are known one more while transformers converts them."""
_TAIL_BYTES: Final = 2000
"""Of what the process said on stderr: its end has the reason."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is asked for, as JSON on its stdin."""

    path: str
    root: str | None
    parent: int
    within_s: float
    memory_bytes: int


class Verdict(msgspec.Struct, frozen=True):
    """What it says, as JSON on its stdout: why the model cannot be served, None if nothing speaks against it."""

    error: str | None


def dry_run(
    path: Path,
    root: Path | None,
    *,
    within_s: float,
    command: tuple[str, ...] = (),
    cancel: Cancellation | None = None,
) -> None:
    """Let a process try `path`: its tokenizer on texts of every kind, its layers without their weights. Blocks.

    Raises:
        ModelError: the model cannot be served; or the process crashed, ran out of memory, or took longer than `within_s`.
        Abandoned: `cancel` was set meanwhile; the process is gone.
    """
    cancel = cancel or Cancellation()
    wanted = Wanted(
        path=str(path),
        root=None if root is None else str(root),
        parent=os.getpid(),
        within_s=within_s,
        memory_bytes=_MEMORY_BYTES,
    )
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        try:
            code = _run(wanted, command or (sys.executable, "-m", _PROCESS), said, complained, cancel)
        except TimeoutExpired:
            raise ModelError(f"{path}: a dry run of it did not end within {within_s:g} s") from None
        if code:
            raise ModelError(f"{path}: a dry run of it ended by {_how(code)}{_last_line(complained)}")
        said.seek(0)
        try:
            verdict = msgspec.json.decode(said.read(1 << 20), type=Verdict)
        except msgspec.DecodeError as error:
            raise ModelError(f"{path}: a dry run of it gave no verdict") from error
    if verdict.error is not None:
        raise ModelError(verdict.error)


def _run(
    wanted: Wanted,
    command: tuple[str, ...],
    said: IO[bytes],
    complained: IO[bytes],
    cancel: Cancellation,
) -> int:
    """The exit code; the process is gone when this returns or raises."""
    process = Popen(
        command,
        env=_environment(),
        stdin=PIPE,
        stdout=said,
        stderr=complained,
        start_new_session=True,
    )
    try:
        with cancel.stopping(process.kill):
            process.communicate(msgspec.json.encode(wanted), timeout=wanted.within_s)
        cancel.check()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process.returncode


def _environment() -> dict[str, str]:
    """Ours without our settings, which hold passwords: foreign files are read there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")}
    return kept | {
        **OFFLINE,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _how(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_line(complained: IO[bytes]) -> str:
    """The end of its stderr, if it said anything."""
    size = complained.seek(0, os.SEEK_END)
    complained.seek(max(0, size - _TAIL_BYTES))
    lines = complained.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""
