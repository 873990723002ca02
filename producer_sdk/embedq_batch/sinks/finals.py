"""The files that parts are made into: Parquet, JSON Lines, and .npy with its rows beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from embedq_batch.content.rows import RowId, Shape, VectorType
from embedq_batch.sinks.arrow import arrow_schema, floats_of, vectors_of

_ALL: Final[frozenset[VectorType]] = frozenset({"float32", "float16", "int8", "binary"})
_GROUP_BYTES: Final = 64 << 20
"""Of vectors in a row group: readers take one as a whole."""


class ParquetFile:
    """Parquet with row groups of 64 MB, the vector as a list of fixed size, zstd."""

    suffix = ".parquet"
    dtypes = _ALL

    def write(self, path: Path, shape: Shape, batches: Iterator[pa.RecordBatch]) -> None:
        schema = arrow_schema(shape)
        repeated = [name for name in schema.names if name not in ("id", "row", "vector")]
        rows = max(1, _GROUP_BYTES // max(1, schema.field("vector").type.list_size * _item_size(shape)))
        with pq.ParquetWriter(
            path,
            schema.with_metadata({"embedq.model_version": shape.model_version}),
            compression="zstd",
            compression_level=1,  # vectors are noise to a compressor: more effort saves nothing
            use_dictionary=repeated,
        ) as writer:
            waiting: list[pa.RecordBatch] = []
            count = 0
            for batch in batches:
                waiting.append(batch)
                count += batch.num_rows
                if count >= rows:
                    writer.write_table(pa.Table.from_batches(waiting), row_group_size=count)
                    waiting, count = [], 0
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting), row_group_size=count)

    def read(self, path: Path, shape: Shape) -> Iterator[tuple[list[RowId], npt.NDArray[np.float32]]]:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = [name for name in ("id", "vector", "scale") if name in file.schema_arrow.names]
            for batch in file.iter_batches(4096, columns=names):
                yield batch.column("id").to_numpy(zero_copy_only=False).tolist(), floats_of(batch)

    def others(self, path: Path) -> list[Path]:
        return []


class JsonLinesFile:
    """A flat JSON object on each line: `id`, `vector`, `model_version`, `tokens`, and what is kept."""

    suffix = ".jsonl"
    dtypes = _ALL

    def write(self, path: Path, shape: Shape, batches: Iterator[pa.RecordBatch]) -> None:
        with open(path, "wb") as file:
            for batch in batches:
                file.writelines(json_lines(batch))

    def read(self, path: Path, shape: Shape) -> Iterator[tuple[list[RowId], npt.NDArray[np.float32]]]:
        with open(path, "rb") as file:
            for line in file:
                row = msgspec.json.decode(line)
                yield [row["id"]], flat_vector(row, shape.dtype)[None]

    def others(self, path: Path) -> list[Path]:
        return []


class NpyFile:
    """`NAME.npy`, (rows, dimensions), and `NAME.rows.jsonl` with the id and all else of each row, in the same order."""

    suffix = ".npy"
    dtypes = frozenset[VectorType]({"float32", "float16", "binary"})

    def write(self, path: Path, shape: Shape, batches: Iterator[pa.RecordBatch]) -> None:
        count = 0
        dtype = np.dtype({"float32": "<f4", "float16": "<f2", "binary": "u1"}[shape.dtype])
        with open(path, "wb") as file, open(self.others(path)[0], "wb") as rows:
            _npy_header(file, dtype, 0, shape.width)
            for batch in batches:
                file.write(np.ascontiguousarray(vectors_of(batch), dtype).tobytes())
                rows.writelines(json_line(row) for row, _ in _records(batch))
                count += batch.num_rows
            file.seek(0)
            _npy_header(file, dtype, count, shape.width)

    def read(self, path: Path, shape: Shape) -> Iterator[tuple[list[RowId], npt.NDArray[np.float32]]]:
        vectors = np.load(path, mmap_mode="r")
        with open(self.others(path)[0], "rb") as rows:
            for n, line in enumerate(rows):
                vector = np.asarray(vectors[n])
                if shape.dtype == "binary":
                    vector = np.unpackbits(vector)
                yield [msgspec.json.decode(line)["id"]], vector.astype(np.float32)[None]

    def others(self, path: Path) -> list[Path]:
        return [path.with_name(f"{path.name.removesuffix('.npy')}.rows.jsonl")]


def json_lines(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Each row as a flat JSON object, in a line."""
    for row, vector in _records(batch):
        yield json_line({"id": row.pop("id"), "vector": vector} | row)


def flat_vector(row: dict[str, Any], dtype: VectorType) -> npt.NDArray[np.float32]:
    """The vector of a flat JSON object."""
    vector = np.asarray(row["vector"], np.float32)
    if dtype == "binary":
        return np.unpackbits(vector.astype(np.uint8)).astype(np.float32)
    return vector * np.float32(row.get("scale", 1))


def json_line(row: dict[str, Any]) -> bytes:
    """A record as a line of JSON, its numbers with the fewest digits that read back the same."""
    return orjson.dumps(
        row,
        default=_as_json,
        option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS,
    )


def _as_json(value: object) -> Any:
    if isinstance(value, np.ndarray):  # float16, which has no decimals of its own there
        return value.astype(np.float32)
    return str(value)


def _records(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], npt.NDArray[Any]]]:
    """Each row without its vector, and that."""
    vectors = vectors_of(batch)
    others = batch.select([name for name in batch.schema.names if name != "vector"])
    for n, row in enumerate(others.to_pylist()):
        yield row, vectors[n]


def _npy_header(file: Any, dtype: np.dtype[Any], rows: int, width: int) -> None:
    """numpy pads it so that the first axis may grow in place."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, width)}
    )


def _item_size(shape: Shape) -> int:
    return {"float32": 4, "float16": 2, "int8": 1, "binary": 1}[shape.dtype]
