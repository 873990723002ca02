"""Which columns of a source are a row's text, its id and what goes along, and how they are read whatever they hold."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from embedq_batch.content.rows import Problem, RowBatch, RowId
from embedq_batch.errors import BadSource
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.job_options import MAX_JOB_BYTES

MISSING: Final = Problem("missing_text", "expected a text, got null")
NOT_UTF8: Final = Problem("invalid_utf8", "expected UTF-8, got other bytes")
NO_ID: Final = Problem("missing_id", "expected an id, got null")
BAD_ID: Final = Problem("invalid_id", "expected valid Unicode without null characters")
_MOST_SHOWN: Final = 10


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """What of a row is its text: a column, or a template over columns such as "{title}: {body}"; and what else is taken.

    Without an id column a row's id is its number in the source, from 0.

    Raises:
        InvalidArgument: text and template are both given, or the template cannot be read.
    """

    text: str | None = None
    template: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.text is not None and self.template is not None:
            raise InvalidArgument(argument="template", expected="no value beside a text column", got="one")
        self.pieces()

    @property
    def text_names(self) -> list[str]:
        """The columns that make the text."""
        if self.template is None:
            return [self.text or "text"]
        return list(dict.fromkeys(name for _, name in self.pieces() if name is not None))

    @property
    def names(self) -> list[str]:
        """All columns that are read, each once."""
        return list(dict.fromkeys([*self.text_names, *([self.id] if self.id else []), *self.keep]))

    def pieces(self) -> list[tuple[str, str | None]]:
        """The template as literal text and the column that follows it, None after the last."""
        if self.template is None:
            return []
        expected = "text with columns as {name}, and {{ and }} for braces"
        try:
            parsed = [
                (text, name)
                for text, name, form, conversion in string.Formatter().parse(self.template)
                if not form and not conversion
            ]
        except ValueError as error:
            raise InvalidArgument(argument="template", expected=expected, got=str(error)) from None
        if not any(name for _, name in parsed) or any(name == "" for _, name in parsed):
            raise InvalidArgument(argument="template", expected=expected, got=repr(self.template[:80]))
        return parsed

    def check(self, found: Sequence[str], source: str) -> None:
        """All columns that are read are there.

        Raises:
            BadSource: one is not.
        """
        missing = [name for name in self.names if name not in found]
        if missing:
            shown = ", ".join(found[:_MOST_SHOWN]) + (", …" if len(found) > _MOST_SHOWN else "")
            hint = (
                "; --text-column or --template says which is the text"
                if self.text is None and self.template is None
                else ""
            )
            raise BadSource(
                source=source,
                reason=f"no column {', '.join(map(repr, missing))} among {shown or 'none'}{hint}",
            )


def recalled(job: Mapping[str, Any]) -> Columns:
    """The columns of an earlier run, from what its manifest holds it to."""
    text = job.get("text")
    template = isinstance(text, str) and "{" in text
    return Columns(
        text=None if template else text,
        template=text if template else None,
        id=job.get("id"),
        keep=tuple(job.get("keep") or ()),
    )


class RowReader:
    """Makes rows of records. One reader reads one source, from its first row on: rows without an id are counted.

    `ids` is what ids are: integers, and then another one is a problem, or else all are made strings.
    """

    def __init__(self, columns: Columns, ids: type[str | int]) -> None:
        self._columns = columns
        self._ids = ids
        self._names = columns.text_names
        self._pieces = columns.pieces()
        self._next = 0

    def of_arrow(self, batch: pa.RecordBatch) -> RowBatch:
        """Rows of an Arrow batch: all at once where every one is good, and else one by one."""
        whole = self._whole_texts([batch.column(name) for name in self._names])
        texts: list[str | Problem]
        if whole is not None:
            texts = whole
        else:
            columns = {name: _values(batch.column(name)) for name in self._names}
            texts = [
                self._text({name: values[n] for name, values in columns.items()})
                for n in range(batch.num_rows)
            ]
        kept = _readable(batch.select(list(self._columns.keep)), texts) if self._columns.keep else None
        if self._columns.id is None:
            return self._rows(texts, None, kept)
        column = batch.column(self._columns.id)
        ids = _whole_ids(column, self._ids)
        if ids is None:
            return self._rows(texts, _values(column), kept)
        self._next += len(texts)
        return RowBatch(ids=ids, texts=texts, kept=kept)

    def _whole_texts(self, columns: list[pa.Array]) -> list[Any] | None:
        """The texts of these columns; None where a value is missing, no text, no UTF-8, or makes a text that is too long."""
        if not all(map(_is_sound, columns)):
            return None
        text = columns[0]
        if self._pieces:
            found = dict(
                zip(self._names, (column.cast(pa.large_string()) for column in columns), strict=True)
            )
            parts: list[Any] = []
            for literal, name in self._pieces:
                parts.append(pa.scalar(literal, pa.large_string()))
                if name is not None:
                    parts.append(found[name])
            text = pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))
        longest = pc.max(pc.binary_length(text)).as_py()
        return None if longest is not None and longest > MAX_JOB_BYTES else _listed(text)

    def of_records(
        self, records: Sequence[Mapping[str, Any] | Problem], schema: pa.Schema | None
    ) -> RowBatch:
        """Rows of records of any kind. A kept value that the schema does not allow makes its row a problem."""
        texts: list[str | Problem] = []
        kept: list[dict[str, Any]] = []
        ids = [
            None if isinstance(each, Problem) or self._columns.id is None else each.get(self._columns.id)
            for each in records
        ]
        for record in records:
            text = record if isinstance(record, Problem) else self._text(record)
            kept.append(
                {} if isinstance(record, Problem) else {name: record.get(name) for name in self._columns.keep}
            )
            texts.append(text)
        batch = None if schema is None else fitted(kept, schema, texts)
        return self._rows(texts, None if self._columns.id is None else ids, batch)

    def _rows(
        self, texts: list[str | Problem], ids: Sequence[Any] | None, kept: pa.RecordBatch | None
    ) -> RowBatch:
        first, self._next = self._next, self._next + len(texts)
        if ids is None:
            return RowBatch(ids=list(range(first, self._next)), texts=texts, kept=kept)
        named: list[RowId] = []
        for n, id in enumerate(ids):
            known = row_id(id, self._ids)
            if isinstance(known, Problem):
                if isinstance(texts[n], str):
                    texts[n] = known
                known = f"row {first + n}"
            named.append(known)
        return RowBatch(ids=named, texts=texts, kept=kept)

    def _text(self, record: Mapping[str, Any]) -> str | Problem:
        found = {name: as_text(record.get(name)) for name in self._names}
        if not self._pieces:
            return checked(found[self._names[0]])
        values = [found[name] for _, name in self._pieces if name is not None]
        for value in values:
            if isinstance(value, Problem) and value is not MISSING:
                return value
        if all(value is MISSING for value in values):
            return MISSING
        pieces = []
        for literal, name in self._pieces:
            value = "" if name is None else found[name]
            pieces.append(literal + (value if isinstance(value, str) else ""))
        return checked("".join(pieces))


def as_text(value: Any) -> str | Problem:
    """A value as text, or why it is none. Numbers are written out: a template may want a year."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return NOT_UTF8
    if isinstance(value, (list, dict)):
        return Problem("invalid_text", f"expected a text, got {type(value).__name__}")
    return str(value)


