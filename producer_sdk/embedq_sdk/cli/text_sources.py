"""Where `embedq embed` finds its texts: on the command line, on standard input, or in a file, which is read as what it is.

A file of objects or columns that is taken for lines of text gives vectors of its source code, and nothing says so. So a file
is known by its name, and text that looks like one by what its first line holds; what cannot be read is refused with the
command that makes it readable.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import PurePath
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from embedq_sdk.cli.standard_input import InputLines

Format = Literal["lines", "jsonl", "csv", "tsv"]

STANDARD_INPUT: Final = "-"
_BY_SUFFIX: Final[dict[str, Format]] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
_NDJSON: Final = "embedq embed - --format jsonl"
_CONVERT: Final = {
    ".json": f"jq -c '.[]' {{file}} | {_NDJSON}",
    ".parquet": "python -c \"import pandas; print(pandas.read_parquet('{file}').to_json(orient='records', lines=True))\""
    f" | {_NDJSON}",
    ".gz": "gzip -dc {file} | embedq embed -",
    ".zst": "zstd -dc {file} | embedq embed -",
    ".npy": "EmbedClient.embed_many(numpy.load('{file}')) in Python",
    ".xlsx": "save it as CSV",
    ".pdf": "pdftotext {file} - | embedq embed -",
    ".docx": "save it as text",
}
"""How to make what is no text readable, by the end of its name."""
_MAGIC: Final = {
    b"PAR1": ".parquet",
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\x93NUMPY": ".npy",
    b"%PDF": ".pdf",
}
"""The same by how its bytes begin."""
_HEAD: Final = 64 * 1024
"""Bytes of the first line that are read before it is known to be one."""
_LONGEST_FIELD: Final = 16 << 20
"""Characters of a CSV field; more than a job carries, so that the client says what is wrong. Python's default is 131,072."""


class Readable(Protocol):
    """Lines of bytes, as a binary file has them."""

    def readline(self, limit: int = -1, /) -> bytes: ...
    def __iter__(self) -> Iterator[bytes]: ...


class BadSource(Exception):
    """The texts cannot be read; the message says why, and what to do."""


class SourceText(NamedTuple):
    """A text, and the id that its record has, if it has one."""

    text: str
    id: str | int | None = None


class _Record(msgspec.Struct):
    text: str
    id: str | int | None = None


@contextmanager
def open_texts(path: str, format: Format | None, standard_input: Readable) -> Iterator[Iterator[SourceText]]:
    """The texts of a file, or of standard input for `-`, one after the other; `format` None: as the file is.

    Raises:
        BadSource: at once if the file cannot be opened or is no text; while reading, with the place of what is wrong.
    """
    suffix = PurePath(path).suffix.lower()
    if format is None and suffix in _CONVERT:
        raise _unreadable(path, suffix)
    try:
        opened = None if path == STANDARD_INPUT else open(path, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror}") from None
    file: Readable = standard_input if opened is None else opened
    try:
        head = file.readline(_HEAD)
        if format is None:
            for magic, kind in _MAGIC.items():
                if head.startswith(magic):
                    raise _unreadable(path, kind)
        if head and not head.endswith(b"\n"):
            head += file.readline()
        if format is None:
            format = _BY_SUFFIX.get(suffix) or _lines_unless_objects(path, head)
        lines: Iterable[bytes] = file
        if isinstance(file, InputLines):
            file.unread(head)  # so that it knows that a line is there
        elif head:
            lines = chain([head], file)
        yield _READERS[format](lines, path)
    finally:
        if opened is not None:
            opened.close()


def count_lines(path: str) -> int:
    """Lines of a file, each of which is a text or a record at most."""
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _unreadable(path: str, suffix: str) -> BadSource:
    shown = path if path != STANDARD_INPUT else "FILE"
    return BadSource(
        f"{path}: expected a text on each line, JSON Lines or CSV; to read {suffix}: {_CONVERT[suffix].format(file=shown)}"
    )


def _lines_unless_objects(path: str, start: bytes) -> Format:
    """Texts, a line each, unless the first line is a JSON object or the beginning of a list of them.

    Raises:
        BadSource: it is, and nothing says what is meant.
    """
    first = start.strip()
    if first.startswith((b"{", b"[{")) or first == b"[":
        try:
            is_record = isinstance(msgspec.json.decode(first), dict)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            is_record = False
        if is_record:
            raise BadSource(
                f"{path}: its first line is a JSON object: --format jsonl reads `text` and `id` of each line, "
                "--format lines embeds the lines as they are"
            )
        if first in (b"{", b"[") or first.startswith(b"[{"):
            raise BadSource(
                f"{path}: looks like JSON, not like a text on each line: jq -c '.[]' {path} | {_NDJSON}; "
                "--format lines embeds the lines as they are"
            )
    return "lines"


def _lines(file: Iterable[bytes], path: str) -> Iterator[SourceText]:
    """Only a line feed ends a line: a text may contain any other kind of line break."""
    for number, line in enumerate(file, start=1):
        yield SourceText(_decoded(line, path, number).rstrip("\r\n"))


def _json_lines(file: Iterable[bytes], path: str) -> Iterator[SourceText]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line, type=_Record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadSource(
                f"{path}: line {number}: expected a JSON object with a string in `text` and, if any, a string or an "
                f"integer in `id`: {error}"
            ) from None
        yield SourceText(record.text, record.id)


def _csv(delimiter: str) -> Callable[[Iterable[bytes], str], Iterator[SourceText]]:
    def read(file: Iterable[bytes], path: str) -> Iterator[SourceText]:
        csv.field_size_limit(_LONGEST_FIELD)
        decoded = (_decoded(line, path, number) for number, line in enumerate(file, start=1))
        rows = csv.DictReader(_without_mark(decoded), delimiter=delimiter, strict=True)
        try:
            names = rows.fieldnames or []
            if "text" not in names:
                shown = ", ".join(map(repr, names[:10]))
                raise BadSource(
                    f"{path}: expected a column `text` in the first line, got {shown or 'nothing'}"
                )
            for row in rows:
                if row["text"] is None:
                    raise BadSource(f"{path}: line {rows.line_num}: ends before the column `text`")
                yield SourceText(row["text"], row.get("id"))
        except csv.Error as error:
            raise BadSource(f"{path}: line {rows.line_num}: {error}") from None

    return read


def _without_mark(lines: Iterable[str]) -> Iterator[str]:
    """Spreadsheets put a byte order mark before the first column's name."""
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line


def _decoded(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise BadSource(f"{path}: expected UTF-8, got other bytes in line {number}") from None


_READERS: Final[dict[Format, Callable[[Iterable[bytes], str], Iterator[SourceText]]]] = {
    "lines": _lines,
    "jsonl": _json_lines,
    "csv": _csv(","),
    "tsv": _csv("\t"),
}
