"""What every benchmark's JSON says about where it ran."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GPU_PACKAGES = (
    "embedq",
    "torch",
    "triton",
    "flash-attn-4",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
    "torch-c-dlpack-ext",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)
"""Everything whose version can change a figure of the GPU path; which of their kernels ran, `Encoder.kernels` says."""


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory, and the versions of the named packages."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def write(name: str, results: dict[str, Any], *packages: str) -> Path:
    """Write one run's JSON under benchmarks/results/; the file's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(*packages),
        "results": results,
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
