"""Writing vectors to files: JSON lines, or .npy row by row, without holding the array in memory.

A file that is there is never lost: it is written under another name, `NAME.part`, and gets its own when it is complete. A run
that ends before leaves that part, with all that it was told.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import msgspec
import numpy as np
import orjson

from embedq_sdk.cli.text_sources import BadSource
from embedq_sdk.embeddings import mixed
from embedq_sdk.errors import EmbedError, JobFailed
from embedq_sdk.stream import Embedded


class FileExists(BadSource):
    """A file is in the way; the message says what to do."""


class VectorWriter(Protocol):
    """Takes every item of a stream, in order, failed ones included."""

    @property
    def left(self) -> Part | None:
        """What a run that did not end left, if it left anything."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, item: Embedded, id: str | int | None = None) -> None: ...


class Part(msgspec.Struct, frozen=True):
    """A file that is not complete, and how many texts are in it."""

    path: Path
    texts: int


class PartFile:
    """A file that has the name `NAME.part` until it is complete.

    Raises:
        FileExists: there is one of either name, unless `force` is given; entering says so before anything is written, and
            leaving if the file came meanwhile.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self._path = path
        self._force = force
        self.part = path.with_name(f"{path.name}.part")

    def open(self) -> IO[bytes]:
        """The file to write to."""
        self._refuse_if_there()
        try:
            return open(self.part, "wb" if self._force else "xb")
        except FileExistsError:
            raise FileExists(
                f"{self.part} is what an earlier run left, or another run writes it: move it away, or give --force to overwrite it"
            ) from None

    def complete(self, file: IO[bytes]) -> None:
        """Everything is written: give the file its name."""
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._refuse_if_there()
        os.replace(self.part, self._path)

    def leave(self, file: IO[bytes], texts: int) -> Part | None:
        """The run ended before. What was written stays, unless that is nothing."""
        file.close()
        if texts == 0:
            self.part.unlink()
            return None
        return Part(self.part, texts)

    def _refuse_if_there(self) -> None:
        if not self._force and self._path.exists():
            raise FileExists(f"{self._path} exists: give another name, or --force to overwrite it")


class JsonLines:
    """One JSON object per line, written as vectors arrive, to the file at `path`, or to `stream` if there is none.

    A text that failed has `error` instead of `embedding`. A number has the fewest digits that read back as the same float32.
    """

    def __init__(self, path: Path | None, stream: IO[bytes], *, with_text: bool, force: bool = False) -> None:
        self._file = None if path is None else PartFile(path, force=force)
        self._target = stream
        self._with_text = with_text
        self._last = -1
        self.left: Part | None = None

    def __enter__(self) -> Self:
        if self._file is not None:
            self._target = self._file.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            self._target.flush()
        elif kind is None:
            self._file.complete(self._target)
        else:
            self.left = self._file.leave(self._target, self._last + 1)

    def write(self, item: Embedded, id: str | int | None = None) -> None:
        """Write one line; with the id of the text, if it has one."""
        line: dict[str, Any] = {"index": item.index}
        if id is not None:
            line["id"] = id
        if self._with_text:
            line["text"] = item.text
        if item.vector is None:
            line["error"] = _error_fields(item.error)
        else:
            line |= {
                "embedding": orjson.Fragment(orjson.dumps(item.vector, option=orjson.OPT_SERIALIZE_NUMPY)),
                "model_version": item.model_version,
                "tokens": item.tokens,
            }
        if item.span is not None:
            line["span"] = item.span
        self._target.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._last = item.index
        if self._file is None:
            self._target.flush()  # whoever reads it may wait for this line before giving us another text


def _error_fields(error: EmbedError | None) -> dict[str, Any]:
    code = error.code if isinstance(error, JobFailed) else type(error).__name__
    return {"code": code, "message": str(error)}


class NpyFile:
    """A .npy file of shape (texts, dimensions), written row by row; the header is written again at the end, when the
    number of rows is known.

    A text that failed is a row of NaN (of zeros with dtype "binary"). Without a single vector their width is not known, and
    is 0. A part that is left is a .npy file, too. Vectors of two model versions are never written to one file.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self._part = PartFile(path, force=force)
        self._rows = 0
        self._gaps = 0
        self._like: np.ndarray[Any, Any] | None = None
        self._version: str | None = None
        self.left: Part | None = None

    def __enter__(self) -> Self:
        self._file = self._part.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._header()
        if kind is None:
            self._part.complete(self._file)
        else:
            self.left = self._part.leave(self._file, self._rows)

    def write(self, item: Embedded, id: str | int | None = None) -> None:
        """Write one row. Rows have no ids: they are in the order of the texts."""
        if item.vector is None:
            self._gaps += 1
            if self._like is not None:
                self._fill_gaps(self._like)
            return
        if self._like is None:
            self._like = item.vector
            self._version = item.model_version
            self._header()
            self._fill_gaps(item.vector)
        elif item.model_version != self._version or item.vector.shape != self._like.shape:
            raise mixed([self._version, item.model_version])
        self._file.write(item.vector.tobytes())
        self._rows += 1

    def _fill_gaps(self, like: np.ndarray[Any, Any]) -> None:
        empty = np.zeros_like(like) if like.dtype == np.uint8 else np.full_like(like, np.nan)
        self._file.write(empty.tobytes() * self._gaps)
        self._rows += self._gaps
        self._gaps = 0

    def _header(self) -> None:
        """Write the header. numpy pads it so that the first axis may grow in place."""
        like = np.zeros(0, np.float32) if self._like is None else self._like
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(like.dtype),
                "fortran_order": False,
                "shape": (self._rows + self._gaps, len(like)),
            },
        )
