"""What a machine does while something runs on it: GPUs by nvidia-smi, processor time of threads by /proc."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

import numpy as np

FIELDS = ("utilization.gpu", "power.draw", "clocks.sm")
EVERY_MS = 200
TICKS = os.sysconf("SC_CLK_TCK")


class Gpus:
    """Samples of every GPU from `with` on; nothing where there is no nvidia-smi."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, list[float]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if shutil.which("nvidia-smi"):
            self._process = subprocess.Popen(
                [
                    "nvidia-smi",
                    f"--query-gpu=index,{','.join(FIELDS)}",
                    "--format=csv,noheader,nounits",
                    "-lms",
                    str(EVERY_MS),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def between(self, begin: float, end: float) -> dict[str, dict[str, float]]:
        """Means by GPU of what was seen between two `time.time()`: percent of the time busy, watts, megahertz."""
        found: dict[str, dict[str, float]] = {}
        for gpu in sorted({index for _, index, _ in self._samples}):
            seen = [row for at, index, row in self._samples if index == gpu and begin <= at <= end]
            if seen:
                means = np.mean(seen, axis=0).tolist()
                found[str(gpu)] = {name: round(mean, 1) for name, mean in zip(FIELDS, means, strict=True)}
        return found

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            index, *values = line.split(",")
            try:
                self._samples.append((time.time(), int(index), [float(value) for value in values]))
            except ValueError:  # a field that this GPU does not tell
                continue


def family(pid: int) -> list[int]:
    """A process and its children, oldest first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def thread_seconds(pid: int) -> dict[int, float]:
    """Processor seconds of each thread so far; the first one of a process has the process's own number."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found[int(task.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def busy(before: dict[int, float], after: dict[int, float], main: int, seconds: float) -> dict[str, float]:
    """Cores that a process kept busy between two looks: its first thread (the event loop), its busiest others, all."""
    spent = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
    others = sorted((s for thread, s in spent.items() if thread != main), reverse=True)
    shares = {"event loop": spent.get(main, 0.0), "all": sum(spent.values())}
    shares |= {f"thread {place}": other for place, other in enumerate(others[:4], start=1)}
    return {name: round(share / seconds, 3) for name, share in shares.items()}
