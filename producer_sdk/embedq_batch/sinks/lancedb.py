"""LanceDB: a table with the columns that a file has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedq_batch.content.inference import in_json
from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType, quoted
from embedq_batch.errors import BadTarget, TargetAway
from embedq_batch.manifest.place import MANIFEST, beside, in_working_folder
from embedq_batch.sinks.arrow import arrow_batch, arrow_schema, floats_of
from embedq_batch.sinks.sink import PartsRecord

_MERGED_BYTES: Final = 64 << 20
"""Of vectors in one merge: each makes a version of the table, and looks for its ids in all of it."""


class LanceSink:
    """A table of a LanceDB database: a folder, or an address that LanceDB knows (s3://…). Packed bits are searched by Hamming distance."""

    dtypes = frozenset[VectorType]({"float32", "float16", "binary"})

    def __init__(self, place: str, table: str) -> None:
        self._place = place
        self._table_name = table
        self._table: Any = None
        self._shape: Shape | None = None
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = 0

    @property
    def name(self) -> str:
        return f"lancedb:{self._place}#{self._table_name}"

    @property
    def manifest(self) -> Path:
        if "://" in self._place:
            return in_working_folder(self.name) / MANIFEST
        return beside(Path(self._place) / self._table_name) / MANIFEST

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        self._shape, self._schema = shape, arrow_schema(shape)
        try:
            database = lancedb.connect(self._place)
            try:
                self._table = database.open_table(self._table_name)
            except ValueError:  # there is none
                self._table = database.create_table(self._table_name, schema=self._schema)
        except (OSError, RuntimeError, ValueError) as error:
            raise BadTarget(target=self.name, reason=str(error)) from None
        found = self._table.schema
        for field in self._schema:
            if field.name not in found.names or found.field(field.name).type != field.type:
                there = found.field(field.name).type if field.name in found.names else "no such column"
                raise BadTarget(
                    target=self.name, reason=f"column {field.name}: expected {field.type}, got {there}"
                )

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None or self._schema is None:
            raise RuntimeError("a table is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:
            raise BadTarget(
                target=self.name,
                reason=f"expected vectors of {self._shape.width}, got {batch.vectors.shape[1]} from another model",
            )
        self._waiting.append(arrow_batch(batch, self._shape, self._schema))
        self._waiting_bytes += batch.vectors.nbytes
        if self._waiting_bytes >= _MERGED_BYTES:
            self.flush()
        return 0

    def flush(self) -> int:
        if not self._waiting:
            return 0
        rows = pa.Table.from_batches(self._waiting)
        if len(rows.column("id").unique()) < rows.num_rows:
            last = {id: n for n, id in enumerate(rows.column("id").to_pylist())}
            rows = rows.take(pa.array(sorted(last.values()), pa.int64()))
        try:
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(
                rows
            )
        except (OSError, RuntimeError) as error:
            raise TargetAway(target=self.name, reason=str(error)) from None
        self._waiting, self._waiting_bytes = [], 0
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        self.flush()
        try:
            self._table.delete(f"id in ({', '.join(map(quoted, ids))})")
        except (OSError, RuntimeError) as error:
            raise TargetAway(target=self.name, reason=str(error)) from None

    def kept_types(self, names: Sequence[str]) -> pa.Schema | None:
        try:
            schema = lancedb.connect(self._place).open_table(self._table_name).schema
        except ValueError:  # there is none
            return None
        except (OSError, RuntimeError) as error:
            raise BadTarget(target=self.name, reason=str(error)) from None
        return in_json(schema, names)

    def delete_spans(self, rows: Sequence[RowId], but: Sequence[RowId]) -> None:
        self.flush()
        surplus = f"row in ({', '.join(map(quoted, rows))})"
        if but:
            surplus += f" and id not in ({', '.join(map(quoted, but))})"
        try:
            if self._table.count_rows(surplus):  # a delete of nothing makes a version of the table, too
                self._table.delete(surplus)
        except (OSError, RuntimeError) as error:
            raise TargetAway(target=self.name, reason=str(error)) from None

    def finish(self, record: PartsRecord) -> None:
        self.flush()
        self._table.optimize()

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        if not ids:
            return {}
        rows = (
            self._table.search()
            .where(f"id in ({', '.join(map(quoted, ids))})")
            .select(["id", "vector"])
            .limit(len(ids))
            .to_arrow()
        )
        return {
            id: vector
            for batch in rows.to_batches()
            for id, vector in zip(batch.column("id").to_pylist(), floats_of(batch), strict=True)
        }

    def stored(self, version: str | None = None) -> int:
        if self._table is None:
            try:
                self._table = lancedb.connect(self._place).open_table(self._table_name)
            except (OSError, RuntimeError, ValueError) as error:
                raise BadTarget(target=self.name, reason=str(error)) from None
        return int(self._table.count_rows(None if version is None else f"model_version = {quoted(version)}"))

    def close(self) -> None:
        self._waiting = []
