"""Documents as they come on a Kafka topic: plain rows, Debezium's envelopes, what Connect's JsonConverter writes, tombstones. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import pyarrow as pa

from embedq_batch.content.columns import BAD_ID, Columns, RowReader, is_sound_id
from embedq_batch.content.rows import Problem, RowBatch, RowId
from embedq_shared.kafka import Polled, UnreadableRecord

_ENVELOPE: Final = frozenset({"before", "after", "op"})
_DELETED: Final = "__deleted"
"""What Debezium's ExtractNewRecordState adds where it is told to rewrite deletes."""


class Document(msgspec.Struct, frozen=True):
    """A document, as its topic has it: new or changed with a record, gone with None, or unreadable."""

    id: str | None
    record: dict[str, Any] | Problem | None


def document(key: bytes | None, value: bytes | None, id_column: str | None) -> Document:
    """What a record of a topic says.

    The id is the value's `id_column`, else that column of a key that is an object, else the key itself. A null value is a delete, and so
    is Debezium's envelope with `op` d, or with `after` null.
    """
    named = _key(key, id_column)
    if value is None:
        return Document(named, None)
    try:
        found = _unwrapped(msgspec.json.decode(value))
    except UnicodeDecodeError:
        return Document(named, Problem("invalid_utf8", "expected UTF-8, got other bytes"))
    except (msgspec.DecodeError, RecursionError) as error:
        return Document(named, Problem("malformed", f"expected a JSON object: {error}"))
    if found is None:
        return Document(named, None)
    if not isinstance(found, dict):
        return Document(named, Problem("malformed", f"expected a JSON object, got {type(found).__name__}"))
    if found.keys() >= _ENVELOPE or ("after" in found and "op" in found):
        before, after = found.get("before"), found.get("after")
        if found.get("op") == "d" or after is None:
            return Document(_id_in(before, id_column) or named, None)
        if not isinstance(after, dict):
            return Document(
                named, Problem("malformed", f"after: expected an object, got {type(after).__name__}")
            )
        found = after
    if str(found.get(_DELETED)).lower() == "true":
        return Document(_id_in(found, id_column) or named, None)
    return Document(_id_in(found, id_column) or named, found)


def _key(key: bytes | None, id_column: str | None) -> str | None:
    if key is None:
        return None
    try:
        found = _unwrapped(msgspec.json.decode(key))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            return key.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(found, dict):
        named = _id_in(found, id_column)
        if named is None and len(found) == 1:
            return _as_id(next(iter(found.values())))
        return named
    return _as_id(found)


def _unwrapped(found: Any) -> Any:
    """What is in Connect's {"schema": …, "payload": …}."""
    if isinstance(found, dict) and found.keys() == {"schema", "payload"}:
        return found["payload"]
    return found


def _id_in(record: Any, id_column: str | None) -> str | None:
    if id_column is None or not isinstance(record, Mapping):
        return None
    return _as_id(record.get(id_column))


def _as_id(value: Any) -> str | None:
    if value is None or isinstance(value, (dict, list)):
        return None
    return value if isinstance(value, str) else str(value)


def document_of(record: Polled, id_column: str | None) -> Document:
    """A record's document. One that has neither id nor key is named by where it is."""
    name = f"{record.topic}-{record.partition}-{record.offset}"
    if isinstance(record, UnreadableRecord):
        return Document(name, Problem("malformed", record.reason))
    found = document(record.key, record.value, id_column)
    if found.id is None:
        return msgspec.structs.replace(found, id=name)
    if not is_sound_id(found.id):
        return Document(name, None if found.record is None else BAD_ID)
    return found


class DocumentReader:
    """Makes rows of documents. Of those with one id in a batch the last one counts."""

    def __init__(self, columns: Columns, kept: pa.Schema | None) -> None:
        # The id is the document's: it may be in the key alone.
        self._reader = RowReader(msgspec.structs.replace(columns, id=None), str)
        self._kept = kept

    def batch(self, documents: Sequence[Document]) -> RowBatch:
        """The rows of some documents, and the ids of those that are gone."""
        last = {each.id: each for each in documents if each.id is not None}
        present = {id: each.record for id, each in last.items() if each.record is not None}
        rows = self._reader.of_records(list(present.values()), self._kept)
        deleted: list[RowId] = [id for id, each in last.items() if each.record is None]
        return RowBatch(ids=list(present), texts=rows.texts, kept=rows.kept, deleted=deleted)
