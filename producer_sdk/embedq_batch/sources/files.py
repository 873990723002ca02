"""Files of a source: a path, several, or a glob."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from embedq_batch.errors import BadSource


def found_files(paths: Sequence[str]) -> list[Path]:
    """The files that are meant, in the order of their names within each glob.

    Raises:
        BadSource: there is none of them.
    """
    files: list[Path] = []
    for path in paths:
        if Path(path).is_file():
            files.append(Path(path))
            continue
        matched = sorted(Path(each) for each in glob.glob(path, recursive=True) if Path(each).is_file())
        if not matched:
            raise BadSource(source=path, reason="no such file")
        files.extend(matched)
    return list(dict.fromkeys(files))
