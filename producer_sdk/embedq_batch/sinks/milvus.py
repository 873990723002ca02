"""Milvus: a collection whose entities are upserted by id. A server, or a file of Milvus Lite."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
from pymilvus import DataType, MilvusClient, MilvusException

from embedq_batch.content.addresses import without_password
from embedq_batch.content.payloads import payloads
from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType, quoted
from embedq_batch.errors import BadTarget, RowsRefused, TargetAway
from embedq_batch.manifest.place import of_collection
from embedq_batch.sinks.arrow import arrow_schema
from embedq_batch.sinks.sink import PartsRecord

_LONGEST_ID: Final = 1024
"""Bytes of an id that is text."""
_AT_ONCE: Final = 1000
"""Ids in one expression."""


class MilvusSink:
    """A collection with the fields `id` and `vector`, and all else as dynamic fields: `model_version`, `tokens`, what is kept, and
    with spans `row`, `start` and `end`. Cosine, with the index that Milvus chooses.

    The token of a server that asks for one is in MILVUS_TOKEN.
    """

    dtypes = frozenset[VectorType]({"float32"})

    def __init__(self, address: str, collection: str) -> None:
        self._address = address
        self._collection = collection
        self._client: MilvusClient | None = None
        self._shape: Shape | None = None

    @property
    def name(self) -> str:
        return f"milvus:{without_password(self._address)}#{self._collection}"

    @property
    def manifest(self) -> Path:
        return of_collection(self._address, self._collection, self.name)

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        arrow_schema(shape)  # kept columns have other names than ours
        self._shape = shape
        try:
            client = self._connected()
            if not client.has_collection(self._collection):
                self._create(client, shape)
            found = client.describe_collection(self._collection)
        except (MilvusException, OSError, ValueError) as error:
            raise BadTarget(target=self.name, reason=_said(error)) from None
        fields = {field["name"]: field for field in found["fields"]}
        size = fields.get("vector", {}).get("params", {}).get("dim")
        if size is None or int(size) != shape.width:
            raise BadTarget(target=self.name, reason=f"vector: expected {shape.width} dimensions, got {size}")

    def _create(self, client: MilvusClient, shape: Shape) -> None:
        schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
        if shape.ids == "integer" and not shape.spans:
            schema.add_field("id", DataType.INT64, is_primary=True)
        else:
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_LONGEST_ID)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=shape.width)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        client.create_collection(self._collection, schema=schema, index_params=index)

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None:
            raise RuntimeError("a collection is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:
            raise BadTarget(
                target=self.name,
                reason=f"expected vectors of {self._shape.width}, got {batch.vectors.shape[1]} from another model",
            )
        rows = payloads(batch)
        for row, vector in zip(rows, batch.vectors, strict=True):
            row["vector"] = vector
        self._call(lambda client: client.upsert(self._collection, rows))
        return 0

    def flush(self) -> int:
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        for start in range(0, len(ids), _AT_ONCE):
            some = list(ids[start : start + _AT_ONCE])
            self._call(lambda client, some=some: client.delete(self._collection, ids=some))

    def kept_types(self, names: Sequence[str]) -> None:
        return None  # what is kept has no types here

    def delete_spans(self, rows: Sequence[RowId], but: Sequence[RowId]) -> None:
        surplus = f"row in [{', '.join(map(quoted, rows))}]"
        if but:
            surplus += f" and id not in [{', '.join(map(quoted, but))}]"
        self._call(lambda client: client.delete(self._collection, filter=surplus))

    def finish(self, record: PartsRecord) -> None:
        self._call(lambda client: client.flush(self._collection))

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        if not ids:
            return {}
        found = self._asked(
            lambda client: client.query(
                self._collection,
                filter=f"id in [{', '.join(map(quoted, ids))}]",
                output_fields=["id", "vector"],
                consistency_level="Strong",
            )
        )
        return {row["id"]: np.asarray(row["vector"], np.float32) for row in found}

    def point(self, alias: str) -> str | None:
        """An alias of the collection, moved in one request."""
        client = self._connected()
        try:
            client.load_collection(self._collection)  # a search of one that is not in memory fails
        except (MilvusException, grpc.RpcError) as error:
            raise BadTarget(target=self.name, reason=_said(error)) from None
        try:
            before = str(client.describe_alias(alias)["collection_name"])
        except MilvusException:
            before = None  # there is none
        try:
            if before is None:
                client.create_alias(self._collection, alias)
            else:
                client.alter_alias(self._collection, alias)
        except (MilvusException, grpc.RpcError) as error:
            raise BadTarget(target=self.name, reason=_said(error)) from None
        return before

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connected(self) -> MilvusClient:
        if self._client is None:
            self._client = MilvusClient(self._address, token=os.environ.get("MILVUS_TOKEN", ""))
        return self._client

    def stored(self, version: str | None = None) -> int:
        chosen = "" if version is None else f"model_version == {quoted(version)}"
        found = self._asked(
            lambda client: client.query(
                self._collection, filter=chosen, output_fields=["count(*)"], consistency_level="Strong"
            )
        )
        return int(found[0]["count(*)"])

    def _asked(self, function: Any) -> Any:
        """What the store says to a question."""
        try:
            return self._call(function)
        except RowsRefused as refused:
            raise BadTarget(target=self.name, reason=refused.reason) from None

    def _call(self, function: Any) -> Any:
        try:
            return function(self._connected())
        except grpc.RpcError as error:
            raise TargetAway(target=self.name, reason=_said(error)) from None
        except MilvusException as error:
            if "unavailable" in str(error).lower() or "connect" in str(error).lower():
                raise TargetAway(target=self.name, reason=_said(error)) from None
            raise RowsRefused(target=self.name, reason=_said(error)) from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
