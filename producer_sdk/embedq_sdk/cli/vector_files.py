"""Writing vectors to files: JSON lines, or .npy row by row, without holding the array in memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import msgspec
import numpy as np

from embedq_sdk.embeddings import mixed
from embedq_sdk.errors import EmbedError, JobFailed
from embedq_sdk.stream import Embedded


class VectorWriter(Protocol):
    """Takes every item of a stream, in order, failed ones included."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, item: Embedded, id: str | int | None = None) -> None: ...


class JsonLines:
    """One JSON object per line, written as vectors arrive, to the file at `path`, or to `stream` if there is none.

    A text that failed has `error` instead of `embedding`.
    """

    def __init__(self, path: Path | None, stream: IO[bytes], *, with_text: bool) -> None:
        self._path = path
        self._target = stream
        self._with_text = with_text

    def __enter__(self) -> Self:
        if self._path is not None:
            self._target = open(self._path, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._target.flush()
        if self._path is not None:
            self._target.close()

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
                "embedding": item.vector.tolist(),
                "model_version": item.model_version,
                "tokens": item.tokens,
            }
        if item.span is not None:
            line["span"] = item.span
        self._target.write(msgspec.json.encode(line) + b"\n")
        if self._path is None:
            self._target.flush()  # whoever reads it may wait for this line before giving us another text


def _error_fields(error: EmbedError | None) -> dict[str, Any]:
    code = error.code if isinstance(error, JobFailed) else type(error).__name__
    return {"code": code, "message": str(error)}


class NpyFile:
    """A .npy file of shape (texts, dimensions), written row by row; the header is written again at the end, when the
    number of rows is known.

    A text that failed is a row of NaN (of zeros with dtype "binary"). The file appears under its name when it is complete,
    and not at all after an error. Vectors of two model versions are never written to one file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._rows = 0
        self._gaps = 0
        self._like: np.ndarray[Any, Any] | None = None
        self._version: str | None = None

    def __enter__(self) -> Self:
        self._file = open(self._part, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._like is not None:
                self._header()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None and self._like is not None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink()

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
        if self._like is None:
            raise RuntimeError("the header is written before any vector is known. This is a bug.")
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._like.dtype),
                "fortran_order": False,
                "shape": (self._rows, len(self._like)),
            },
        )
