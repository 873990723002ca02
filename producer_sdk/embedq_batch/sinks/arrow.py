"""Vectors as Arrow batches: the columns of files, and of stores that take Arrow."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedq_batch.content.rows import Shape, VectorBatch
from embedq_sdk.errors import InvalidArgument

_ELEMENT: Final = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
OURS: Final = ("id", "row", "start", "end", "vector", "scale", "model_version", "tokens")
"""Names of our columns; kept ones must not be called so."""


def arrow_schema(shape: Shape) -> pa.Schema:
    """The columns: id; with spans the row's id, start and end; the vector, with int8 its scale; model version, tokens; what is kept.

    Raises:
        InvalidArgument: a kept column has the name of one of ours.
    """
    kind = pa.int64() if shape.ids == "integer" else pa.string()
    fields = [pa.field("id", pa.string() if shape.spans else kind, nullable=False)]
    if shape.spans:
        fields += [
            pa.field("row", kind, nullable=False),
            pa.field("start", pa.int32()),
            pa.field("end", pa.int32()),
        ]
    fields.append(pa.field("vector", pa.list_(_ELEMENT[shape.dtype], shape.width), nullable=False))
    if shape.dtype == "int8":
        fields.append(pa.field("scale", pa.float32(), nullable=False))
    fields += [pa.field("model_version", pa.string(), nullable=False), pa.field("tokens", pa.int32())]
    for field in shape.kept or ():
        if field.name in OURS:
            raise InvalidArgument(
                argument="keep", expected=f"columns with other names than {', '.join(OURS)}", got=field.name
            )
        fields.append(field)
    return pa.schema(fields)


def arrow_batch(batch: VectorBatch, shape: Shape, schema: pa.Schema) -> pa.RecordBatch:
    """A batch with the columns of `arrow_schema`."""
    columns: list[Any] = [
        pa.array(batch.ids if not shape.spans else list(map(str, batch.ids)), schema.field("id").type)
    ]
    if batch.rows is not None and batch.spans is not None:
        columns += [
            pa.array(batch.rows, schema.field("row").type),
            pa.array(np.ascontiguousarray(batch.spans[:, 0]), pa.int32()),
            pa.array(np.ascontiguousarray(batch.spans[:, 1]), pa.int32()),
        ]
    flat = pa.array(np.ascontiguousarray(batch.vectors).reshape(-1), _ELEMENT[shape.dtype])
    columns.append(pa.FixedSizeListArray.from_arrays(flat, shape.width))
    if batch.scales is not None:
        columns.append(pa.array(batch.scales, pa.float32()))
    columns += [
        pa.repeat(pa.scalar(batch.model_version, pa.string()), len(batch)),
        pa.array(batch.tokens, pa.int32()),
    ]
    if batch.kept is not None:
        columns += batch.kept.columns
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def vectors_of(batch: pa.RecordBatch) -> npt.NDArray[Any]:
    """The vectors of a batch, (n, width), without a copy where that can be."""
    column = batch.column("vector")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)  # type: ignore[no-any-return]


def floats_of(batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
    """The same as float32 (n, dimensions)."""
    vectors = vectors_of(batch)
    if vectors.dtype == np.uint8:
        return np.unpackbits(vectors, axis=1).astype(np.float32)
    floats = vectors.astype(np.float32)
    if "scale" in batch.schema.names:
        return floats * batch.column("scale").to_numpy(zero_copy_only=False)[:, None]  # type: ignore[no-any-return]
    return floats