def checked(text: str | Problem) -> str | Problem:
    """A text that a job can carry, or why it cannot."""
    if isinstance(text, Problem):
        return text
    try:
        size = text_bytes(text)
    except UnicodeEncodeError as error:
        return Problem(
            "invalid_utf8", f"expected valid Unicode, got a lone surrogate at position {error.start}"
        )
    if size > MAX_JOB_BYTES:
        return Problem("text_too_long", f"expected at most {MAX_JOB_BYTES:,} bytes of UTF-8, got {size:,}")
    return text


def text_bytes(text: str) -> int:
    """Bytes of a text as UTF-8.

    Raises:
        UnicodeEncodeError: it has a lone surrogate.
    """
    return len(text) if text.isascii() else len(text.encode())


def row_id(value: Any, kind: type[str | int]) -> RowId | Problem:
    """A value as an id, or why it is none."""
    if value is None:
        return NO_ID
    if kind is int:
        if type(value) is int and -(1 << 63) <= value < 1 << 63:
            return value
        return Problem(
            "invalid_id", f"expected an integer of 64 bits, as in the first rows, got {type(value).__name__}"
        )
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return Problem("invalid_id", NOT_UTF8.message)
    named = str(value)
    return named if is_sound_id(named) else BAD_ID


def is_sound_id(id: str) -> bool:
    """Whether every target can have this id: valid Unicode without null characters, which PostgreSQL, C and SQLite end a text at."""
    if "\0" in id:
        return False
    try:
        text_bytes(id)
    except UnicodeEncodeError:
        return False
    return True


def _is_sound(column: pa.Array) -> bool:
    """Whether all values are texts, and UTF-8."""
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return False
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _whole_ids(column: pa.Array, kind: type[str | int]) -> list[RowId] | None:
    """A column as ids; None where a value is none."""
    if kind is int:
        good = column.null_count == 0 and pa.types.is_signed_integer(column.type)
        return _listed(column) if good else None
    if not _is_sound(column):
        return None
    ids = _listed(column)
    return None if "\0" in "".join(ids) else ids


def _listed(column: pa.Array) -> list[Any]:
    """The values of a column without nulls, several times as fast as `to_pylist`, which makes an object of Arrow's of each."""
    return column.to_numpy(zero_copy_only=False).tolist()  # type: ignore[no-any-return]


def _values(column: pa.Array) -> list[Any]:
    """A column's values; strings as bytes, since Arrow's own reading raises for the whole column at one that is no UTF-8."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_string(kind):
        return column.cast(pa.binary()).to_pylist()  # type: ignore[no-any-return]
    if pa.types.is_large_string(kind):
        return column.cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]
    return column.to_pylist()  # type: ignore[no-any-return]


def fitted(rows: list[dict[str, Any]], schema: pa.Schema, texts: list[str | Problem]) -> pa.RecordBatch:
    """Kept values as a batch. Row by row where the batch as a whole does not fit, to find those that do not."""
    try:
        return pa.RecordBatch.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        pass
    for n, row in enumerate(rows):
        for name, value in row.items():
            try:
                pa.array([value], schema.field(name).type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                texts[n] = Problem(
                    "invalid_column",
                    f"{name}: expected {schema.field(name).type}, as in the first rows, got {type(value).__name__}",
                )
                row[name] = None
    return pa.RecordBatch.from_pylist(rows, schema=schema)


def _readable(kept: pa.RecordBatch, texts: list[str | Problem]) -> pa.RecordBatch:
    """Kept columns without strings that are no UTF-8: their rows become problems."""
    columns = []
    for field, column in zip(kept.schema, kept.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values = [as_text(value) for value in _values(column)]
            for n, value in enumerate(values):
                if value is NOT_UTF8:
                    texts[n] = Problem(NOT_UTF8.code, f"{field.name}: {NOT_UTF8.message}")
            column = pa.array([value if isinstance(value, str) else None for value in values], field.type)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=kept.schema)
