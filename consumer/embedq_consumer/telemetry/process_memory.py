"""How much memory this process holds, of how much."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    try:
        return int(statm.read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None


def machine_bytes() -> int:
    """Bytes of memory that the machine has."""
    return _PAGE * os.sysconf("SC_PHYS_PAGES")
